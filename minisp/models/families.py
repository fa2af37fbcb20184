"""Model families: one row of data each, and the functions that read a model through its row.

A unit of an MLP is one row of `up` (and of `gate`, where there is one) and one column of `down`. GPT-2 stores its
weights transposed (`Conv1D`); `weight_view` shows every weight as (out, in), so nothing else has to care.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minisp.errors import UnsupportedModelError
from minisp.models.edits import edits_of, replace_parameter_
from minisp.models.structures import Slice, Structure

CausalLM: TypeAlias = Any
"""A transformers causal language model; its `config` and forward carry no static types."""

WIDTHS_KEY = "minisp_widths"
"""Key in config.json that lists every layer's MLP width where they differ."""


@dataclass(frozen=True)
class Rows:
    """Rows of a linear map that are units, one each: all of its rows, or one of several equal parts of them.

    Attributes:
        module: path in the layer.
        part, parts: as in 0 of 2, the first half.
    """

    module: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Mlp:
    """Where one family keeps its MLPs.

    Attributes:
        up: what makes the units; the activation acts on it where there is no gate.
        down: path in the layer of the linear map that reads the units.
        gate: what else makes the units: the activation acts on it, and the result is multiplied with `up`.
        module: path of the module whose forward is the whole MLP; None where the layer itself calls the parts.
        inline_activation: where `module` is None, path of the activation that the layer calls between the parts.
        width_key, activation_key: names of the width and of the activation in the config.
    """

    up: Rows
    down: str
    gate: Rows | None = None
    module: str | None = "mlp"
    inline_activation: str | None = None
    width_key: str = "intermediate_size"
    activation_key: str = "hidden_act"

    @property
    def writers(self) -> tuple[Rows, ...]:
        """What makes the units."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class Family:
    """One row: which models it serves, and where they keep what can be removed.

    Attributes:
        model_types: the `model_type` values of config.json.
        mlp: where the MLPs are.
        layers: path of the decoder layers inside the base model.
    """

    model_types: tuple[str, ...]
    mlp: Mlp
    layers: str = "layers"


FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=(
            "cohere2",
            "gemma",
            "granite",
            "llama",
            "mistral",
            "olmo2",
            "qwen2",
            "qwen3",
            "smollm3",
            "stablelm",
        ),
        mlp=Mlp(gate=Rows("mlp.gate_proj"), up=Rows("mlp.up_proj"), down="mlp.down_proj"),
    ),
    Family(
        model_types=("gemma2", "gemma3_text"),
        mlp=Mlp(
            gate=Rows("mlp.gate_proj"),
            up=Rows("mlp.up_proj"),
            down="mlp.down_proj",
            activation_key="hidden_activation",
        ),
    ),
    Family(
        model_types=("glm4", "phi3"),
        mlp=Mlp(
            gate=Rows("mlp.gate_up_proj", part=0, parts=2),
            up=Rows("mlp.gate_up_proj", part=1, parts=2),
            down="mlp.down_proj",
        ),
    ),
    Family(model_types=("starcoder2",), mlp=Mlp(up=Rows("mlp.c_fc"), down="mlp.c_proj")),
    Family(model_types=("gpt_neox",), mlp=Mlp(up=Rows("mlp.dense_h_to_4h"), down="mlp.dense_4h_to_h")),
    Family(
        model_types=("opt",),
        layers="decoder.layers",
        mlp=Mlp(
            up=Rows("fc1"),
            down="fc2",
            module=None,
            inline_activation="activation_fn",
            width_key="ffn_dim",
            activation_key="activation_function",
        ),
    ),
    Family(
        model_types=("gpt2",),
        layers="h",
        mlp=Mlp(
            up=Rows("mlp.c_fc"),
            down="mlp.c_proj",
            width_key="n_inner",
            activation_key="activation_function",
        ),
    ),
)

# transformers' names of the activations that the engine has closed-form derivatives of.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def known_model_types() -> list[str]:
    """All `model_type` values that can be minified, sorted."""
    return sorted(name for family in FAMILIES for name in family.model_types)


def family_of(config: Any) -> Family:
    """The row for a transformers config.

    Raises:
        UnsupportedModelError: unknown family; the message lists the known ones.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise UnsupportedModelError(
        f"Model family: expected one of {', '.join(known_model_types())}, got {config.model_type!r}. "
        "Pass a model of a known family, or add a row to minisp/models/families.py."
    )


def activation_kind(config: Any, family: Family) -> str | None:
    """The engine's name of the MLP activation (see `minisp.ops.reference.activation`); None where it has none."""
    return ACTIVATIONS.get(getattr(config, family.mlp.activation_key))


def decoder_layers(model: CausalLM, family: Family) -> nn.ModuleList:
    """The list of decoder layers of a causal language model."""
    layers = model.get_submodule(layers_path(model, family))
    assert isinstance(layers, nn.ModuleList)
    return layers


def layers_path(model: CausalLM, family: Family) -> str:
    """Path of the decoder layers from the causal language model, such as `model.layers`."""
    return f"{model.base_model_prefix}.{family.layers}"


def weight_view(module: nn.Module) -> Tensor:
    """The weight of a linear map as (out, in), whichever way the module stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def structures_of(model: CausalLM, family: Family) -> list[Structure]:
    """The structures of a model, whose weights may be on the meta device, in the order in which they compute."""
    return [mlp_structure(layer, index, family.mlp) for index, layer in enumerate(decoder_layers(model, family))]


def mlp_structure(layer: nn.Module, index: int, mlp: Mlp) -> Structure:
    """The MLP of a layer: one unit is a row of each writer, with its bias, and a column of `down`."""
    down = layer.get_submodule(mlp.down)
    units = weight_view(down).shape[1]
    slices, parameters = [], 0
    for rows in mlp.writers:
        module = layer.get_submodule(rows.module)
        slices.append(Slice(f"{rows.module}.weight", 1 if isinstance(module, Conv1D) else 0, start=rows.part * units))
        parameters += weight_view(module).shape[1]
        if getattr(module, "bias", None) is not None:
            slices.append(Slice(f"{rows.module}.bias", 0, start=rows.part * units))
            parameters += 1
    slices.append(Slice(f"{mlp.down}.weight", 0 if isinstance(down, Conv1D) else 1))
    parameters += len(weight_view(down))
    return Structure(index, "mlp", units, 1, tuple(slices), mlp.down, parameters)


@dataclass(frozen=True)
class MlpWeights:
    """The tensors of one MLP: gate and up (m, d), down (d, m), biases or None; `gate` is None for a plain MLP."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def mlp_weights(layer: nn.Module, mlp: Mlp) -> MlpWeights:
    """Views of a layer's MLP tensors; nothing is copied."""
    down = layer.get_submodule(mlp.down)
    gate, gate_bias = _rows(layer, mlp.gate) if mlp.gate is not None else (None, None)
    up, up_bias = _rows(layer, mlp.up)
    return MlpWeights(gate, up, weight_view(down), gate_bias, up_bias, getattr(down, "bias", None))


def _rows(layer: nn.Module, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Weight (m, d) and bias (m,), or None, of the rows of a linear map that are units."""
    module = layer.get_submodule(rows.module)
    weight, bias = weight_view(module), getattr(module, "bias", None)
    if rows.parts == 1:
        return weight, bias
    part = slice(rows.part * len(weight) // rows.parts, (rows.part + 1) * len(weight) // rows.parts)
    return weight[part], bias[part] if bias is not None else None


def resize_(model: CausalLM, structures: Sequence[Structure], sizes: Sequence[int]) -> None:
    """Give every structure its number of units, with uninitialised parameters where and of the type that they were."""
    layers = decoder_layers(model, family_of(model.config))
    for structure, size in zip(structures, sizes, strict=True):
        layer = layers[structure.layer]
        for edit in edits_of(structure, torch.arange(size)):
            old = layer.get_parameter(edit.parameter)
            new = torch.empty(edit.shape_after(old.shape), dtype=old.dtype, device=old.device)
            replace_parameter_(layer, edit.parameter, new)


def size_keys(family: Family, sizes: Sequence[int]) -> Mapping[str, Any]:
    """What config.json says of the layers' widths: one number where all are equal, and the list where they differ."""
    keys: dict[str, Any] = {family.mlp.width_key: max(sizes)}
    return keys if len(set(sizes)) == 1 else {**keys, WIDTHS_KEY: list(sizes)}
