"""The opponents of benchmarks/quality.py: each formula against a slow, plain one on a small layer."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minisp.methods.statistics import Statistics

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import opponents

TOKENS, WIDTH, HIDDEN = 60, 8, 3


def tokens_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator)
    # The last unit is much like the first: one of them is cheap to replace, though neither is little used.
    x[:, -1] = x[:, 0] + 0.1 * x[:, -1]
    return x, torch.randn(TOKENS, WIDTH, generator=generator)


def layer_of(seed: int = 0) -> opponents.Layer:
    x, g = tokens_of(seed)
    p = (x * g).double()
    generator = torch.Generator().manual_seed(seed + 100)
    gate, up, down = (torch.randn(*shape, generator=generator) for shape in ((WIDTH, 2), (WIDTH, 2), (HIDDEN, WIDTH)))
    saliency = torch.stack([p.abs().sum(0), p.square().sum(0), p.sum(0)])
    return opponents.Layer(gate, up, down, Statistics(TOKENS, saliency, x.T @ x), x.mean(0))


def test_elimination_removes_what_least_squares_misses_least() -> None:
    layer, (x, _) = layer_of(), tokens_of(0)
    left = list(range(WIDTH))
    while len(left) > 5:
        losses = {}
        for unit in left:
            rest = [other for other in left if other != unit]
            refitted = torch.linalg.lstsq(x[:, rest].double(), (x @ layer.down.T).double()).solution
            losses[unit] = float((x[:, rest].double() @ refitted - (x @ layer.down.T).double()).square().sum())
        left.remove(min(losses, key=lambda unit: losses[unit]))
    kept = opponents.eliminate(layer.gram, layer.down, 5, damping=1e-7, at_once=1)
    assert kept.tolist() == left
    assert not {0, WIDTH - 1} <= set(left)


def test_oscar_refits_with_the_damping_that_it_selects_with() -> None:
    layer = layer_of()
    (cut,) = opponents.osscar([layer], 0.625)
    # Its published formula: the damped matrix on both sides.
    damped = layer.gram + opponents.OSSCAR_DAMPING * layer.gram.diagonal().mean() * torch.eye(WIDTH)
    rows = damped[cut.kept]
    assert len(cut.kept) == 5 and cut.down is not None
    torch.testing.assert_close(
        cut.down.T, torch.linalg.solve(rows[:, cut.kept], rows @ layer.down.T), rtol=1e-3, atol=1e-4
    )


def test_flap_keeps_the_mean_output() -> None:
    layers = [layer_of(0), layer_of(1)]
    cuts = opponents.flap(layers, 0.5)
    assert sum(len(cut.kept) for cut in cuts) == WIDTH
    for seed, (layer, cut) in enumerate(zip(layers, cuts, strict=True)):
        x, _ = tokens_of(seed)
        assert cut.bias is not None
        leaving = x[:, cut.kept] @ layer.down[:, cut.kept].T + cut.bias
        torch.testing.assert_close(leaving.mean(0), (x @ layer.down.T).mean(0))


def test_flap_ranks_standardised_variances() -> None:
    layers = [layer_of(0), layer_of(1)]
    scores = []
    for seed, layer in enumerate(layers):
        x, _ = tokens_of(seed)
        score = x.var(0, correction=0) * layer.down.square().sum(0)
        scores.append((score - score.mean()) / score.std())
    worst = int(torch.cat(scores).argmin())
    cuts = opponents.flap(layers, 1 - 1 / (2 * WIDTH))
    missing = [i * WIDTH + j for i, cut in enumerate(cuts) for j in range(WIDTH) if j not in cut.kept.tolist()]
    assert missing == [worst]


@pytest.mark.parametrize("name", ["magnitude", "Wanda-sp-like", "LLM-Pruner-like", "OSSCAR-like"])
def test_uniform_methods_cut_every_layer_alike(name: str) -> None:
    cuts = opponents.OPPONENTS[name]([layer_of(0), layer_of(1)], 0.5)
    assert [len(cut.kept) for cut in cuts] == [4, 4]


def test_wanda_scores_are_norms_times_weights() -> None:
    layer, (x, _) = layer_of(), tokens_of(0)
    scores = [float(layer.down[:, j].abs().mean() * x[:, j].norm()) for j in range(WIDTH)]
    best = sorted(sorted(range(WIDTH), key=lambda j: -scores[j])[:3])
    assert opponents.wanda_sp([layer], 3 / WIDTH)[0].kept.tolist() == best
