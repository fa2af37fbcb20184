"""Target `padded`: every layer as wide as the widest one, the new units zero, for the stock class.

The function is the same: a unit whose rows and biases of `gate` and `up` are zero has the activation act(0)·0, or
act(0) = 0 where there is no gate, and its column of `down` is zero too. The file is no smaller than a uniform model of
the largest width, so this is for servers that take nothing else.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from minisp.export.modeling import sized_config
from minisp.export.source import Content, Source, write_folder
from minisp.export.tensors import checkpoint_entries, checkpoint_tensors
from minisp.models.edits import edits_of
from minisp.models.families import decoder_layers
from minisp.models.skeleton import size_keys
from minisp.models.structures import structures_of
from minisp.phases.run import Progress
from minisp.store.writer import Entry


def check(source: Source) -> None:
    """Any MLP widths can be padded."""


def write(source: Source, out: Path, progress: Progress) -> None:
    """Write a folder for the stock class whose logits are the source's.

    Raises:
        OutputError, CheckpointError: see `write_folder`.
    """
    full = [max(source.widths)] * len(source.widths)
    keys = size_keys(source.family, source.checkpoint.config, source.structures, full)
    config, _ = sized_config(source.model, source.checkpoint.raw_config, keys, {"mlp"})
    rooms = _rooms(source, keys)
    entries = checkpoint_entries(source.checkpoint, source.model, [])
    tensors = checkpoint_tensors(source.checkpoint, source.model, [])
    content = Content(
        config=config,
        entries=[
            Entry(entry.name, rooms[entry.name].shape if entry.name in rooms else entry.shape, entry.dtype)
            for entry in entries
        ],
        tensors=((name, rooms[name].filled(value) if name in rooms else value) for name, value in tensors),
        files={},
    )
    write_folder(source, "padded", content, out, progress)


@dataclass(frozen=True)
class _Room:
    """What a parameter becomes: its shape, and the places on one axis that the old values take."""

    shape: tuple[int, ...]
    axis: int
    places: Tensor

    def filled(self, value: Tensor) -> Tensor:
        """Zeros of the new shape with the old values at their places."""
        return value.new_zeros(self.shape).index_copy_(self.axis, self.places, value)


def _rooms(source: Source, keys: Mapping[str, Any]) -> dict[str, _Room]:
    """Stored name → what it becomes, for the parameters that grow.

    Args:
        keys: the config's keys that tell the width.
    """
    config = copy.deepcopy(source.checkpoint.config)
    for key, value in keys.items():
        setattr(config, key, value)
    with init_empty_weights():
        stock = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layers = decoder_layers(stock, source.family)
    rooms = {}
    for structure, full in zip(source.structures, structures_of(stock, source.family), strict=True):
        if structure.num_units == full.num_units:
            continue
        for edit in edits_of(full, torch.arange(structure.num_units)):
            assert edit.kept is not None
            shape = tuple(layers[full.layer].get_parameter(edit.parameter).shape)
            rooms[source.stored(structure, edit.parameter)] = _Room(shape, edit.axis, edit.kept)
    return rooms
