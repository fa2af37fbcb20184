"""Dead and duplicate units planted in a model of every family, and what `minify` makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minisp import fast
from tests.tiny import LAYERS, MODEL_TYPES, WIDTH, tiny_model
from tests.toys import down_of, layers_of, units_of, windows

pytestmark = pytest.mark.usefixtures("one_thread")

# Per layer the places of the dead units: as many as whole steps of four.
DEAD = ([3, 4, 20, 47], [0, 1, 2, 9, 30, 31, 45, 46], [11, 12, 13, 14])
TWINS = ((5, 30), (0, 47), (20, 21))
REFITS: tuple[dict[str, Any], ...] = ({}, {"correct_drift": False}, {"refit_on": "pruned"})


def planted_dead(model_type: str) -> Any:
    """A tiny model with units whose activation is always 0, though their other weights are large."""
    model = tiny_model(model_type)
    for layer, dead in enumerate(DEAD):
        *rows, columns = units_of(model, layer)
        # SiLU(gate) · 0; or ReLU(0) and GELU(0), where the bias is 0 too.
        for row in rows if model_type in ("opt", "gpt2") else rows[1:]:
            row[dead] = 0
        columns[dead] = 10.0
    return model


def planted_twins(model_type: str, pairs: dict[int, tuple[int, int]], size: float) -> Any:
    """A tiny model with pairs of equal units, by layer, whose columns are so much smaller than those of the others."""
    model = tiny_model(model_type)
    if model_type == "opt":
        # So that no other unit is dead by chance.
        for layer in range(LAYERS):
            units_of(model, layer)[1].add_(1)
    for layer, (first, second) in pairs.items():
        *rows, columns = units_of(model, layer)
        columns[first] *= size
        for view in (*rows, columns):
            view[second] = view[first]
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits.double()
    return found


@pytest.mark.parametrize("refit", REFITS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_dead_units_go_first_and_are_free(model_type: str, refit: dict[str, Any]) -> None:
    ids, model, before = windows(), planted_dead(model_type), planted_dead(model_type)
    dead = sum(map(len, DEAD))
    keep = 1 - dead / (LAYERS * WIDTH)
    report = fast.minify(model, keep=keep, calibration=ids, **refit, alignment=4)
    for layer, (kept, gone) in enumerate(zip(report.kept, DEAD, strict=True)):
        assert sorted(set(range(WIDTH)) - set(kept.tolist())) == gone
        assert report.layers[layer].residual == report.layers[layer].residual_sliced == 0
        if refit:
            # What is left is bit for bit what it was; a correction would make up for rounding too.
            assert torch.equal(down_of(model, layer), down_of(before, layer)[:, kept])
    torch.testing.assert_close(logits(model, ids), logits(before, ids), rtol=0, atol=2e-4)
    assert len(layers_of(model)) == LAYERS


@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
@pytest.mark.parametrize("saliency", ["taylor", "fisher", "signed"])
def test_whatever_the_score_a_dead_unit_goes_before_any_other(saliency: str, widths: str) -> None:
    for fewer in (1, 3):
        model = planted_dead("llama")
        report = fast.minify(
            model, keep=1 - LAYERS * fewer / (LAYERS * WIDTH), calibration=windows(), saliency=saliency,
            widths=widths, alignment=1,
        )  # fmt: skip
        gone = [sorted(set(range(WIDTH)) - set(kept.tolist())) for kept in report.kept]
        assert sum(map(len, gone)) == LAYERS * fewer
        assert all(set(units) <= set(dead) for units, dead in zip(gone, DEAD, strict=True))


@pytest.mark.parametrize("refit", REFITS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_of_equal_units_one_goes_and_the_refit_restores_the_output(model_type: str, refit: dict[str, Any]) -> None:
    ids, pairs = windows(), dict(enumerate(TWINS))
    wanted = logits(planted_twins(model_type, pairs, 0.05), ids)
    change = {}
    for reconstruct in (False, True):
        model = planted_twins(model_type, pairs, 0.05)
        report = fast.minify(
            model, keep=1 - 1 / WIDTH, calibration=ids, **refit, widths="uniform", alignment=1, damping=1e-6,
            reconstruct=reconstruct,
        )  # fmt: skip
        for kept, twins in zip(report.kept, TWINS, strict=True):
            (gone,) = set(range(WIDTH)) - set(kept.tolist())
            assert gone in twins
        change[reconstruct] = float((logits(model, ids) - wanted).norm() / wanted.norm())
    assert change[False] > 1e-3 and change[True] < 0.02 * change[False]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_twin_that_stays_takes_over_the_column(model_type: str) -> None:
    layer, (first, second) = 1, TWINS[0]
    model, before = (planted_twins(model_type, {layer: (first, second)}, 0.02) for _ in range(2))
    keep = 1 - 1 / (LAYERS * WIDTH)
    report = fast.minify(model, keep=keep, calibration=windows(), correct_drift=False, alignment=1, damping=1e-6)
    # The one unit that goes of all layers is one of the two, whose columns are the smallest.
    assert [len(kept) for kept in report.kept] == [WIDTH, WIDTH - 1, WIDTH]
    kept = report.kept[layer].tolist()
    (gone,) = set(range(WIDTH)) - set(kept)
    assert gone in (first, second)
    wanted = down_of(before, layer)[:, kept].clone()
    wanted[:, kept.index(first + second - gone)] *= 2
    torch.testing.assert_close(down_of(model, layer), wanted, rtol=1e-2, atol=2e-5)
    assert report.layers[layer].residual < 0.02 * report.layers[layer].residual_sliced
