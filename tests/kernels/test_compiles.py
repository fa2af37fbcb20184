"""No kernel that we ship spills, asks for too much shared memory or misses its matrix unit, on any GPU generation.

The list of what is shipped, and what is asked of each entry, stand in benchmarks/kernel_table.py.
"""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernel_table.py"


@pytest.fixture(scope="module")
def table() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_kernel_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_shipped_kernel_compiles_to_what_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, SCRIPT]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    with capsys.disabled():
        print(f"\n{result.stdout}")
    assert result.returncode == 0, result.stderr


def test_the_committed_table_lists_what_is_shipped(table: Any) -> None:
    with table.RESULT.open(encoding="utf-8") as stream:
        listed = {(row["name"], int(row["capability"])) for row in csv.DictReader(stream)}
    assert listed == {(entry.name, capability) for entry in table.shipped() for capability in entry.capabilities}


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
def test_faults_are_found(table: Any, changes: dict, ptx: str, complaint: str | None) -> None:
    cells = {"name": "gram bf16 aligned", "capability": 90, "warps": 8, "registers": 114, "stack": 0, "shared": 98304}
    row = table.Row(**{**cells, **changes})
    (entry,) = (entry for entry in table.shipped() if entry.name == row.name)
    ptx = " ".join([ptx, *table.WIDE])
    assert table.faults(entry, row, ptx) == ([] if complaint is None else [complaint])
