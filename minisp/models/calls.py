"""What a model calls its decoder layers with, and what stands in their place while only its other code is wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCall:
    """The arguments, besides the hidden state, that the model passes to one decoder layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def same_calls(first: Sequence[LayerCall], second: Sequence[LayerCall]) -> bool:
    """Whether two models' layers were called with the same arguments, bit for bit."""
    # Layers share most of their arguments: each pair of tensors is compared once.
    known: set[tuple[int, int]] = set()
    return all(
        _equal(a.args, b.args, known) and _equal(a.kwargs, b.kwargs, known) for a, b in zip(first, second, strict=True)
    )


def _equal(first: Any, second: Any, known: set[tuple[int, int]]) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        pair = (id(first), id(second))
        if pair not in known:
            if first.shape != second.shape or first.dtype != second.dtype or not torch.equal(first, second):
                return False
            known.add(pair)
        return True
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(_equal(a, b, known) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key], known) for key in first)
    # Of other objects, such as a config, nothing is known but that they were made in the same way.
    return not isinstance(first, (int, float, str)) or first == second


class Stub(nn.Module):
    """Stands for a decoder layer in the model's forward; other attributes are those of the layer."""

    def __init__(self, index: int, layer: nn.Module, function: Any):
        super().__init__()
        self.__dict__.update(_index=index, _layer=layer, _function=function)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        leaving: Tensor = self._function(self._index, hidden, *args, **kwargs)
        return leaving

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class EnoughError(Exception):
    """Raised by the last stub: the rest of the forward is not wanted."""
