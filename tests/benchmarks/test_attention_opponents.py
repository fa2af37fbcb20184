"""Opponents that cut MLPs and attention: budgets in parameters, FLAP's scores and bias, Wanda's shares."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minisp.methods.statistics import Statistics
from minisp.models.structures import Slice, Structure

TOKENS, HIDDEN, COLUMNS = 50, 5, 3


def structure_of(layer: int, name: str) -> Structure:
    units, columns = (4, COLUMNS) if name == "attention" else (8, 1)
    parameters, head_dim = (40, 3) if name == "attention" else (10, 0)
    places = (Slice("out.weight", 1, columns, 0, columns),)
    return Structure(layer, name, units, columns, places, "out", parameters, head_dim)


def inputs_of(seed: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, width, generator=generator) * torch.rand(width, generator=generator) + 1


@pytest.fixture
def module(script: Any) -> Any:
    return script("attention_opponents")


@pytest.fixture
def parts(module: Any) -> list[Any]:
    found = []
    for seed in range(4):
        structure = structure_of(seed // 2, ("attention", "mlp")[seed % 2])
        x = inputs_of(seed, structure.width)
        statistics = Statistics(TOKENS, torch.zeros(3, structure.num_units), x.T @ x, TOKENS)
        weight = torch.randn(HIDDEN, structure.width, generator=torch.Generator().manual_seed(9 + seed))
        found.append(module.Part(structure, weight, statistics, x.mean(0)))
    return found


def kept_parameters(parts: list[Any], cuts: list[Any]) -> int:
    return sum(len(cut.kept) * part.structure.parameters for part, cut in zip(parts, cuts, strict=True))


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("name", ["FLAP", "Wanda-sp-like"])
def test_the_budget_is_met_and_never_exceeded(module: Any, parts: list[Any], name: str, keep: float) -> None:
    total = sum(part.structure.num_units * part.structure.parameters for part in parts)
    kept = kept_parameters(parts, module.OPPONENTS[name](parts, keep))
    # No more than the largest unit is left over.
    assert keep * total - 40 <= kept <= keep * total


def test_flap_keeps_the_mean_output_and_ranks_means_of_standardised_columns(module: Any, parts: list[Any]) -> None:
    cuts, stay, gone = module.flap(parts, 0.6), list[float](), list[float]()
    for seed, (part, cut) in enumerate(zip(parts, cuts, strict=True)):
        x = inputs_of(seed, part.structure.width)
        columns = part.structure.columns_of(cut.kept)
        leaving = x[:, columns] @ part.weight[:, columns].T + cut.bias
        torch.testing.assert_close(leaving.mean(0), (x @ part.weight.T).mean(0))
        score = x.var(0, correction=0) * part.weight.square().sum(0)
        score = ((score - score.mean()) / score.std()).view(-1, part.structure.columns).mean(1)
        best = score.argsort(descending=True)[: len(cut.kept)].sort().values
        assert cut.kept.tolist() == best.tolist()
        stay += score[cut.kept].sort().values[:-1].tolist()
        gone += [value for unit, value in enumerate(score.tolist()) if unit not in cut.kept]
    # One threshold for all, but for the best unit, which each structure keeps.
    assert gone and min(stay) >= max(gone)


def test_wanda_cuts_every_layer_alike(module: Any, parts: list[Any]) -> None:
    cuts = module.wanda_sp(parts, 0.5)
    assert [len(cut.kept) for cut in cuts] == [2, 4, 2, 4]
    group = parts[0]
    scores = group.weight.abs().mean(0) * inputs_of(0, group.structure.width).norm(dim=0)
    best = scores.view(-1, COLUMNS).sum(1).argsort(descending=True)[:2].sort().values
    assert cuts[0].kept.tolist() == best.tolist()
