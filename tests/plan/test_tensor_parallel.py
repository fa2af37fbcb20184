"""Sizes for a server that spreads every layer over several devices: equal, aligned parts within the budget."""

from typing import Any

import pytest
import torch

from minisp import fast
from minisp.config import MinifyConfig
from minisp.errors import ConfigError
from minisp.methods.selection import default_alignment
from minisp.models.families import family_of
from minisp.models.structures import structures_of
from tests.tiny import WIDTH, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def cut(**options: Any) -> dict[str, list[int]]:
    """Sizes of the structures of a tiny model of 12 groups of heads after a run."""
    model = tiny_model("llama", hidden_size=24, num_attention_heads=12, num_key_value_heads=12, head_dim=2)
    ids = torch.randint(60, (4, 16), generator=torch.Generator().manual_seed(0))
    fast.minify(model, calibration=ids, dtype="float32", **options)
    found: dict[str, list[int]] = {"mlp": [], "attention": []}
    for structure in structures_of(model, family_of(model.config), ("mlp", "attention")):
        found[structure.name].append(structure.num_units)
    return found


@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
def test_every_device_gets_an_equal_aligned_part_within_the_budget(widths: str) -> None:
    found = cut(keep=0.6, widths=widths, alignment=4, tp=3)["mlp"]
    assert all(width % 12 == 0 for width in found)
    assert sum(found) <= 0.6 * 3 * WIDTH
    assert found != cut(keep=0.6, widths=widths, alignment=4)["mlp"]


def test_heads_are_shared_out_too() -> None:
    found = cut(keep=0.7, structures=("attention",), tp=4)["attention"]
    assert all(groups % 4 == 0 for groups in found) and sum(found) <= 0.7 * 36
    assert any(groups % 4 for groups in cut(keep=0.7, structures=("attention",))["attention"])


def test_the_plan_says_the_multiple() -> None:
    model = tiny_model("llama", intermediate_size=128)
    assert fast.plan(model, window=16, tp=3).alignment == 3 * default_alignment(128) == 12
    assert fast.plan(model, window=16, alignment=8, tp=2).alignment == 16


def test_degrees_that_leave_nothing_to_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"less than the largest layer width, 48, got 48.*smaller alignment or tp"):
        fast.plan(tiny_model("llama"), window=16, alignment=16, tp=3)
    with pytest.raises(ConfigError, match="Option tp: expected a whole number, at least 1, got 0"):
        MinifyConfig(tp=0)
