"""The linear maps of every family: none is missed, and what is told of them is what passes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minisp.models.families import decoder_layers, family_of
from minisp.models.maps import LinearMap, linear_maps, tapped
from minisp.models.skeleton import frozen
from minisp.models.structures import weight_view
from tests.tiny import LAYERS, MODEL_TYPES, OTHER_TYPES, tiny_model
from tests.toys import windows

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = (*MODEL_TYPES, *OTHER_TYPES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_linear_map_of_a_layer_is_found_in_the_order_of_its_computing(model_type: str) -> None:
    model = tiny_model(model_type)
    found = linear_maps(model, family_of(model.config))
    order: list[nn.Module] = []
    for index, layer in enumerate(decoder_layers(model, family_of(model.config))):
        modules = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        mine = [x for x in found if x.layer == index]
        assert {x.path for x in mine} == set(modules)
        for x in mine:
            assert (x.rows, x.columns) == weight_view(modules[x.path]).shape
            assert x.bias == (modules[x.path].bias is not None)
        for module in modules.values():
            module.register_forward_hook(lambda module, args, output: order.append(module))
    with torch.no_grad():
        model(input_ids=windows(1, 8), use_cache=False)
    layers = decoder_layers(model, family_of(model.config))
    first = {x.path: place for place, x in enumerate(found) if x.layer == 0}
    computed = [name for module in order for name, m in layers[0].named_modules() if m is module]
    # The families' own order of gate and up, or of query, key and value, may differ; maps behind each other do not.
    sources = [found[first[name]].source for name in computed]
    assert list(dict.fromkeys(sources)) == list(dict.fromkeys(x.source for x in found if x.layer == 0))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_told_is_what_passes_and_the_model_computes_the_same(model_type: str) -> None:
    model, ids = tiny_model(model_type), windows(2, 8)
    maps = linear_maps(model, family_of(model.config))
    layers = decoder_layers(model, family_of(model.config))
    inputs: dict[tuple[int, str], Tensor] = {}
    gradients: dict[tuple[int, str], Tensor] = {}

    def capture(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[key] = args[0].detach().flatten(0, -2)
            output.register_hook(lambda grad: gradients.__setitem__(key, grad.flatten(0, -2)))

        return hook

    hooks = [layers[x.layer].get_submodule(x.path).register_forward_hook(capture((x.layer, x.path))) for x in maps]
    expected = model(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    for hook in hooks:
        hook.remove()
    told: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}

    def tell(found: LinearMap, x: Tensor, grad_y: Tensor | None) -> None:
        told[found.layer, found.path] = (x.detach(), grad_y)

    with frozen(model):
        contexts = [tapped(layers[i], [x for x in maps if x.layer == i], tell) for i in range(LAYERS)]
        for context in contexts:
            context.__enter__()
        entering = model.get_input_embeddings()(ids).detach().requires_grad_()
        result = model(inputs_embeds=entering, labels=ids, use_cache=False)
        result.loss.backward()
        for context in contexts:
            context.__exit__(None, None, None)
    torch.testing.assert_close(result.logits, expected.logits)
    assert told.keys() == gradients.keys()
    for key, (x, grad_y) in told.items():
        torch.testing.assert_close(x, inputs[key])
        assert grad_y is not None
        torch.testing.assert_close(grad_y, gradients[key], rtol=1e-4, atol=1e-8)
    for x in maps:
        torch.testing.assert_close(inputs[x.layer, x.path], inputs[x.layer, x.source], rtol=0, atol=0)


def test_without_gradients_the_forward_tells() -> None:
    model, ids = tiny_model("llama"), windows(1, 8)
    maps = [x for x in linear_maps(model, family_of(model.config)) if x.layer == 1]
    told: list[tuple[str, tuple[int, ...], Tensor | None]] = []

    def tell(found: LinearMap, x: Tensor, grad_y: Tensor | None) -> None:
        told.append((found.path, tuple(x.shape), grad_y))

    with frozen(model), torch.no_grad(), tapped(decoder_layers(model, family_of(model.config))[1], maps, tell):
        model(input_ids=ids, use_cache=False)
    assert [(path, shape) for path, shape, _ in told] == [(x.path, (8, x.columns)) for x in maps]
    assert all(grad_y is None for _, _, grad_y in told)
