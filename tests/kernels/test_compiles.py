"""No kernel that we ship spills, asks for too much shared memory or misses its matrix unit, on any GPU generation.

The list of what is shipped, and what is asked of each entry, stand in shipped.py; compiled.csv holds what the compilers
made of it.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.kernels.compiled import GOLDEN, Row, faults, read, write
from tests.kernels.shipped import WIDE, shipped

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Everything compiled once, in a process of its own: how that ended, and the table that it wrote."""
    table = tmp_path_factory.mktemp("compiled") / "compiled.csv"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.kernels.compiled", "--write", str(table)]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True), table


@pytest.mark.slow
def test_every_shipped_kernel_compiles_to_what_it_should(run: tuple[Any, Path]) -> None:
    assert run[0].returncode == 0, run[0].stdout + run[0].stderr


@pytest.mark.slow
def test_registers_and_shared_memory_are_those_of_the_golden_table(run: tuple[Any, Path]) -> None:
    """A kernel that takes more registers may still spill none, and yet run fewer programs at once."""
    version, golden = read(GOLDEN)
    if version != triton.__version__:
        pytest.skip(f"the table was compiled by Triton {version}, here is {triton.__version__}")
    differing = [(row, golden.get(place)) for place, row in read(run[1])[1].items() if golden.get(place) != row]
    assert differing == [], "if this was meant: python -m tests.kernels.compiled --write"


def test_the_golden_table_lists_what_is_shipped() -> None:
    listed = set(read(GOLDEN)[1])
    assert listed == {(entry.name, capability) for entry in shipped() for capability in entry.capabilities}


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [Row("gram, tile 64", 90, 8, 114, 0, 98304), Row("mirror", 80, 4, 30, 8, 0)]
    write(tmp_path / "table.csv", rows)
    version, found = read(tmp_path / "table.csv")
    assert version == triton.__version__
    assert found == {(row.name, row.capability): row for row in rows}


@pytest.mark.parametrize(
    ("changes", "ptx", "complaint"),
    [
        ({"stack": 8}, "wgmma.mma_async", "a stack of 8 bytes"),
        ({"shared": 232449}, "wgmma.mma_async", "232449 bytes of shared memory"),
        ({"registers": 129}, "wgmma.mma_async", "129 registers, too many for 2 programs at once"),
        ({}, "fma.rn.f32", "no wgmma.mma_async"),
        ({"name": "gram fp32 ieee aligned"}, "mma.sync", "mma. where there must be none"),
        ({}, "wgmma.mma_async", None),
    ],
)
def test_faults_are_found(changes: dict, ptx: str, complaint: str | None) -> None:
    cells = {"name": "gram bf16 aligned", "capability": 90, "warps": 8, "registers": 114, "stack": 0, "shared": 98304}
    row = Row(**{**cells, **changes})
    (entry,) = (entry for entry in shipped() if entry.name == row.name)
    ptx = " ".join([ptx, *WIDE])
    assert faults(entry, row, ptx) == ([] if complaint is None else [complaint])
