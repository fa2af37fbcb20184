"""What can be removed from a model: structures, which are units of one layer with all that writes and reads them.

A structure knows where its units lie in the parameters of its layer (`Slice`), and which linear map reads them (the
consumer, whose input is watched and whose weight is refitted). Scores, budget, refit and writer know nothing else.

Shapes: u units of c columns each; W (d, u·c) is the consumer's weight, X (T, u·c) its input. H query heads, H_kv key
heads of D dimensions. GPT-2 stores its weights transposed (`Conv1D`): an axis is always the stored one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minisp.errors import UnsupportedModelError
from minisp.models.families import Attention, CausalLM, Family, Mlp, Rows, decoder_layers, family_of

# What a person calls the units of each kind of structure.
UNITS = {"mlp": "MLP units", "attention": "attention groups", "queries": "query heads"}


@dataclass(frozen=True)
class Slice:
    """Where the units of a structure lie in one parameter of a layer. Together, its slices cover the parameter's axis.

    Attributes:
        parameter: as the layer names it, such as "mlp.up_proj.weight".
        axis: the axis of the stored parameter that runs over units.
        size: neighbouring places of one unit.
        start: first place of the first unit.
        stride: places from the start of a unit to the start of the next one; 0 where they are no unit's own and stay.
    """

    parameter: str
    axis: int
    size: int = 1
    start: int = 0
    stride: int = 1

    def places(self, units: Tensor) -> Tensor:
        """The places (n·size,) int64 of units (n,) int64, in the order of the units."""
        firsts = self.start + self.stride * units
        return (firsts[:, None] + torch.arange(self.size, device=units.device)).flatten()


@dataclass(frozen=True)
class Structure:
    """Units of one layer that can be removed.

    Attributes:
        layer: index of the layer.
        name: unique in its layer, such as "mlp".
        num_units: u.
        columns: c, the columns of the consumer's weight that read one unit.
        slices: where the units lie, the consumer's weight included.
        consumer: path in the layer of the linear map that reads the units.
        parameters: of one unit, in all slices.
        head_dim: D, of attention; 0 of an MLP.
        groups: the units are so many equal runs, which keep equally many units.
    """

    layer: int
    name: str
    num_units: int
    columns: int
    slices: tuple[Slice, ...]
    consumer: str
    parameters: int
    head_dim: int = 0
    groups: int = 1

    def __str__(self) -> str:
        return f"Layer {self.layer}, {self.name}"

    @property
    def weight(self) -> str:
        """The name of the consumer's weight among the layer's parameters."""
        return f"{self.consumer}.weight"

    @property
    def width(self) -> int:
        """u·c, the inputs of the consumer."""
        return self.num_units * self.columns

    @property
    def transposed(self) -> bool:
        """Whether the consumer's weight is stored as (u·c, d)."""
        return self.consumer_slice.axis == 0

    @cached_property
    def consumer_slice(self) -> Slice:
        """The slice of the consumer's weight."""
        return next(place for place in self.slices if place.parameter == self.weight)

    def heads(self, units: int) -> tuple[int, int]:
        """H and H_kv of an attention that keeps so many units."""
        queries = units * self.columns // self.head_dim
        return queries, units if self.name == "attention" else self.groups

    def columns_of(self, kept: Tensor) -> Tensor:
        """The columns (n·c,) int64 of the consumer's weight that read the units kept (n,)."""
        return self.consumer_slice.places(kept)


def structures_of(model: CausalLM, family: Family, names: Sequence[str] = ("mlp",)) -> list[Structure]:
    """The structures of a model, whose weights may be on the meta device, in the order in which they compute.

    Args:
        names: "mlp", and of "attention" and "queries" one at most.

    Raises:
        UnsupportedModelError: attention whose heads have norms of their own; queries where each has a key of its own.
    """
    order = [name for name in ("attention", "queries", "mlp") if name in names]
    layers = enumerate(decoder_layers(model, family))
    found = [structure_in(layer, index, name, family, model.config) for index, layer in layers for name in order]
    queries = [x for x in found if x.name == "queries"]
    if queries and all(x.num_units == x.groups for x in queries):
        raise UnsupportedModelError(
            "Structure queries: expected several query heads for a key head, got one for each. Use attention, which "
            "removes a key head, its value head and its query head together."
        )
    return found


def structure_in(layer: nn.Module, index: int, name: str, family: Family, config: Any) -> Structure:
    """The structure of this name in a layer.

    Raises:
        UnsupportedModelError: attention whose heads have norms of their own.
    """
    if name == "mlp":
        return mlp_structure(layer, index, family.mlp)
    make = attention_structure if name == "attention" else queries_structure
    return make(layer, index, family.attention, config)


def mlp_structure(layer: nn.Module, index: int, mlp: Mlp) -> Structure:
    """The MLP of a layer: one unit is a row of each writer, with its bias, and a column of `down`."""
    units = weight_view(layer.get_submodule(mlp.down)).shape[1]
    slices = [part for rows in mlp.writers for part in _rows(layer, rows.module, 1, rows.part * units, 1)]
    slices.append(_columns(layer, mlp.down, 1))
    return Structure(index, "mlp", units, 1, tuple(slices), mlp.down, _parameters(layer, slices))


def attention_structure(layer: nn.Module, index: int, attention: Attention, config: Any) -> Structure:
    """The attention of a layer: one unit is a key head, its value head, all queries that read them, columns of `out`.

    Raises:
        UnsupportedModelError: heads that have norms of their own.
    """
    size = heads_of(config)[1]
    heads, units = heads_in(layer, attention, size)
    wide, width = heads // units * size, heads * size
    parts = {"query": (wide, 0, wide), "key": (size, 0, size), "value": (size, 0, size)}
    if attention.fused == "blocks":
        parts = {"query": parts["query"], "key": (size, width, size), "value": (size, width + units * size, size)}
    elif attention.fused == "heads":
        parts = {name: (size, place * size, 3 * size) for place, name in enumerate(parts)}
    slices = [part for name, where in parts.items() for part in _rows(layer, getattr(attention, name), *where)]
    for path, (extent, _, stride) in zip(attention.norms or (), parts.values(), strict=False):
        slices.append(Slice(f"{path}.weight", 0, extent, 0, stride))
    slices.append(_columns(layer, attention.out, wide))
    parameters = _parameters(layer, slices)
    return Structure(index, "attention", units, wide, tuple(slices), attention.out, parameters, size)


def queries_structure(layer: nn.Module, index: int, attention: Attention, config: Any) -> Structure:
    """The query heads of a layer: one unit is a query head and its columns of `out`; keys and values stay.

    The heads that read one key are a run, and every run keeps equally many, so that the attention stays regular.

    Raises:
        UnsupportedModelError: heads that have norms of their own.
    """
    size = heads_of(config)[1]
    heads, keys = heads_in(layer, attention, size)
    slices = _rows(layer, attention.query, size, 0, size)
    if attention.fused == "blocks":
        # Keys and values stay, behind the queries in the same map.
        slices += _rows(layer, attention.query, 2 * keys * size, heads * size, 0)
    if attention.norms is not None:
        slices.append(Slice(f"{attention.norms[0]}.weight", 0, size, 0, size))
    slices.append(_columns(layer, attention.out, size))
    parameters = _parameters(layer, slices)
    return Structure(index, "queries", heads, size, tuple(slices), attention.out, parameters, size, keys)


def heads_in(layer: nn.Module, attention: Attention, size: int) -> tuple[int, int]:
    """H and H_kv of a layer, which may have been cut, by its weights; heads of `size` dimensions.

    Raises:
        UnsupportedModelError: heads that have norms of their own.
    """
    if any("norms." in name for name, _ in layer.get_submodule(attention.out.rpartition(".")[0]).named_parameters()):
        raise UnsupportedModelError(
            "Attention: expected heads that share their norms, got a norm for every head. Leave attention out of the "
            "structures."
        )
    width = weight_view(layer.get_submodule(attention.out)).shape[1]
    keys = len(weight_view(layer.get_submodule(attention.key)))
    if attention.fused is not None:
        # Keys and values, and as many values as keys.
        keys = (keys - width) // 2
    return width // size, keys // size


def heads_of(config: Any) -> tuple[int, int]:
    """H and D of a transformers config."""
    heads: int = config.num_attention_heads
    size = getattr(config, "head_dim", None) if family_of(config).attention.has_head_dim else None
    return heads, size or config.hidden_size // heads


def _rows(layer: nn.Module, path: str, size: int, start: int, stride: int) -> list[Slice]:
    """The outputs of a linear map: its weight, and its bias where it has one."""
    module = layer.get_submodule(path)
    found = [Slice(f"{path}.weight", 1 if isinstance(module, Conv1D) else 0, size, start, stride)]
    if getattr(module, "bias", None) is not None:
        found.append(Slice(f"{path}.bias", 0, size, start, stride))
    return found


def _columns(layer: nn.Module, path: str, size: int) -> Slice:
    """The inputs of a linear map."""
    return Slice(f"{path}.weight", 0 if isinstance(layer.get_submodule(path), Conv1D) else 1, size, 0, size)


def _parameters(layer: nn.Module, slices: Sequence[Slice]) -> int:
    """Of one unit."""
    shapes = [(layer.get_parameter(part.parameter).shape, part) for part in slices if part.stride]
    return sum(part.size * shape.numel() // shape[part.axis] for shape, part in shapes)


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


def mlp_weights(layer: nn.Module, mlp: Mlp) -> MlpWeights:
    """Views of a layer's MLP tensors; nothing is copied."""
    down = layer.get_submodule(mlp.down)
    gate, gate_bias = _part(layer, mlp.gate) if mlp.gate is not None else (None, None)
    up, up_bias = _part(layer, mlp.up)
    return MlpWeights(gate, up, weight_view(down), gate_bias, up_bias, getattr(down, "bias", None))


def _part(layer: nn.Module, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Weight (m, d) and bias (m,), or None, of the rows of a linear map that are units."""
    module = layer.get_submodule(rows.module)
    weight, bias = weight_view(module), getattr(module, "bias", None)
    if rows.parts == 1:
        return weight, bias
    part = slice(rows.part * len(weight) // rows.parts, (rows.part + 1) * len(weight) // rows.parts)
    return weight[part], bias[part] if bias is not None else None
