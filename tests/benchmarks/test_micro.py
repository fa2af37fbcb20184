"""The micro-benchmarks of kernels and solver: they run, they check, and their file becomes a table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_every_contender_of_every_operation_is_benchmarked(script: Any) -> None:
    names, operations, cases = script("test_kernels"), script("operations"), script("cases")
    shape = {"m": 8, "T": 4, "d": 6, "V": 5, "B": 1, "L": 4, "H": 2, "K": 1, "D": 4}
    for operation, opponents in names.OPPONENTS.items():
        place = cases.Place(torch.device("cpu"), torch.float32)
        built = set(getattr(operations, operation)(shape, place).contenders)
        assert built <= {*names.OURS, *opponents}
        assert built & {*opponents} and "minisp torch" in built


def test_a_wrong_result_is_not_timed(script: Any) -> None:
    cases = script("cases")
    true = torch.tensor([1.0, 2.0])

    def case(value: torch.Tensor) -> Any:
        return cases.Case({"it": lambda: (value,)}, lambda dtype: (true.to(dtype),), torch.float32)

    assert cases.check(case(true), "it") == 0
    for wrong in (torch.tensor([1.0, 2.001]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(AssertionError, match="times what is allowed"):
            cases.check(case(wrong), "it")


@pytest.mark.slow
def test_they_run_and_write_what_the_table_of_the_solver_reads(script: Any, tmp_path: Path) -> None:
    result = tmp_path / "ridge_here.json"
    chosen = "test_system and float64 or mirror or ridge_solve"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "-n0", "-q", "-k", chosen]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MINISP_BENCH_SIZES": "tiny"}
    done = subprocess.run(
        [*command, f"--benchmark-json={result}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(result.read_text())
    facts = [one["extra_info"] for one in data["benchmarks"]]
    assert any(fact.get("operation") == "ridge_solve" and fact["flops"] > 0 for fact in facts)
    assert any(fact.get("operation") == "mirror" and fact["bytes"] > 0 for fact in facts)
    ridge = script("ridge")
    lines = ridge.table(data).splitlines()
    assert any(line.startswith("| 192, 64, float64, torch cholesky |") and "×1.00" in line for line in lines)
    assert {row["dtype"] for row in data["solves"]} == {"float64"}
    assert ridge.figure(data).axes
