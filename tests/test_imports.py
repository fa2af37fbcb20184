"""The dependency rule, held on the import graph: imports inside functions and in type-checking blocks count as well."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minisp"

# The rows of the house. A folder or file imports only from the rows below its own, so that reading upwards is reading
# the story backwards. "minisp" is the package's own __init__. A new folder has to take a place here.
ROWS = (
    ("cli",),
    ("recipes", "frontier"),
    ("fast",),
    ("export",),
    ("report", "evaluate"),
    ("plan",),
    ("phases",),
    ("models", "methods", "text"),
    ("store", "ops"),
    # Leaves, which everything may import, each other included.
    ("config", "resources", "checks", "docstrings", "errors", "device", "ranks", "units", "kernels", "_C", "minisp"),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
LEAVES = ROWS[-1]

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


def room(name: str) -> str | None:
    """The entry of `ROWS` that a dotted name belongs to; None outside minisp."""
    top, _, rest = name.partition(".")
    if top != "minisp":
        return None
    first = rest.split(".")[0].replace("__main__", "cli")
    return first if first in ROW_OF else "minisp"


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
def test_a_module_imports_only_from_the_rows_below(path: Path) -> None:
    name = dotted(path)
    assert name in ("minisp", "minisp.__main__") or name.split(".")[1] in ROW_OF, f"{name} has no place in ROWS"
    own = room(name)
    assert own is not None
    for imported in sorted(imports_of(path)):
        target = room(imported)
        if target not in (None, own) and not (own in LEAVES and target in LEAVES):
            assert ROW_OF[own] < ROW_OF[target], f"{name} imports {imported}: {target} is not below {own}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_the_reference_is_imported_by_tests_alone(path: Path) -> None:
    assert not any(name.startswith("minisp.ops.reference") for name in imports_of(path))


@pytest.mark.parametrize("path", [path for path in MODULES if dotted(path).startswith("minisp.methods")], ids=dotted)
def test_methods_know_neither_files_nor_models(path: Path) -> None:
    assert not roots(path) & {"transformers", "safetensors", "accelerate", "pathlib", "os"}
    assert {room(imported) for imported in imports_of(path)} <= {None, "methods", "ops", *LEAVES}


def test_no_modules_import_each_other() -> None:
    names = {dotted(path) for path in MODULES if path.name != "__init__.py"}
    found = {
        dotted(path): {n for name in imports_of(path) for n in (name, name.rpartition(".")[0])} for path in MODULES
    }
    order = TopologicalSorter({name: imported & names for name, imported in found.items()}).static_order()
    assert names <= set(order)


@pytest.mark.parametrize("path", [path for path in MODULES if dotted(path).startswith("minisp.kernels")], ids=dotted)
def test_kernels_import_torch_and_triton_alone(path: Path) -> None:
    own = {name for name in imports_of(path) if name.startswith("minisp.kernels")}
    assert {name.split(".")[0] for name in imports_of(path) - own} <= {"torch", "triton"} | sys.stdlib_module_names
