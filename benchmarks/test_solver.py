"""The ridge solver, as it is and as the engine calls it, beside torch.linalg: see conftest.py for how to run it.

    python -m pytest benchmarks/test_solver.py --benchmark-only -n0 --benchmark-json=benchmarks/results/ridge_NAME.json

ridge.py holds the systems and contenders, and makes the table and the figure of such a file.
"""

from collections.abc import Callable
from typing import Any

import harness
import operations
import pytest
import ridge
import torch
from cases import Place, Shape
from synthetic import SHAPES


@pytest.mark.parametrize("name", ridge.CONTENDERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_system(name: str, dtype: str, size: str, place: Place, timed: Callable[..., None], benchmark: Any) -> None:
    """(G + μI) Δᵀ = R: accuracy, memory beside G and R, then time."""
    d, n = SHAPES[size][:2]
    if not ridge.serves(name, place.device):
        pytest.skip(f"minisp._C has no solver for {place.device}")
    solve, (gram, right) = ridge.CONTENDERS[name], ridge.make_system(n, d, getattr(torch, dtype), place.device)
    # The buffers that BLAS makes once and keeps are nobody's.
    solve(gram[:512, :512].clone(), right[:64, :512].clone())
    a, r = gram.clone(), right.clone()
    base = harness.start_peak(place.device)
    solution = solve(a, r)
    extra = harness.peak(place.device) - base
    accuracy = ridge.accuracy(gram, right, solution)
    ridge.require(accuracy, gram)
    benchmark.group = f"ridge system, n = {n}, d = {d}, {dtype}"
    facts = {"name": name, "n": n, "d": d, "dtype": dtype, "extra_bytes": extra, "gram_bytes": gram.nbytes}

    def restore() -> None:
        a.copy_(gram)
        r.copy_(right)

    timed(lambda: solve(a, r), restore, **facts, **accuracy, flops=ridge.flops(n, d))


@pytest.mark.parametrize("contender", ["minisp native", "minisp torch", "torch.linalg"])
def test_ridge_solve(contender: str, shapes: dict[str, Shape], place: Place, contend: Callable[..., None]) -> None:
    """The whole refit of a down projection."""
    contend(operations.ridge_solve, shapes["ridge_solve"], place, contender)
