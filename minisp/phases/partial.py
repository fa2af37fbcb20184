"""The sums of a sweep that is not finished, kept every few minutes: what a run that is killed goes on from.

Only of the first segment, which leaves no gradient: its sums alone say how far it got.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minisp.methods.statistics import Statistics
from minisp.models.structures import Structure
from minisp.store.names import Record
from minisp.store.tiers import Tiers

# Written in turn, so that one of them is always whole.
PARTIAL = (Record.PARTIAL.of(0), Record.PARTIAL.of(1))


def begin(
    own: Tiers, structures: Sequence[Structure], *, gram: bool, device: torch.device
) -> tuple[dict[Structure, Statistics], int]:
    """The sums of a segment's structures to go on with, and the micro-batches that are in them already.

    Args:
        structures: those of the segment.
        gram: whether Gram matrices are collected.
    """
    is_first = any(structure.layer == 0 for structure in structures)
    facts = {name: own.facts(name) for name in PARTIAL if is_first and own.has(name)}
    usable = {name: found["batches"] for name, found in facts.items() if found["structures"] == len(structures)}
    if not usable:
        return {x: Statistics.empty(x.num_units, x.columns, gram=gram, device=device) for x in structures}, 0
    newest = max(usable, key=lambda name: usable[name])

    def kept(structure: Structure) -> Statistics:
        def read(key: str) -> Tensor:
            return own.read(newest, f"{structure} {key}")

        return Statistics.from_tensors(read, structure.columns, gram=gram, device=device)

    return {structure: kept(structure) for structure in structures}, usable[newest]


def save(own: Tiers, records: Mapping[Structure, Statistics], batches: int) -> None:
    """Keep the sums of so many micro-batches, in place of the older ones of two, where the disk has ample room."""
    size = sum(tensor.nbytes for statistics in records.values() for _, tensor in statistics.tensors())
    if own.free_bytes() < 4 * size:
        return
    there = {name: own.facts(name)["batches"] if own.has(name) else 0 for name in PARTIAL}
    with own.writing(min(there, key=lambda name: there[name]), batches=batches, structures=len(records)) as append:
        for structure, statistics in records.items():
            for key, tensor in statistics.tensors():
                append(f"{structure} {key}", tensor)


def drop(own: Tiers) -> None:
    """Forget what was kept: the segment is finished."""
    for name in PARTIAL:
        own.drop(name)
