"""What can be removed from a model: structures, which are units of one layer with all that writes and reads them.

A structure knows where its units lie in the parameters of its layer (`Slice`), and which linear map reads them (the
consumer, whose input is watched and whose weight is refitted). Scores, budget, refit and writer know nothing else.

Shapes: u units of c columns each; W (d, u·c) is the consumer's weight, X (T, u·c) its input.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Where the units of a structure lie in one parameter of a layer. All slices of a parameter cover its axis.

    Attributes:
        parameter: as the layer names it, such as "mlp.up_proj.weight".
        axis: the axis of the stored parameter that runs over units.
        size: neighbouring places of one unit.
        start: first place of the first unit.
        stride: places from the start of a unit to the start of the next one.
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
    """

    layer: int
    name: str
    num_units: int
    columns: int
    slices: tuple[Slice, ...]
    consumer: str
    parameters: int

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

    def columns_of(self, kept: Tensor) -> Tensor:
        """The columns (n·c,) int64 of the consumer's weight that read the units kept (n,)."""
        return self.consumer_slice.places(kept)
