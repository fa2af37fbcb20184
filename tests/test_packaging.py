"""What a user gets: the source archive, the wheel built from it, and imports without triton, GPU or extension."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
NOT_COPIED = (".*", "build", "dist", "shared", "results", "__pycache__", "*.egg-info", "*.so")


def run_python(code: str, *, cwd: Path, path: Path) -> str:
    """Output of `code` in a fresh interpreter that finds packages in `path` first, after `cwd` as usual."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive of this tree and the wheel built from that archive, CPU part alone."""
    folder = tmp_path_factory.mktemp("archives")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        env=os.environ | {"MINISP_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def installed(archives: Path) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = archives / "installed"
    (wheel,) = archives.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    return target


def test_kernels_is_a_link_and_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "minisp" / "kernels") == os.path.join("..", "kernels")


def test_the_wheel_holds_every_module_and_nothing_beside_minisp(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minisp").rglob("*.py")}
    modules |= {f"minisp/kernels/{name}.py" for name in KERNELS}
    modules |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "minisp").rglob("*.jinja")}
    assert modules | {"minisp/py.typed", "minisp/_C.pyi"} <= names
    assert [name for name in names if name.startswith("minisp/_C.") and name.endswith((".so", ".pyd"))]
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"minisp"}


def test_the_source_archive_can_rebuild_everything(archives: Path) -> None:
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = [path for folder in ("csrc", "kernels") for path in (ROOT / folder).glob("*.*")]
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= names
    assert {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "CHANGELOG.md"} <= names


@pytest.mark.parametrize("name", KERNELS)
def test_an_installed_kernel_imports_without_claiming_the_name_kernels(name: str, installed: Path) -> None:
    code = f"import sys, minisp.kernels.{name} as k; print(k.__file__); assert 'kernels' not in sys.modules"
    assert run_python(code, cwd=installed.parent, path=installed).strip().startswith(str(installed))


def test_transformers_creates_models_from_the_repository_root(installed: Path) -> None:
    # transformers looks for a package called kernels, and from here it finds this repository's folder.
    code = f"""
import sys
import {", ".join(f"minisp.kernels.{name}" for name in KERNELS)}
assert "kernels" not in sys.modules
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
print(sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**sizes)).model.layers[0].mlp.parameters()))
"""
    assert run_python(code, cwd=ROOT, path=installed).split()[-1] == str(3 * 8 * 16)


def test_everything_imports_without_triton_and_extension_and_touches_no_device(installed: Path) -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["triton"] = sys.modules["minisp._C"] = None
import minisp
for module in pkgutil.walk_packages(minisp.__path__, "minisp."):
    if not module.name.startswith(("minisp.kernels", "minisp._C", "minisp.__main__")):
        importlib.import_module(module.name)
import torch
assert not torch.cuda.is_initialized()
print(minisp.__file__)
"""
    assert run_python(code, cwd=installed.parent, path=installed).strip().startswith(str(installed))


def test_an_installed_page_finds_its_template(installed: Path) -> None:
    code = "from minisp.report.page import environment; print(environment().get_template('page.html.jinja').filename)"
    assert run_python(code, cwd=installed.parent, path=installed).strip().startswith(str(installed))


def test_the_extension_of_the_wheel_knows_its_version(installed: Path) -> None:
    code = (
        "import minisp, minisp._C as c; print(c.build_info()['version'] == minisp.__version__, c.cuda_device_count())"
    )
    assert run_python(code, cwd=installed.parent, path=installed).split() == ["True", "0"]
