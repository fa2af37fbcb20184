"""The derived time budgets: up to date with the page, and their work is what the planner counts."""

import importlib
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from minisp.config import MinifyConfig
from minisp.phases import saliency
from minisp.phases.sizes import sizes_of
from minisp.plan.layout import Layout


@pytest.fixture
def budget(script: Any) -> Any:
    return script("gpu_budget")


def test_the_committed_page_is_what_the_shapes_give(budget: Any) -> None:
    assert budget.TARGET.read_text("utf-8") == budget.render(), "run: python benchmarks/gpu_budget.py"
    assert "**Nothing here was measured**" in budget.render()


@pytest.mark.parametrize("case", [0, 1])
def test_the_work_of_the_sweep_is_what_the_planner_counts(budget: Any, case: int) -> None:
    found = budget.CASES[case]
    with torch.device("meta"):
        model = LlamaForCausalLM(importlib.import_module("synthetic").llama_config(found.size))
    config = MinifyConfig(
        num_windows=budget.WINDOWS, window=budget.WINDOW, keep=budget.KEEP, allocation="score", correct_drift=False
    )
    segments = -(-model.config.num_hidden_layers // found.segment)
    layout = Layout(segment=found.segment, num_slots=2, stream_vocabulary=False, peaks={})
    counted = budget.work(found.size, segments)
    sizes = sizes_of(
        model, config=config, ranks=1, batch_tokens=512, item=2, stored_item=2, tokenizer=0, autograd=0, kept=1,
        logits=0, loaded=False, streams=True, writes=True,
    )  # fmt: skip
    planned = saliency.demand(sizes, layout).flops
    assert counted["products"] + counted["Gram"] == pytest.approx(planned, rel=1e-3)


def test_a_phase_takes_as_long_as_what_takes_longest(budget: Any) -> None:
    phase = budget.Phase("it", {"one": 2.0, "other": 3.0}, read=budget.RATES["disk read"])
    assert (phase.disk, phase.seconds) == (1.0, 5.0)
    assert budget.Phase("it", {"one": 2.0}, written=4 * budget.RATES["disk write"]).seconds == 4.0
