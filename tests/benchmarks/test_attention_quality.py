"""The benchmark of attention: every row of the table removes the same number of parameters of a tiny model."""

from pathlib import Path
from typing import Any

import pytest

from tests.heads import IDS, grouped
from tests.tiny import HIDDEN, LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_row_meets_its_budget(script: Any, tmp_path: Path) -> None:
    quality = script("attention_quality")
    model = grouped("mistral", num_attention_heads=6)
    run, means = quality.collect(model, IDS, tmp_path)
    cached, _ = quality.collect(model, IDS, tmp_path)
    for name in ("mlp", "attention", "queries"):
        (first, *_) = quality.Stream.from_module(model, (name,)).structures
        sums = [found.statistics(first, gram=True) for found in (run, cached)]
        assert sums[0].saliency.tolist() == sums[1].saliency.tolist()
    kit, parts = quality.Kit(model, run, [], IDS, {}), quality.look_at(model, run, means)
    whole = sum(p.numel() for p in model.parameters())
    total = whole - sum(p.numel() for p in model.model.embed_tokens.parameters())
    total -= 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    # No more than a group is left over.
    step = max(part.structure.parameters for part in parts)
    for name in (*quality.OURS, *quality.attention_opponents.OPPONENTS):
        row = quality.measure_row(kit, parts, name, 0.3)
        # FLAP adds a bias to each consumer.
        biases = 2 * LAYERS * HIDDEN if name == "FLAP" else 0
        lost = whole - row["parameters"] + biases
        assert 0.3 * total - 1e-6 <= lost <= 0.3 * total + step, name
        heads = row["kept"]["query heads"], row["kept"]["key heads"]
        if name == "minisp: MLPs and queries":
            assert heads[1] == 2 * LAYERS
        if name == "minisp: MLPs":
            assert heads == (6 * LAYERS, 2 * LAYERS)
