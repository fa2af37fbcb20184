"""The C++ extension, built from source in both forms: CPU alone, and with CUDA where nvcc is."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minisp

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="the CUDA part is built only where nvcc is")

# What the extension calls an instruction set, and what Linux calls it.
CPU_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
}


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the extension into `folder`, torch out of reach."""
    for name in ("setup.py", "pyproject.toml", "minisp/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").touch()
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"
    return subprocess.run(
        [sys.executable, "-c", code, "build_ext", "--build-lib", "out", "--build-temp", "temp"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def ask(folder: Path, expression: str, **environment: str) -> Any:
    """Value of an expression in `_C`, the extension built in `folder`."""
    code = f"import json, _C; print(json.dumps({expression}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder / "out" / "minisp")} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def cpu_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    result = build(folder, MINISP_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning:" not in result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    result = build(folder, NVCC=str(NVCC))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_build_info_says_what_was_built(cpu_build: Path) -> None:
    info = ask(cpu_build, "_C.build_info()")
    assert info["version"] == minisp.__version__
    assert info["cxx_standard"] >= 201703
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert (info["cuda"], info["cuda_archs"]) == (False, [])


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="x86-64 Linux")
def test_instruction_sets_are_those_that_the_system_reports(cpu_build: Path) -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    expected = {name for name, flag in CPU_FLAGS.items() if flag in flags}
    assert set(ask(cpu_build, "_C.build_info()")["instruction_sets"]) == expected


def test_a_cpu_build_has_no_device(cpu_build: Path) -> None:
    assert ask(cpu_build, "_C.cuda_device_count()") == 0


@needs_nvcc
def test_a_cuda_build_imports_and_counts_nothing_where_no_device_is_visible(cuda_build: Path) -> None:
    assert ask(cuda_build, "_C.cuda_device_count()", CUDA_VISIBLE_DEVICES="") == 0


@needs_nvcc
def test_a_cuda_build_needs_no_cuda_library(cuda_build: Path) -> None:
    (library,) = (cuda_build / "out" / "minisp").glob("_C*.so")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed
    assert "libcud" not in needed


@needs_nvcc
def test_a_cuda_build_holds_code_for_the_architectures_it_names(cuda_build: Path) -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (library,) = (cuda_build / "out" / "minisp").glob("_C*.so")
    listed = {
        kind: subprocess.run([tool, f"--list-{option}", library], capture_output=True, text=True, check=True).stdout
        for kind, option in (("sm", "elf"), ("compute", "ptx"))
    }
    archs = ask(cuda_build, "_C.build_info()")["cuda_archs"]
    assert {"sm_80", "compute_80"} <= set(archs)
    for arch in archs:
        kind, number = arch.split("_")
        assert f"sm_{number.rstrip('a')}" in listed[kind]


def test_a_missing_compiler_is_named_with_its_remedy(tmp_path: Path) -> None:
    result = build(tmp_path, MINISP_CUDA="0", PATH="", CXX="")
    assert result.returncode != 0
    assert "Install g++" in result.stderr


@needs_nvcc
def test_cuda_kernels_do_not_spill(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100", "120")]
    command = [str(NVCC), "-std=c++17", "-O3", "-DMINISP_WITH_CUDA", *targets, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "csrc" / "cholesky_cuda.cu"
    compiled = subprocess.run(
        [*command, "-c", source, "-o", tmp_path / "cholesky.o"], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    # Four kernels in two types and one in one for each target.
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
    assert len(spills) == (4 * 2 + 1) * len(targets)
    assert set(spills) == {("0", "0", "0")}, compiled.stderr
    print(*re.findall(r"Compiling entry function.*|Used \d+ registers.*", compiled.stderr), sep="\n")
