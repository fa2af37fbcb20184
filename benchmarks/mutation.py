"""Mutants of the core: which small faults in a module do its own tests let pass? Not part of the checks of a commit.

    OMP_NUM_THREADS=1 python benchmarks/mutation.py methods/selection methods/statistics

A mutant is a module with one operator, constant or statement changed. One process imports torch, transformers and
pytest, then forks once per mutant; the child compiles the changed syntax tree in place of the module's source, so no
file is ever written. `docs/mutation.md` explains the survivors.
"""

import argparse
import ast
import copy
import gc
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parents[1]

_GROUPS = "tests/models/test_groups.py::test_a_"
_EDITS = (
    "tests/models/test_edits.py",
    f"{_GROUPS}group_is_a_key_a_value_and_the_queries_that_read_them",
    f"{_GROUPS}cut_model_computes_what_zero_columns_compute",
)
# The tests that each module is held to: its own file, and where that is thin the nearest one.
METHODS = ("curvature", "reconstruction", "selection", "sparse", "statistics", "surgeon", "thresholds")
TESTS: dict[str, tuple[str, ...]] = {
    **{f"methods/{name}": (f"tests/methods/test_{name}.py",) for name in METHODS},
    "methods/damping": ("tests/methods/test_damping.py", "tests/methods/test_reconstruction.py"),
    "models/edits": _EDITS,
    "models/structures": _EDITS,
}
_OPERATORS = (
    "Lt LtE GtE, LtE Lt Gt, Gt GtE LtE, GtE Gt Lt, Eq NotEq, NotEq Eq, Is IsNot, IsNot Is, In NotIn, NotIn In, "
    "Add Sub, Sub Add, Mult Div, Div Mult, FloorDiv Mult, Mod Mult, Pow Mult, LShift RShift, "
    "BitAnd BitOr, BitOr BitAnd, And Or, Or And"
)
# The name of each operator in `ast`, and what may stand in its place.
OPERATORS = {first: others for first, *others in (row.split() for row in _OPERATORS.split(", "))}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
# Types are not run, a decorator changes the meaning of all that it decorates, and the text of messages is prose.
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "exc", "type")
SKIPPED_NODES = (ast.JoinedStr, ast.Import, ast.ImportFrom)
# Exit codes: wrong arguments or no tests (pytest), the original module was loaded (ours).
NOT_RUN = (4, 5, 99)
# Modules that import none of those above, which stay imported.
UNCHANGED = tuple(f"minisp.{name}" for name in ("_C", "ops", "kernels", "config", "errors", "device", "ranks"))


@dataclass(frozen=True)
class Mutant:
    """A module's syntax tree with one change: where it is, and what it is."""

    number: int
    line: int
    change: str
    tree: ast.Module


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operation in _others(node.ops[0]):
            yield _with(node, ops=[operation])
    elif isinstance(node, (ast.BinOp, ast.BoolOp)):
        for operation in _others(node.op):
            yield _with(node, op=operation)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield _with(node, id=NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield _with(node, attr=NAMES[node.attr])
    else:
        yield from _statements(node)


def _others(operation: ast.AST) -> list[Any]:
    return [getattr(ast, name)() for name in OPERATORS.get(type(operation).__name__, ())]


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    """A copy of the node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, (ast.Raise, ast.Continue, ast.AugAssign)):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign):
        for operation in _others(node.op):
            yield _with(node, op=operation)
    # A comparison, or a `not`, is changed where it stands.
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield from (ast.Return(operand) for operand in _operands(node.value))


def _operands(value: ast.expr) -> Iterator[ast.expr]:
    if isinstance(value, ast.BinOp):
        yield value.left
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr != "join":
        yield value.func.value
    elif isinstance(value, ast.Call) and value.args:
        yield value.args[0]


class _Mutator(ast.NodeTransformer):
    """Makes the change of one number, and counts the changes that there are."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.count, self.line, self.change = wanted, 0, 0, ""

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, SKIPPED_NODES):
            return node
        for changed in variants(node):
            self.count += 1
            if self.count - 1 == self.wanted:
                self.line = getattr(node, "lineno", 0)
                self.change = f"{_short(node)}  →  {_short(changed)}"
                return ast.copy_location(changed, node)
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and name not in SKIPPED_FIELDS:
                value[:] = [self.visit(item) if isinstance(item, ast.AST) else item for item in value]
            elif isinstance(value, ast.AST) and name not in SKIPPED_FIELDS:
                setattr(node, name, self.visit(value))
        return node


def _short(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(node)).partition("\n")[0]
    return text if len(text) <= 70 else f"{text[:67]}..."


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module's source, in the order of the source."""
    counter = _Mutator(-1)
    counter.visit(ast.parse(source))
    found = []
    for number in range(counter.count):
        mutator, tree = _Mutator(number), ast.parse(source)
        mutator.visit(tree)
        found.append(Mutant(number, mutator.line, mutator.change, ast.fix_missing_locations(tree)))
    return found


def verdict(module: str, tree: ast.Module, limit: int) -> str:
    """What the module's tests say of a tree in its place: "killed", "survived" or "timed out" after `limit` seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        served = _serve(f"minisp.{module.replace('/', '.')}", tree)
        code = _pytest(module, "-x")
        os._exit(code if served else NOT_RUN[-1])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in NOT_RUN:
        raise SystemExit(f"{module}: the tests did not run on the mutant (exit code {code}).")
    return "timed out" if code == -signal.SIGALRM else "survived" if code == 0 else "killed"


def _serve(name: str, tree: ast.Module) -> list[str]:
    """Whoever imports the module gets the tree; the list then holds its name."""
    served: list[str] = []
    stored = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, fullname: str) -> CodeType | None:
        if fullname != name:
            return stored(loader, fullname)
        served.append(name)
        return compile(tree, loader.path, "exec")

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return served


def _pytest(module: str, *options: str) -> int:
    """The exit code of the module's tests. Nothing is printed, and plugins that the tests do not use stay away."""
    # Options of the project are for two processes.
    ini = ["-o", "addopts=--import-mode=importlib", "-m", "not slow"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark", "-p", "no:faulthandler"]
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        return int(pytest.main(["-q", *ini, *plugins, *options, *TESTS[module]]))


def _warm_up(module: str) -> None:
    """Import what the tests import, so that no child has to; what may depend on a mutant is forgotten again."""
    if _pytest(module, "--collect-only"):
        raise SystemExit(f"{module}: its tests cannot be collected.")
    for name in list(sys.modules):
        if name.partition(".")[0] in ("minisp", "tests") and not name.startswith(UNCHANGED):
            del sys.modules[name]
    gc.collect()
    gc.freeze()


def run(module: str, *, most: int, seed: int, limit: int, only: Sequence[int]) -> None:
    """Print every mutant that is not killed, then the counts.

    The module as it is must pass its tests first, and fail with nothing returned from any function.
    """
    source = (ROOT / f"minisp/{module}.py").read_text("utf-8")
    _warm_up(module)
    whole, broken = ast.parse(source), ast.parse(source)
    for node in ast.walk(broken):
        if isinstance(node, ast.Return):
            node.value = None
    for tree, expected in ((whole, "survived"), (broken, "killed")):
        if (got := verdict(module, tree, 4 * limit)) != expected:
            raise SystemExit(f"{module}: expected that the check is {expected}, got {got}.")
    every = mutants(source)
    chosen = [every[number] for number in only] or every
    if len(chosen) > most:
        chosen = sorted(random.Random(seed).sample(chosen, most), key=lambda mutant: mutant.number)
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for mutant in chosen:
        got = verdict(module, mutant.tree, limit)
        counts[got] += 1
        if got != "killed" or only:
            print(f"{module}.py:{mutant.line} #{mutant.number} {got}: {mutant.change}", flush=True)
        elif sum(counts.values()) % 20 == 0:
            print(f"{module}: {sum(counts.values())} of {len(chosen)}, {dict(counts)}", flush=True)
    print(f"{module}: {len(chosen)} of {len(every)} mutants, {dict(counts)}, {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=sorted(TESTS), metavar="MODULE")
    parser.add_argument("--most", type=int, default=250, help="of more mutants, a sample of so many is run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=60, help="seconds for the tests of one mutant")
    parser.add_argument("--only", type=int, nargs="*", default=[], help="numbers of mutants to run, of one module")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Examples are always the same, and failing ones are not shrunk.
    quick = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", phases=quick, database=None, derandomize=True, deadline=None)
    settings.load_profile("mutation")
    for module in options.modules:
        run(module, most=options.most, seed=options.seed, limit=options.limit, only=options.only)


if __name__ == "__main__":
    main()
