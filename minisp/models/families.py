"""Model families: one row of data each, and the few functions that read a model through its row.

A unit of an MLP is one row of `up` (and of `gate`, where there is one) and one column of `down`. GPT-2 stores its
weights transposed (`Conv1D`); `weight_view` shows every weight as (out, in), so nothing else has to care.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minisp.errors import UnsupportedModelError

CausalLM: TypeAlias = Any
"""A transformers causal language model; its `config` and forward carry no static types."""

WIDTHS_KEY = "minisp_widths"
"""Key in config.json that lists every layer's width where they differ."""


@dataclass(frozen=True)
class Architecture:
    """Where one family keeps its MLPs.

    Attributes:
        model_types: the `model_type` values of config.json that this row serves.
        layers: path of the decoder layers inside the base model.
        gate, up, down: paths inside a layer; `gate` is None for a plain MLP, whose activation acts on `up`.
        mlp: path of the module whose forward is the whole MLP; None where the layer itself calls the parts.
        inline_activation: where `mlp` is None, path of the activation module that the layer calls between the parts.
        width_key, activation_key: names of the width and of the activation in the config.
    """

    model_types: tuple[str, ...]
    layers: str
    up: str
    down: str
    width_key: str
    activation_key: str
    gate: str | None = None
    mlp: str | None = None
    inline_activation: str | None = None

    @property
    def row_modules(self) -> tuple[str, ...]:
        """Paths of the modules whose output rows are units."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        layers="layers",
        mlp="mlp",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        width_key="intermediate_size",
        activation_key="hidden_act",
    ),
    Architecture(
        model_types=("opt",),
        layers="decoder.layers",
        inline_activation="activation_fn",
        up="fc1",
        down="fc2",
        width_key="ffn_dim",
        activation_key="activation_function",
    ),
    Architecture(
        model_types=("gpt2",),
        layers="h",
        mlp="mlp",
        up="mlp.c_fc",
        down="mlp.c_proj",
        width_key="n_inner",
        activation_key="activation_function",
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
    return sorted(name for row in ARCHITECTURES for name in row.model_types)


def architecture_of(config: Any) -> Architecture:
    """The row for a transformers config.

    Raises:
        UnsupportedModelError: unknown family (the message lists the known ones) or unknown activation.
    """
    for row in ARCHITECTURES:
        if config.model_type in row.model_types:
            activation_kind(config, row)
            return row
    raise UnsupportedModelError(
        f"Model family: expected one of {', '.join(known_model_types())}, got {config.model_type!r}. "
        "Pass a model of a known family, or add a row to minisp/models/families.py."
    )


def activation_kind(config: Any, row: Architecture) -> str:
    """The engine's name of the MLP activation (see `minisp.ops.reference.activation`)."""
    name = getattr(config, row.activation_key)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"MLP activation: expected one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}. "
            "This activation has no derivative in the engine yet."
        )
    return ACTIVATIONS[name]


def decoder_layers(model: CausalLM, row: Architecture) -> nn.ModuleList:
    """The list of decoder layers of a causal language model."""
    layers = model.get_submodule(layers_path(model, row))
    assert isinstance(layers, nn.ModuleList)
    return layers


def layers_path(model: CausalLM, row: Architecture) -> str:
    """Path of the decoder layers from the causal language model, such as `model.layers`."""
    return f"{model.base_model_prefix}.{row.layers}"


def weight_view(module: nn.Module) -> Tensor:
    """The weight of a linear map as (out, in), whichever way the module stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


@dataclass(frozen=True)
class MlpWeights:
    """The tensors of one MLP: gate and up (m, d), down (d, m), biases or None; `gate` is None for a plain MLP."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def mlp_weights(layer: nn.Module, row: Architecture) -> MlpWeights:
    """Views of a layer's MLP tensors; nothing is copied."""
    gate = layer.get_submodule(row.gate) if row.gate else None
    up, down = layer.get_submodule(row.up), layer.get_submodule(row.down)
    return MlpWeights(
        gate=weight_view(gate) if gate is not None else None,
        up=weight_view(up),
        down=weight_view(down),
        gate_bias=getattr(gate, "bias", None),
        up_bias=getattr(up, "bias", None),
        down_bias=getattr(down, "bias", None),
    )


def unit_axes(layer: nn.Module, row: Architecture) -> dict[str, int]:
    """Which axis of which parameter of a layer runs over units, by parameter name inside the layer."""
    axes: dict[str, int] = {}
    for path in row.row_modules:
        module = layer.get_submodule(path)
        axes[f"{path}.weight"] = 1 if isinstance(module, Conv1D) else 0
        if getattr(module, "bias", None) is not None:
            axes[f"{path}.bias"] = 0
    axes[f"{row.down}.weight"] = 0 if isinstance(layer.get_submodule(row.down), Conv1D) else 1
    return axes


def layer_widths(model: CausalLM, row: Architecture) -> list[int]:
    """The width m of every layer."""
    return [mlp_weights(layer, row).up.shape[0] for layer in decoder_layers(model, row)]


def resize_(model: CausalLM, row: Architecture, widths: Sequence[int]) -> None:
    """Give every layer its width, with uninitialised parameters on the device and in the dtype they had."""
    for layer, width in zip(decoder_layers(model, row), widths, strict=True):
        axes = unit_axes(layer, row)
        for name, axis in axes.items():
            parameter = layer.get_parameter(name)
            shape = list(parameter.shape)
            shape[axis] = width
            replace_parameter_(layer, name, torch.empty(shape, dtype=parameter.dtype, device=parameter.device))


def cut_(layer: nn.Module, row: Architecture, kept: Tensor, new_down: Tensor) -> None:
    """Cut a layer in place down to the kept units (n,), with `new_down` (d, n) as its down projection.

    A layer that has n units already was cut to these before, and only gets its new down projection.
    """
    for name, axis in unit_axes(layer, row).items():
        parameter = layer.get_parameter(name)
        if name == f"{row.down}.weight":
            value = (new_down if axis == 1 else new_down.T).to(parameter.dtype, copy=True).contiguous()
        elif parameter.shape[axis] == len(kept):
            continue
        else:
            value = parameter.detach().index_select(axis, kept.to(parameter.device))
        replace_parameter_(layer, name, value)


@contextmanager
def other_down(layer: nn.Module, row: Architecture, down: Tensor) -> Iterator[None]:
    """Within the block, the layer's down projection is `down` (d, m)."""
    name = f"{row.down}.weight"
    axis = unit_axes(layer, row)[name]
    before = layer.get_parameter(name).data
    replace_parameter_(layer, name, (down if axis == 1 else down.T).to(before.dtype).contiguous())
    try:
        yield
    finally:
        replace_parameter_(layer, name, before)


def record_widths_(model: CausalLM, row: Architecture, widths: Sequence[int]) -> None:
    """Write the widths into the model's config: one number where all are equal, the list where they differ."""
    setattr(model.config, row.width_key, max(widths))
    if len(set(widths)) > 1:
        setattr(model.config, WIDTHS_KEY, list(widths))


def replace_parameter_(layer: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in a parameter's place and tell the module its new size."""
    path, _, leaf = name.rpartition(".")
    module = layer.get_submodule(path)
    old = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
