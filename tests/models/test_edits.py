"""Cutting a layer: what every parameter of every family becomes, against tables written down by hand."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from minisp.errors import UnsupportedModelError
from minisp.models.edits import Edit, apply_, edits_of, resize_, rewrite, tried
from minisp.models.families import ACTIVATIONS, activation_kind, family_of
from minisp.models.skeleton import KEYS, size_keys
from minisp.models.structures import Slice, Structure, mlp_weights, structures_of
from minisp.ops import reference
from tests.tiny import HIDDEN, LAYERS, MODEL_TYPES, VOCABULARY, WIDTH, tiny_model
from tests.toys import UNIT_AXES, down_of, layers_of

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = torch.tensor([1, 2, 5, 17, 40, 47])
# The families, and the one of them whose MLPs may have biases everywhere.
MODELS = [*((name, {}) for name in MODEL_TYPES), ("llama", {"mlp_bias": True})]
BIASED = {"mlp.gate_proj.bias": 0, "mlp.up_proj.bias": 0}


def axes_of(model_type: str, overrides: dict[str, Any]) -> dict[str, int]:
    return {**(BIASED if overrides else {}), **UNIT_AXES[model_type]}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 2 + 24).view(2, 12) % VOCABULARY
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(("model_type", "overrides"), MODELS)
def test_a_cut_layer_has_the_kept_units_and_the_new_columns(model_type: str, overrides: dict[str, Any]) -> None:
    model, whole = tiny_model(model_type, **overrides), tiny_model(model_type, **overrides)
    family, axes = family_of(model.config), axes_of(model_type, overrides)
    structure = structures_of(model, family)[1]
    new = torch.randn(HIDDEN, len(KEPT), dtype=torch.float64)
    layer, before = layers_of(model)[1], dict(layers_of(whole)[1].named_parameters())
    assert {part.parameter: part.axis for part in structure.slices} == axes
    assert structure.parameters == sum(before[name].numel() for name in axes) // WIDTH
    edits = edits_of(structure, KEPT, new)
    apply_(layer, edits)
    down = list(UNIT_AXES[model_type])[-1]
    for name, parameter in layer.named_parameters():
        if name == down:
            wanted = new.float() if axes[name] == 1 else new.float().T
        else:
            wanted = before[name][tuple([slice(None)] * axes[name] + [KEPT])] if name in axes else before[name]
        assert torch.equal(parameter, wanted) and parameter.is_contiguous(), name
        assert parameter.requires_grad and parameter.dtype == torch.float32
    assert torch.equal(down_of(model, 1), new.float())
    assert [x.num_units for x in structures_of(model, family)] == [WIDTH, len(KEPT), WIDTH]
    # Told of the shapes alone, or of the stored tensors, the edits say the same.
    for edit in edits:
        assert edit.shape_after(before[edit.parameter].shape) == layer.get_parameter(edit.parameter).shape
        assert torch.equal(edit.applied(before[edit.parameter].detach()), layer.get_parameter(edit.parameter))
    # A layer that was cut already stays as it is.
    once = {name: p.clone() for name, p in layer.named_parameters()}
    apply_(layer, edits)
    assert all(torch.equal(p, once[name]) for name, p in layer.named_parameters())
    # The modules know their sizes.
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, Conv1D):
            assert (module.nx, module.nf) == module.weight.shape
    for other in (0, 2):
        assert all(
            torch.equal(a, b)
            for a, b in zip(layers_of(model)[other].parameters(), layers_of(whole)[other].parameters(), strict=True)
        )


@pytest.mark.parametrize(("model_type", "overrides"), MODELS)
def test_a_cut_model_computes_what_zero_columns_compute(model_type: str, overrides: dict[str, Any]) -> None:
    model, masked = (tiny_model(model_type, **overrides).double() for _ in range(2))
    structures = structures_of(model, family_of(model.config))
    for layer in range(LAYERS):
        gone = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, KEPT, False)
        apply_(layers_of(model)[layer], edits_of(structures[layer], KEPT))
        down_of(masked, layer)[:, gone] = 0
    torch.testing.assert_close(logits(model), logits(masked))
    assert float((logits(model) - logits(tiny_model(model_type, **overrides).double())).abs().max()) > 0.1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_another_weight_is_there_for_a_block_only(model_type: str) -> None:
    model = tiny_model(model_type)
    family, layer = family_of(model.config), layers_of(model)[1]
    structure = structures_of(model, family)[1]
    before, new = down_of(model, 1).clone(), torch.randn(HIDDEN, WIDTH, dtype=torch.float64)
    dense = logits(model)
    with tried(layer, [rewrite(structure, new)]):
        assert torch.equal(down_of(model, 1), new.float()) and torch.equal(
            mlp_weights(layer, family.mlp).down, new.float()
        )
        assert float((logits(model) - dense).abs().max()) > 0.1
    assert torch.equal(down_of(model, 1), before) and torch.equal(logits(model), dense)
    with pytest.raises(KeyError), tried(layer, edits_of(structure, KEPT)):
        raise KeyError
    assert torch.equal(down_of(model, 1), before)


@pytest.mark.parametrize(("model_type", "overrides"), MODELS)
def test_the_tensors_of_an_mlp_are_what_it_computes_with(model_type: str, overrides: dict[str, Any]) -> None:
    model = tiny_model(model_type, **overrides)
    mlp, layer = family_of(model.config).mlp, layers_of(model)[0]
    weights = mlp_weights(layer, mlp)
    assert weights.up.shape == (WIDTH, HIDDEN) and weights.down.shape == (HIDDEN, WIDTH)
    assert (weights.gate is None) == (model_type in ("opt", "gpt2"))
    down_bias = layer.state_dict().get(f"{mlp.down}.bias")
    assert (weights.down_bias is None) == (down_bias is None)
    # An input of zeros leaves the biases alone.
    up = layer.get_submodule(mlp.up.module)
    assert (weights.up_bias is None) == (model_type not in ("opt", "gpt2") and not overrides)
    with torch.no_grad():
        torch.testing.assert_close(
            up(torch.eye(HIDDEN)), weights.up.T + (0 if weights.up_bias is None else weights.up_bias)
        )
        if weights.gate is not None:
            gate_bias = 0 if weights.gate_bias is None else weights.gate_bias
            torch.testing.assert_close(layer.mlp.gate_proj(torch.eye(HIDDEN)), weights.gate.T + gate_bias)
        down = layer.get_submodule(mlp.down)
        torch.testing.assert_close(down(torch.eye(WIDTH)), weights.down.T + (0 if down_bias is None else down_bias))


@pytest.mark.parametrize(("model_type", "overrides"), MODELS)
def test_a_resized_model_has_other_widths_and_nothing_else(model_type: str, overrides: dict[str, Any]) -> None:
    model, axes = tiny_model(model_type, **overrides), axes_of(model_type, overrides)
    family, widths = family_of(model.config), [7, WIDTH, 1]
    before = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers_of(model)]
    resize_(model, structures_of(model, family), widths)
    assert [x.num_units for x in structures_of(model, family)] == widths
    for layer, shapes, width in zip(layers_of(model), before, widths, strict=True):
        for name, parameter in layer.named_parameters():
            wanted = list(shapes[name])
            if name in axes:
                wanted[axes[name]] = width
            assert list(parameter.shape) == wanted, name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_widths_in_the_config_are_a_number_or_a_list(model_type: str) -> None:
    model = tiny_model(model_type)
    family = family_of(model.config)
    structures = structures_of(model, family)
    key = {"opt": "ffn_dim", "gpt2": "n_inner"}.get(model_type, "intermediate_size")
    assert size_keys(family, model.config, structures, [40, 40, 40]) == {key: 40}
    assert size_keys(family, model.config, structures, [40, 16, 44]) == {
        key: 44,
        KEYS["mlp"]: [40, 16, 44],
    }


# Two units of two columns each: in a fused parameter, its rows 4 to 7 and, alternating with others, its rows 0 and 2.
FUSED = (
    Slice("fused.weight", 0, size=2, start=4, stride=2),
    Slice("fused.weight", 0, start=0, stride=2),
    Slice("fused.weight", 0, start=1, stride=2),
    Slice("out.weight", 1, size=2, stride=2),
)


def test_slices_of_one_parameter_are_cut_together() -> None:
    structure = Structure(0, "toy", 2, 2, FUSED, "out", parameters=0)
    fused, out = edits_of(structure, torch.tensor([1]))
    assert (fused.parameter, fused.axis, out.parameter, out.axis) == ("fused.weight", 0, "out.weight", 1)
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    assert fused.applied(rows)[:, 0].tolist() == [2, 3, 6, 7] and fused.shape_after((8, 3)) == (4, 3)
    assert (
        structure.columns_of(torch.tensor([1])).tolist() == [2, 3] == out.applied(torch.arange(4.0)[None])[0].tolist()
    )
    assert (structure.width, structure.weight, structure.transposed) == (4, "out.weight", False)
    new = torch.tensor([[5.0, 6.0]])
    assert torch.equal(edits_of(structure, torch.tensor([1]), new)[1].applied(torch.zeros(1, 4)), new)


def test_an_edit_that_changes_nothing_gives_the_tensor_itself() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert Edit("w", 1, torch.arange(3)).applied(tensor) is tensor
    assert Edit("w", 1).applied(tensor) is tensor and Edit("w", 1).shape_after((2, 3)) == (2, 3)
    assert Edit("w", 0, value=torch.ones(2, 3, dtype=torch.float64)).applied(tensor).dtype == torch.float32


def test_a_given_weight_is_copied_and_an_edit_that_changes_nothing_leaves_the_parameter() -> None:
    layer, given = nn.ModuleDict({"out": nn.Linear(4, 3, bias=False)}), torch.ones(3, 4)
    before = layer.get_parameter("out.weight")
    apply_(layer, [Edit("out.weight", 1)])
    assert layer.get_parameter("out.weight") is before
    apply_(layer, [Edit("out.weight", 1, value=given)])
    layer.get_parameter("out.weight").data.zero_()
    assert bool((given == 1).all())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_is_transformers_own(name: str) -> None:
    config = tiny_model("llama", hidden_act=name).config
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    found = reference.activation(z, None, activation_kind(config, family_of(config)))
    # The exact and the approximate GELU differ by up to 5e-4.
    torch.testing.assert_close(found, ACT2FN[name](z), rtol=0, atol=1e-6)


def test_unknown_families_are_refused_and_unknown_activations_have_no_kind() -> None:
    config = tiny_model("llama").config
    config.hidden_act = "tanh"
    assert activation_kind(config, family_of(config)) is None
    config.model_type = "mamba"
    with pytest.raises(UnsupportedModelError, match=r"cohere2, gemma, .* got 'mamba'"):
        family_of(config)
