"""What becomes of a layer's parameters when units go: one record, and everything that reads it.

`applied` gives the value of a tensor from a file, `shape_after` the shape of a planned one, `apply_` changes a layer in
memory for good, `tried` for a while.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minisp.models.families import CausalLM, decoder_layers, family_of
from minisp.models.structures import Structure


@dataclass(frozen=True)
class Edit:
    """What becomes of one parameter.

    Attributes:
        parameter: as the layer names it.
        axis: of the stored parameter.
        kept: (k,) int64 sorted, the places that are kept on that axis; None keeps all.
        value: the new parameter, as it is stored; None keeps the old values.
    """

    parameter: str
    axis: int
    kept: Tensor | None = None
    value: Tensor | None = None

    def applied(self, tensor: Tensor) -> Tensor:
        """The parameter afterwards, in the dtype that it had. A tensor that was cut before is returned as it is."""
        if self.value is not None:
            return self.value.to(tensor.dtype)
        if self.kept is None or tensor.shape[self.axis] == len(self.kept):
            return tensor
        return tensor.index_select(self.axis, self.kept.to(tensor.device))

    def shape_after(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The parameter's shape afterwards."""
        after = list(shape)
        if self.kept is not None:
            after[self.axis] = len(self.kept)
        return tuple(after)


def edits_of(structure: Structure, kept: Tensor, weight: Tensor | None = None) -> list[Edit]:
    """What keeping the units `kept` (n,) does to each parameter of the layer.

    Args:
        weight: (d, n·c) the consumer's new weight; None takes the kept columns of the old one.
    """
    places: dict[tuple[str, int], list[Tensor]] = {}
    for part in structure.slices:
        places.setdefault((part.parameter, part.axis), []).append(part.places(kept))
    edits = [Edit(name, axis, torch.cat(parts).unique()) for (name, axis), parts in places.items()]
    if weight is None:
        return edits
    return [edit if edit.parameter != structure.weight else _rewritten(edit, weight) for edit in edits]


def rewrite(structure: Structure, weight: Tensor) -> Edit:
    """The edit that replaces the consumer's weight by `weight` (d, u·c) and removes nothing."""
    return _rewritten(Edit(structure.weight, structure.consumer_slice.axis), weight)


def _rewritten(edit: Edit, weight: Tensor) -> Edit:
    return Edit(edit.parameter, edit.axis, edit.kept, weight if edit.axis == 1 else weight.T)


def apply_(layer: nn.Module, edits: Sequence[Edit]) -> None:
    """Change a layer's parameters in place, on the device and in the dtype that they have."""
    for edit in edits:
        old = layer.get_parameter(edit.parameter).detach()
        new = edit.applied(old)
        if new is old:
            continue
        # Memory of its own: the layer's weights may be changed later, and the edit's may be a view.
        is_given = edit.value is not None
        replace_parameter_(layer, edit.parameter, new.to(old.device, copy=is_given).contiguous())


@contextmanager
def tried(layer: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """Within the block, the layer is edited."""
    before = {edit.parameter: layer.get_parameter(edit.parameter).data for edit in edits}
    apply_(layer, edits)
    try:
        yield
    finally:
        for name, value in before.items():
            replace_parameter_(layer, name, value)


def cut_(layer: nn.Module, structure: Structure, kept: Tensor, weight: Tensor | None = None) -> None:
    """Cut a structure in place down to the units `kept` (n,); a layer that was cut to them before only gets the weight.

    Args:
        weight: (d, n·c) the consumer's new weight; None takes the kept columns of the old one.
    """
    apply_(layer, edits_of(structure, kept, weight))
    if structure.head_dim:
        _tell_heads_(layer.get_submodule(structure.consumer.rpartition(".")[0]), *structure.heads(len(kept)))


def _tell_heads_(attention: nn.Module, queries: int, keys: int) -> None:
    """Tell an attention module how many heads it has, in the words that its family uses."""
    heads = {"num_heads": queries, "num_key_value_heads": keys, "num_key_value_groups": queries // keys}
    for name, value in heads.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    if hasattr(attention, "split_size"):
        # Of one of three equal parts.
        size: Any = attention.head_dim
        attention.split_size = queries * size
    config: Any = getattr(attention, "config", None)
    if config is not None and family_of(config).attention.reads_config:
        # A config of its own: the layers may differ.
        attention.config = own = copy.copy(config)
        own.num_attention_heads, own.num_key_value_heads = queries, keys


def resize_(model: CausalLM, structures: Sequence[Structure], sizes: Sequence[int]) -> None:
    """Give every structure its number of units, of a model on the meta device."""
    layers = decoder_layers(model, family_of(model.config))
    for structure, size in zip(structures, sizes, strict=True):
        cut_(layers[structure.layer], structure, torch.arange(size))


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
