"""The tensors of the result, in writing order: what lies outside the layers first, then layer by layer.

Shapes are known once units are selected (`…_entries`); values come one layer at a time (`…_tensors`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from minisp.models.edits import Edit, edits_of
from minisp.models.families import decoder_layers, family_of, layers_path
from minisp.models.structures import Structure
from minisp.phases.run import Result
from minisp.store.checkpoint import DTYPES, Checkpoint
from minisp.store.writer import PIECE_BYTES, Entry

WeightOf: TypeAlias = Callable[[Structure], Tensor | None]
"""The new weight (d, n·c) of a structure's consumer; None where the old one is to be sliced."""
ChangesIn: TypeAlias = Callable[[int], Sequence[Edit]]
"""What else becomes of the parameters of a layer; their shapes stay."""


def checkpoint_entries(checkpoint: Checkpoint, model: Any, results: Sequence[Result]) -> list[Entry]:
    """Every stored tensor with the shape that it will have."""
    outside, layers = _by_layer(checkpoint, model)
    names = written_names(checkpoint, model, results)
    entries = [Entry(names[name], checkpoint.tensors[name].shape, checkpoint.tensors[name].dtype) for name in outside]
    for index, members in enumerate(layers):
        edits = _edits(results, index, lambda structure: None)
        for stored, name in members:
            place = checkpoint.tensors[stored]
            shape = edits[name].shape_after(place.shape) if name in edits else place.shape
            entries.append(Entry(stored, tuple(shape), place.dtype))
    return entries


def checkpoint_tensors(
    checkpoint: Checkpoint,
    model: Any,
    results: Sequence[Result],
    weight_of: WeightOf = lambda structure: None,
    changes_in: ChangesIn = lambda index: (),
) -> Iterator[tuple[str, Tensor]]:
    """(written name, value) in the order of `checkpoint_entries`; a layer is read once it has its turn.

    A large tensor comes as several pieces of its rows, one after the other.
    """
    outside, layers = _by_layer(checkpoint, model)
    names = written_names(checkpoint, model, results)
    for name in outside:
        # Embeddings of a large vocabulary are copied a piece at a time.
        place = checkpoint.tensors[name]
        step = max(1, PIECE_BYTES * place.num_rows // max(place.num_bytes, 1))
        for start in range(0, place.num_rows, step):
            yield names[name], checkpoint.read_rows(name, range(start, min(start + step, place.num_rows)))
    for index, members in enumerate(layers):
        edits = _edits(results, index, weight_of) | {edit.parameter: edit for edit in changes_in(index)}
        values = dict(checkpoint.read([stored for stored, _ in members]))
        for stored, name in members:
            value = values.pop(stored)
            yield stored, edits[name].applied(value) if name in edits else value


def written_names(checkpoint: Checkpoint, model: Any, results: Sequence[Result]) -> dict[str, str]:
    """Stored name → name in the result.

    transformers renames older checkpoints while it loads a stock class, but not those of a modelling file. What the
    model calls otherwise than the checkpoint is therefore written under the model's name, if anything was cut.
    """
    names = {name: name for name in checkpoint.tensors}
    if any(result.cut for result in results):
        for name, _ in model.named_parameters():
            stored = checkpoint.stored_name(name, model.base_model_prefix)
            prefix = f"{model.base_model_prefix}."
            if stored.removeprefix(prefix) != name.removeprefix(prefix):
                names[stored] = name
    return names


def module_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """(name, value) of a model in memory; a tied weight appears once, under the name that it is tied to."""
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return [(name, value) for name, value in model.state_dict().items() if name not in tied]


def module_entries(tensors: Sequence[tuple[str, Tensor]]) -> list[Entry]:
    """The entries of tensors that exist already."""
    return [Entry(name, tuple(value.shape), DTYPES[value.dtype]) for name, value in tensors]


def _edits(results: Sequence[Result], index: int, weight_of: WeightOf) -> dict[str, Edit]:
    """Parameter of a layer → what becomes of it."""
    mine = [result for result in results if result.structure.layer == index]
    found = [edit for r in mine for edit in edits_of(r.structure, r.kept, weight_of(r.structure))]
    return {edit.parameter: edit for edit in found}


def _by_layer(checkpoint: Checkpoint, model: Any) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Stored names outside the layers; and of each layer, (stored name, parameter) in the layer's own order."""
    family = family_of(model.config)
    path = layers_path(model, family)
    members = [
        [
            (checkpoint.stored_name(f"{path}.{index}.{name}", model.base_model_prefix), name)
            for name, _ in layer.named_parameters()
        ]
        for index, layer in enumerate(decoder_layers(model, family))
    ]
    inside = {stored for layer in members for stored, _ in layer}
    return [name for name in checkpoint.tensors if name not in inside], members
