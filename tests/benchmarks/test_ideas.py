"""The ideas of benchmarks/ablation.py: each formula against a slow, plain one on a small layer."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ideas

TOKENS, WIDTH, HIDDEN = 60, 8, 3


def layer() -> tuple[Tensor, Tensor]:
    """Activations (T, m), of which the last unit is much like the first, and a down projection (d, m)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    x[:, -1] = x[:, 0] + 0.1 * x[:, -1]
    return x, torch.randn(HIDDEN, WIDTH, generator=generator, dtype=torch.float64)


def loss(x: Tensor, down: Tensor, kept: list[int], mu: float) -> float:
    """min over W' on the kept units of ‖(W − W')Xᵀ‖² + μ‖W − W'‖²."""
    rows = torch.cat([x, mu**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    target = rows @ down.T
    refitted = torch.linalg.lstsq(rows[:, kept], target).solution
    return float((rows[:, kept] @ refitted - target).square().sum())


def test_the_share_unexplained_is_what_a_regression_on_the_others_leaves() -> None:
    x, _ = layer()
    gram, mu = x.T @ x, 0.01 * float(x.square().sum() / WIDTH)
    rows = torch.cat([x, mu**0.5 * torch.eye(WIDTH, dtype=x.dtype)])
    wanted = []
    for unit in range(WIDTH):
        rest = [other for other in range(WIDTH) if other != unit]
        left = rows[:, unit] - rows[:, rest] @ torch.linalg.lstsq(rows[:, rest], rows[:, [unit]]).solution[:, 0]
        wanted.append(float(left.square().sum() / rows[:, unit].square().sum()))
    found = ideas.unexplained(gram, 0.01)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert found[0] < 0.1 < found[1]


def test_elimination_by_saliency_asks_anew_once_a_twin_has_gone() -> None:
    x, _ = layer()
    gram, score = x.T @ x, torch.linspace(1, 2, WIDTH, dtype=torch.float64)
    left = list(range(WIDTH))
    while len(left) > 5:
        shares = ideas.unexplained(
            gram[left][:, left], 0.01 * float(gram.diagonal().mean() / gram.diagonal()[left].mean())
        )
        left.pop(int((score[left] * shares).argmin()))
    assert ideas.eliminate_salient(gram, score, 5, damping=0.01, at_once=1).tolist() == left
    assert (0 in left) != (WIDTH - 1 in left)


def test_swaps_end_where_no_single_exchange_is_better() -> None:
    x, down = layer()
    gram, mu = x.T @ x, 0.01 * float(x.square().sum() / WIDTH)
    start = torch.tensor([0, 1, 2, 7])
    kept = ideas.swap(gram, down, start, damping=0.01, at_once=4, rounds=50).tolist()
    assert loss(x, down, kept, mu) < loss(x, down, start.tolist(), mu)
    assert len(set(kept)) == 4 and kept == sorted(kept)
    best = min(combinations(range(WIDTH), 4), key=lambda units: loss(x, down, list(units), mu))
    assert loss(x, down, kept, mu) <= 1.2 * loss(x, down, list(best), mu)


def test_exchanges_know_the_loss_and_what_units_cost_and_gain() -> None:
    x, down = layer()
    system = x.T @ x
    system.diagonal().add_(0.3)
    kept = torch.tensor([0, 1, 2, 7])
    found, going, coming = ideas._exchanges(system, down, kept)
    now = loss(x, down, kept.tolist(), 0.3)
    assert found == pytest.approx(now)
    costs = [loss(x, down, [u for u in kept.tolist() if u != unit], 0.3) - now for unit in kept.tolist()]
    gains = {unit: now - loss(x, down, [*kept.tolist(), unit], 0.3) for unit in range(WIDTH) if unit not in kept}
    assert int(going[0]) == costs.index(min(costs))
    assert int(coming[0]) == max(gains, key=lambda unit: gains[unit])
    assert max(gains.values()) > min(costs)


def test_domains_are_combined_as_they_are_called() -> None:
    easy, hard = [torch.tensor([1.0, 3.0])], [torch.tensor([60.0, 20.0])]
    found = {name: combine([easy, hard])[0].tolist() for name, combine in ideas.DOMAINS.items()}
    assert found["sum"] == [61.0, 23.0]
    assert found["mean of shares"] == pytest.approx([0.5, 0.5])
    assert found["worst share"] == pytest.approx([0.75, 0.75])
    assert found["geometric mean"] == pytest.approx([0.1875**0.5, 0.1875**0.5])
