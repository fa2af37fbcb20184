"""The curvature sweep against plain autograd, and what the factors that it leaves are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minisp.config import MinifyConfig
from minisp.methods.curvature import Curvature
from minisp.models.families import decoder_layers, family_of
from minisp.models.maps import LinearMap, linear_maps
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.models.structures import weight_view
from minisp.phases.batches import Batches
from minisp.phases.boundaries import Sweep
from minisp.phases.curvature import curvature_sweep, curvatures, factor_name, input_factor
from minisp.phases.run import Run
from tests.tiny import LAYERS, MODEL_TYPES, OTHER_TYPES, tiny_model
from tests.toys import windows

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CONFIG = MinifyConfig(method="surgeon", pattern="unstructured", damping=0.05, gradient_damping=0.1)


def swept(model: Any, ids: Tensor, *, scored: bool = True, segment: int = LAYERS) -> tuple[Run, list[LinearMap]]:
    run, stream = Run.in_memory(), Stream.from_module(model)
    maps = linear_maps(model, family_of(model.config))
    batches = Batches(ids.split(2), [scored] * len(ids.split(2)), 0)
    segments = [range(i, min(i + segment, LAYERS)) for i in range(0, LAYERS, segment)]
    with frozen(model):
        curvature_sweep(Sweep(stream, batches, run, Objective(), unscored=True), segments, maps, 0)
    return run, maps


def expected_sums(model: Any, ids: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """(layer, path) → Σ [a; 1] [a; 1]ᵀ and Σ g gᵀ of the summed next-token loss, from hooks and a backward."""
    sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    handles = []

    def capture(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            a = args[0].detach().flatten(0, -2)
            a = torch.cat([a, torch.ones(len(a), 1)], 1)

            def receive(grad: Tensor) -> None:
                g = grad.flatten(0, -2)
                sums[key] = (a.T @ a, g.T @ g)

            output.register_hook(receive)

        return hook

    for x in linear_maps(model, family_of(model.config)):
        module = decoder_layers(model, family_of(model.config))[x.layer].get_submodule(x.path)
        handles.append(module.register_forward_hook(capture((x.layer, x.path))))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *OTHER_TYPES])
def test_the_sums_are_those_of_autograd(model_type: str) -> None:
    model, ids = tiny_model(model_type), windows(4, 16)
    expected = expected_sums(model, ids)
    run, maps = swept(model, ids)
    for found, curvature in curvatures(run, maps, 0, CONFIG, CPU):
        a, g = expected[found.layer, found.path]
        a = a if found.bias else a[:-1, :-1]
        scale = float(a.diagonal().mean() * g.diagonal().mean()) / ids.numel()
        assert curvature.scale == pytest.approx(scale, rel=1e-4)
        for factor, total, damping in ((curvature.inputs, a, 0.05), (curvature.gradients, g, 0.1)):
            damped = total / total.diagonal().mean()
            damped.diagonal()[total.diagonal() > 0] += damping
            torch.testing.assert_close(factor.matrix, damped, rtol=1e-3, atol=1e-4 * float(damped.abs().max()))


def test_segments_change_nothing() -> None:
    model, ids = tiny_model("llama"), windows(4, 16)
    whole, maps = swept(model, ids)
    parts, _ = swept(model, ids, segment=1)
    for found in maps:
        for tap in (found.input, found.output_gradient):
            name = factor_name(tap, 0)
            for key in whole.shared.keys(name):
                torch.testing.assert_close(whole.shared.read(name, key), parts.shared.read(name, key), rtol=0, atol=0)


def test_without_gradients_only_inputs_are_summed() -> None:
    model, ids = tiny_model("qwen2"), windows(4, 16)
    with_gradients, maps = swept(model, ids)
    without, _ = swept(model, ids, scored=False)
    for found in maps:
        assert not without.shared.has(factor_name(found.output_gradient, 0))
        own = input_factor(without, found, 0, CONFIG, CPU)
        torch.testing.assert_close(own.matrix, input_factor(with_gradients, found, 0, CONFIG, CPU).matrix)
        assert len(own.matrix) == found.columns + found.bias
        assert len(input_factor(without, found, 0, CONFIG, CPU, bias=False).matrix) == found.columns


def test_the_quadratic_model_estimates_the_true_fisher_cost_of_a_small_change() -> None:
    """½ tr(G ΔW A ΔWᵀ) against Σ_t (gᵀ ΔW a)² / 2 of the same tokens: equal if a and g are independent."""
    model, ids = tiny_model("llama"), windows(8, 16)
    run, maps = swept(model, ids)
    found = next(x for x in maps if x.layer == 1 and x.path == "mlp.up_proj")
    config = MinifyConfig(method="surgeon", pattern="unstructured", damping=1e-9, gradient_damping=1e-9)
    curvature: Curvature = dict(
        (x.path, c) for x, c in curvatures(run, [x for x in maps if x.layer == 1], 0, config, CPU)
    )["mlp.up_proj"]
    weight = weight_view(decoder_layers(model, family_of(model.config))[1].get_submodule(found.path))
    generator, ratios = torch.Generator().manual_seed(0), []
    captured: list[Tensor] = []
    module = decoder_layers(model, family_of(model.config))[1].get_submodule(found.path)

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        captured.append(args[0].detach().flatten(0, -2))
        output.register_hook(lambda grad: captured.append(grad.flatten(0, -2)))

    handle = module.register_forward_hook(hook)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    a, g = captured
    for _ in range(20):
        change = torch.randn(weight.shape, generator=generator)
        exact = 0.5 * float(((a @ change.T) * g).sum(1).square().sum())
        gradients, inputs = curvature.gradients.matrix, curvature.inputs.matrix
        estimated = 0.5 * curvature.scale * float(((gradients @ change @ inputs) * change).sum())
        ratios.append(estimated / exact)
    assert 0.5 < sum(ratios) / len(ratios) < 2
