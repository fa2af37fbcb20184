"""Mutants of the core: which small faults in a module do its own tests let pass? Not part of the checks of a commit.

    OMP_NUM_THREADS=1 python benchmarks/mutation.py methods/selection methods/statistics

A mutant is a module with one operator, constant or statement changed. One process imports torch, transformers and
pytest, then forks once per mutant; the child compiles the changed syntax tree in place of the module's source, so no
file is ever written. `docs/mutation.md` explains the survivors.
"""

import argparse
import ast
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

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
TESTS: dict[str, tuple[str, ...]] = {
    "methods/statistics": ("tests/methods/test_statistics.py",),
    "methods/selection": ("tests/methods/test_selection.py",),
    "methods/reconstruction": ("tests/methods/test_reconstruction.py",),
    "methods/damping": ("tests/methods/test_damping.py", "tests/methods/test_reconstruction.py"),
    "methods/thresholds": ("tests/methods/test_thresholds.py",),
    "methods/sparse": ("tests/methods/test_sparse.py",),
    "methods/surgeon": ("tests/methods/test_surgeon.py",),
    "methods/curvature": ("tests/methods/test_curvature.py",),
    "models/edits": _EDITS,
    "models/structures": _EDITS,
}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
# Types are not run, a decorator changes the meaning of all that it decorates, and the text of messages is prose.
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list", "exc", "type")
SKIPPED_NODES = (ast.JoinedStr, ast.Import, ast.ImportFrom)
# Exit codes: wrong arguments or no tests (pytest), the original module was loaded (ours).
NOT_RUN = (4, 5, 99)
# Modules that import none of those above, which stay imported.
UNCHANGED = (
    "minisp._C",
    "minisp.ops",
    "minisp.kernels",
    "minisp.config",
    "minisp.errors",
    "minisp.device",
    "minisp.ranks",
)


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
        for operation in COMPARISONS[type(node.ops[0])]:
            yield ast.Compare(node.left, [operation()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield ast.Name(NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        changed = deepcopy(node)
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
        yield changed
    else:
        yield from _statements(node)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, (ast.Raise, ast.Continue)):
        yield ast.Pass()
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if type(node.op) in OPERATORS:
            yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
    elif isinstance(node, ast.Return) and node.value is not None:
        for operand in _operands(node.value):
            yield ast.Return(operand)


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
        self.wanted, self.count = wanted, 0
        self.line, self.change = 0, ""

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
            if name in SKIPPED_FIELDS:
                continue
            if isinstance(value, list):
                value[:] = [self.visit(item) if isinstance(item, ast.AST) else item for item in value]
            elif isinstance(value, ast.AST):
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


def broken(source: str) -> ast.Module:
    """The module with nothing returned: no test file may pass with it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            node.value = None
    return tree


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for one module name with a syntax tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def verdict(module: str, tree: ast.Module, limit: int) -> str:
    """What the module's tests say of a tree in its place: "killed", "survived" or "timed out" after `limit` seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        name = f"minisp.{module.replace('/', '.')}"
        sys.meta_path.insert(0, _Loader(name, ROOT / f"minisp/{module}.py", tree))
        code = _pytest(module, "-x")
        os._exit(code if isinstance(sys.modules[name].__loader__, _Loader) else NOT_RUN[-1])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in NOT_RUN:
        raise SystemExit(f"{module}: the tests did not run on the mutant (exit code {code}).")
    return "timed out" if code == -signal.SIGALRM else "survived" if code == 0 else "killed"


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
    """Print every mutant that is not killed, then the counts."""
    source = (ROOT / f"minisp/{module}.py").read_text("utf-8")
    _warm_up(module)
    for tree, expected in ((ast.parse(source), "survived"), (broken(source), "killed")):
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


def _prepare() -> None:
    """The children's settings. Examples are always the same, and failing ones are not shrunk."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quick = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", phases=quick, database=None, derandomize=True, deadline=None)
    settings.load_profile("mutation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=sorted(TESTS), metavar="MODULE")
    parser.add_argument("--most", type=int, default=250, help="of more mutants, a sample of so many is run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=60, help="seconds for the tests of one mutant")
    parser.add_argument("--only", type=int, nargs="*", default=[], help="numbers of mutants to run, of one module")
    options = parser.parse_args()
    _prepare()
    for module in options.modules:
        run(module, most=options.most, seed=options.seed, limit=options.limit, only=options.only)


if __name__ == "__main__":
    main()
