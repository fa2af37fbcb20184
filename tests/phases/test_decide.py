"""What the Surgeon decides for whole units: costs against the definition, and what they must not depend on."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minisp import fast
from minisp.config import MinifyConfig
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.phases.batches import Batches
from minisp.phases.decide import decide
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep
from tests.tiny import HIDDEN, LAYERS, MODEL_TYPES, WIDTH, tiny_model
from tests.toys import down_of, layers_of, units_of, windows

FEW = "ignore:.* calibration tokens are few:UserWarning"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(FEW)]
IDS = windows(6, 16)


def swept(model: Any) -> tuple[Stream, Run]:
    stream, run = Stream.from_module(model), Run.in_memory()
    with frozen(model):
        segments = [range(LAYERS)]
        saliency_sweep(stream, Batches.scoring(IDS.split(2)), segments, run, gram=True, gradients=True)
    return stream, run


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_at_the_output_are_those_of_autograd(model_type: str) -> None:
    model = tiny_model(model_type)
    expected: dict[int, Tensor] = {}
    stream, run = swept(model)
    for structure in stream.structures:
        consumer = stream.layers[structure.layer].get_submodule(structure.consumer)

        def capture(module: Any, args: Any, output: Tensor, layer: int = structure.layer) -> None:
            output.register_hook(lambda grad: expected.__setitem__(layer, grad.flatten(0, -2)))

        consumer.register_forward_hook(capture)
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for structure in stream.structures:
        found = run.statistics(structure, gram=True, outputs=HIDDEN)
        g = expected[structure.layer]
        assert found.gradients is not None
        torch.testing.assert_close(found.gradients, g.T @ g, rtol=1e-3, atol=1e-4 * float((g.T @ g).abs().max()))


def test_the_units_that_go_cost_least_by_the_definition() -> None:
    """½ W_cᵀ G W_c / [A⁻¹]_cc with both factors damped, in float64."""
    model = tiny_model("llama")
    stream, run = swept(model)
    config = MinifyConfig(method="surgeon", keep=0.6, alignment=1, min_keep=0.0)
    kept = decide(stream, IDS, config, run)
    costs = []
    for structure in stream.structures:
        found = run.statistics(structure, gram=True, outputs=HIDDEN)
        assert found.gram is not None and found.gradients is not None
        a, g = found.gram.double(), found.gradients.double()
        a += 0.05 * a.diagonal().mean() * torch.eye(WIDTH)
        g += 0.1 * g.diagonal().mean() * torch.eye(HIDDEN)
        weight = down_of(model, structure.layer).double()
        costs.append(0.5 * (weight * (g @ weight)).sum(0) / torch.linalg.inv(a).diagonal())
    every = torch.cat(costs)
    count = sum(len(units) for units in kept)
    assert count == int(0.6 * LAYERS * WIDTH)
    cheapest = every.sort(descending=True).values[count - 1]
    for units, cost in zip(kept, costs, strict=True):
        assert units.tolist() == (cost >= cheapest * (1 - 1e-5)).nonzero().flatten().tolist()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_dead_unit_and_one_of_two_equal_units_go_first(model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.no_grad():
        for part in units_of(model, 1)[:-1]:
            part[5] = 0
            part[7] = part[6]
        units_of(model, 1)[-1][7] = units_of(model, 1)[-1][6]
    before = model(IDS).logits
    options: dict[str, Any] = {"alignment": 1, "method": "surgeon", "damping": 1e-6, "correct_drift": False}
    keep = 1 - 2 / (LAYERS * WIDTH)
    report = fast.minify(model, calibration=IDS, keep=keep, **options)
    gone = set(range(WIDTH)) - set(report.kept[1].tolist())
    assert 5 in gone and len(gone & {6, 7}) == 1 and len(gone) == 2
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-3)


def test_attention_groups_and_units_share_one_budget() -> None:
    report = fast.minify(
        tiny_model("gpt2"), calibration=IDS, keep=0.7, method="surgeon", structures=("mlp", "attention"), alignment=1
    )
    left = report.plan.cuttable - (report.plan.parameters - report.parameters)
    assert 0.6 * report.plan.cuttable < left <= 0.7 * report.plan.cuttable
    assert len(layers_of(report.model)) == LAYERS
