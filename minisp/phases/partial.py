"""The sums of a sweep that is not finished, kept every few minutes: what a run that is killed goes on from.

Only of the first segment, which leaves no gradient: its sums alone say how far it got.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from minisp.methods.statistics import LayerStatistics
from minisp.phases.run import record
from minisp.store.tiers import Tiers

# Written in turn, so that one of them is always whole.
PARTIAL = (record("partial", 0), record("partial", 1))


def begin(
    own: Tiers, widths: Mapping[int, int], *, gram: bool, device: torch.device
) -> tuple[dict[int, LayerStatistics], int]:
    """The sums of a segment's layers to go on with, and the micro-batches that are in them already.

    Args:
        widths: m of each layer of the segment, by its index.
        gram: whether Gram matrices are collected.
    """
    facts = {name: own.facts(name) for name in PARTIAL if 0 in widths and own.has(name)}
    usable = {name: found["batches"] for name, found in facts.items() if found["layers"] == len(widths)}
    if not usable:
        return {index: LayerStatistics.empty(m, gram=gram, device=device) for index, m in widths.items()}, 0
    newest = max(usable, key=lambda name: usable[name])

    def kept(index: int) -> LayerStatistics:
        def read(key: str) -> Tensor:
            return own.read(newest, f"{index} {key}")

        return LayerStatistics.from_tensors(read, gram=gram, device=device)

    return {index: kept(index) for index in widths}, usable[newest]


def save(own: Tiers, records: Mapping[int, LayerStatistics], batches: int) -> None:
    """Keep the sums of so many micro-batches, in place of the older ones of two, where the disk has ample room."""
    size = sum(tensor.nbytes for statistics in records.values() for _, tensor in statistics.tensors())
    if own.free_bytes() < 4 * size:
        return
    there = {name: own.facts(name)["batches"] if own.has(name) else 0 for name in PARTIAL}
    with own.writing(min(there, key=lambda name: there[name]), batches=batches, layers=len(records)) as append:
        for index, statistics in records.items():
            for key, tensor in statistics.tensors():
                append(f"{index} {key}", tensor)


def drop(own: Tiers) -> None:
    """Forget what was kept: the segment is finished."""
    for name in PARTIAL:
        own.drop(name)
