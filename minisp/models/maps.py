"""The linear maps inside the layers, and both of their sides: what a curvature is summed from.

Shapes: T tokens, W (R, C) maps inputs a (T, C) to outputs (T, R); g = ∂L/∂y (T, R).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minisp.models.families import CausalLM, Family, decoder_layers
from minisp.models.structures import weight_view
from minisp.models.watch import TappedLinear, replaced_forwards


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a layer.

    Attributes:
        layer: index of the layer.
        path: in the layer, such as "mlp.up_proj".
        source: path of the first map of the layer that reads the same input: they share Σ a aᵀ.
        rows, columns: R and C.
        bias: whether it adds one.
        transposed: whether its weight is stored as (C, R).
    """

    layer: int
    path: str
    source: str
    rows: int
    columns: int
    bias: bool
    transposed: bool

    def __str__(self) -> str:
        return f"Layer {self.layer}, {self.path}"

    @property
    def weight(self) -> str:
        """The name of its weight among the layer's parameters."""
        return f"{self.path}.weight"

    @property
    def input(self) -> "Tap":
        """Where its inputs are summed."""
        return Tap(self.layer, self.source, "input")

    @property
    def output_gradient(self) -> "Tap":
        """Where the gradients at its outputs are summed."""
        return Tap(self.layer, self.path, "output_gradient")


@dataclass(frozen=True)
class Tap:
    """One side of a linear map of a layer."""

    layer: int
    path: str
    side: Literal["input", "output_gradient"]

    def __str__(self) -> str:
        return f"Layer {self.layer}, {self.path} {self.side}"


def linear_maps(model: CausalLM, family: Family) -> list[LinearMap]:
    """The linear maps of all layers, whose weights may be on the meta device, in the order in which they compute."""
    attention, mlp = family.attention, family.mlp
    groups = (
        (attention.query, attention.key, attention.value),
        (attention.out,),
        tuple(rows.module for rows in mlp.writers),
        (mlp.down,),
    )
    return [
        _linear_map(layer, index, path, paths[0])
        for index, layer in enumerate(decoder_layers(model, family))
        for paths in groups
        for path in dict.fromkeys(paths)
    ]


def _linear_map(layer: nn.Module, index: int, path: str, source: str) -> LinearMap:
    module = layer.get_submodule(path)
    rows, columns = weight_view(module).shape
    bias = getattr(module, "bias", None) is not None
    return LinearMap(index, path, source, rows, columns, bias, isinstance(module, Conv1D))


Told = Callable[[LinearMap, Tensor, Tensor | None], None]
"""Told a map, its inputs a (T, C), and the gradients g (T, R) at its outputs; None in a forward without gradients."""


@contextmanager
def tapped(layer: nn.Module, maps: list[LinearMap], told: Told) -> Iterator[None]:
    """Within the block, what passes the linear maps of a layer is told; their parameters must be frozen."""
    forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]] = {
        module: TappedLinear(module, _teller(found, told)).forward
        for found in maps
        for module in [layer.get_submodule(found.path)]
    }
    with replaced_forwards(forwards):
        yield


def _teller(found: LinearMap, told: Told) -> Callable[[Tensor, Tensor | None], None]:
    return lambda x, grad_y: told(found, x, grad_y)
