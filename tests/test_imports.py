"""The dependency rule, held on the import graph: imports inside functions and in type-checking blocks count as well."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minisp"

# A module imports only from the rows below its own, so that reading upwards is reading the story backwards. A folder
# counts as one name; "minisp" is the package's own __init__. A new file has to take a place here.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("fast",),
    ("measure_view",),
    ("export", "measure"),
    ("speed",),
    ("choice", "evaluate", "report"),
    ("calibrate", "plan_view"),
    ("planner",),
    ("costs",),
    ("rooms",),
    ("memory",),
    ("allocation", "heal"),
    ("passage",),
    ("sweep",),
    ("partial",),
    ("resume", "workplace"),
    ("tiers",),
    ("demo_model", "layers", "mlp", "scratch", "stream", "writer"),
    ("loader", "model", "vocabulary"),
    ("attention", "batches", "calibration", "checkpoint", "hub", "reconstruction", "ring", "selection", "shape"),
    ("mixture",),
    ("builtin", "damping", "device", "files", "statistics", "transit", "written"),
    ("architecture", "corpora", "ops", "ranks", "windows"),
    ("labels", "prompts", "ridge"),
    ("cholesky",),
    ("native_cholesky", "native_norms", "norms", "portable", "residual"),
    ("backend", "native"),
    ("_C", "config", "errors", "kernels", "minisp", "reference"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# Leaves that everything may import, their own row included.
EXCEPTIONS = {("config", "errors"), ("kernels", "kernels")}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)
# Not through the link, which recursive globbing does not follow on every Python.
MODULES += sorted((PACKAGE / "kernels").glob("*.py"))


def dotted(path: Path) -> str:
    """minisp/export/folder.py → minisp.export.folder, minisp/__init__.py → minisp."""
    parts = ("minisp", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, package: str) -> set[str]:
    """Dotted names of what `source`, a module in `package`, imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                parents = package.split(".")
                base = parents[: len(parents) - node.level + 1] if node.level else []
                base += [node.module] if node.module else []
                names |= {".".join([*base, alias.name]) for alias in node.names}
            case ast.Attribute(value=ast.Name(id="minisp")):
                names.add(f"minisp.{node.attr}")
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names.add(name)
    return names


def level_name(name: str) -> str | None:
    """The entry of `LEVELS` that a dotted name belongs to; None outside minisp."""
    top, _, rest = name.partition(".")
    if top != "minisp":
        return None
    first = rest.split(".")[0]
    return first if first in LEVEL_OF else "minisp"


def imports_of(path: Path) -> set[str]:
    name = dotted(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imported_names(path.read_text(encoding="utf-8"), package)


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def test_imports_are_found_in_every_form() -> None:
    source = (
        "import minisp.a\nfrom minisp import b\nfrom . import c\nfrom .d import x\nfrom ..e import y\n"
        "def f():\n    from minisp.g import z\n    importlib.import_module('minisp.h')\n    return minisp.i.j\n"
    )
    found = imported_names(source, "minisp.export")
    expected = {"a", "b", "export.c", "export.d.x", "e.y", "g.z", "h", "i"}
    assert {f"minisp.{name}" for name in expected} <= found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_from_the_levels_below(path: Path) -> None:
    name = dotted(path)
    assert name == "minisp" or name.split(".")[1] in LEVEL_OF, f"{name} has no place in LEVELS"
    own = level_name(name)
    assert own is not None
    for imported in sorted(imports_of(path)):
        target = level_name(imported)
        if target is None or (own, target) in EXCEPTIONS or (own == target == "export"):
            continue
        assert LEVEL_OF[own] < LEVEL_OF[target], f"{name} imports {imported}: {target} is not below {own}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_the_reference_is_imported_by_tests_alone(path: Path) -> None:
    assert "reference" not in {level_name(name) for name in imports_of(path)}


@pytest.mark.parametrize("name", ["selection", "reconstruction"])
def test_selection_and_reconstruction_know_neither_files_nor_models(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    assert not roots(path) & {"transformers", "safetensors", "accelerate", "pathlib", "os"}
    assert {level_name(imported) for imported in imports_of(path)} <= {
        None,
        "ops",
        "config",
        "errors",
        "damping",
        "statistics",
        "ridge",
    }


@pytest.mark.parametrize("path", [path for path in MODULES if dotted(path).startswith("minisp.kernels")], ids=dotted)
def test_kernels_import_torch_and_triton_alone(path: Path) -> None:
    own = {name for name in imports_of(path) if name.startswith("minisp.kernels")}
    assert {name.split(".")[0] for name in imports_of(path) - own} <= {"torch", "triton"} | sys.stdlib_module_names
