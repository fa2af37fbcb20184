"""The tensors of the result, in writing order: what lies outside the layers first, then layer by layer.

Shapes are known once units are selected (`…_entries`); values come one layer at a time (`…_tensors`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minisp.methods.reconstruction import Reconstruction
from minisp.models.families import Architecture, decoder_layers, layers_path, unit_axes
from minisp.store.checkpoint import DTYPES, Checkpoint
from minisp.store.writer import PIECE_BYTES, Entry


@dataclass(frozen=True)
class LayerTensor:
    """A stored tensor of one layer: its name, the axis that runs over units (None: none does), whether it is `down`."""

    stored: str
    axis: int | None
    is_down: bool


def checkpoint_entries(checkpoint: Checkpoint, model: Any, row: Architecture, kept: Sequence[Tensor]) -> list[Entry]:
    """Every stored tensor with the shape that it will have."""
    outside, layers = _by_layer(checkpoint, model, row)
    entries = [Entry(name, checkpoint.tensors[name].shape, checkpoint.tensors[name].dtype) for name in outside]
    for members, indices in zip(layers, kept, strict=True):
        for member in members:
            place = checkpoint.tensors[member.stored]
            shape = list(place.shape)
            if member.axis is not None:
                shape[member.axis] = len(indices)
            entries.append(Entry(member.stored, tuple(shape), place.dtype))
    return entries


def checkpoint_tensors(
    checkpoint: Checkpoint, model: Any, row: Architecture, results: Iterable[Reconstruction]
) -> Iterator[tuple[str, Tensor]]:
    """(stored name, value) in the order of `checkpoint_entries`; a layer is read once its reconstruction has come.

    A large tensor comes as several pieces of its rows, one after the other.
    """
    outside, layers = _by_layer(checkpoint, model, row)
    for name in outside:
        # Embeddings of a large vocabulary are copied a piece at a time.
        place = checkpoint.tensors[name]
        step = max(1, PIECE_BYTES * place.num_rows // max(place.num_bytes, 1))
        for start in range(0, place.num_rows, step):
            yield name, checkpoint.read_rows(name, range(start, min(start + step, place.num_rows)))
    for members, result in zip(layers, results, strict=True):
        values = dict(checkpoint.read([member.stored for member in members]))
        for member in members:
            value = values.pop(member.stored)
            if member.is_down and result.down is not None:
                value = (result.down if member.axis == 1 else result.down.T).to(value.dtype)
            elif member.axis is not None and len(result.kept) < value.shape[member.axis]:
                value = value.index_select(member.axis, result.kept)
            yield member.stored, value


def module_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """(name, value) of a model in memory; a tied weight appears once, under the name that it is tied to."""
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return [(name, value) for name, value in model.state_dict().items() if name not in tied]


def module_entries(tensors: Sequence[tuple[str, Tensor]]) -> list[Entry]:
    """The entries of tensors that exist already."""
    return [Entry(name, tuple(value.shape), DTYPES[value.dtype]) for name, value in tensors]


def _by_layer(checkpoint: Checkpoint, model: Any, row: Architecture) -> tuple[list[str], list[list[LayerTensor]]]:
    layers, path = decoder_layers(model, row), layers_path(model, row)
    members: list[list[LayerTensor]] = []
    for index, layer in enumerate(layers):
        axes = unit_axes(layer, row)
        members.append([])
        for name, _ in layer.named_parameters():
            stored = checkpoint.stored_name(f"{path}.{index}.{name}", model.base_model_prefix)
            members[-1].append(LayerTensor(stored, axes.get(name), name == f"{row.down}.weight"))
    inside = {member.stored for layer_members in members for member in layer_members}
    return [name for name in checkpoint.tensors if name not in inside], members
