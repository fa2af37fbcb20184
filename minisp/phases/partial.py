"""The sums of an unfinished segment, saved every few minutes: a killed run resumes from them.

Only the first segment is saved so. It writes no gradient, so its sums alone say how far it got.
"""

from collections.abc import Mapping

from minisp.phases.collection import Collection, K, S
from minisp.store.names import Record
from minisp.store.tiers import Tiers

# Written in turn, so that one of them is always whole.
PARTIAL = (Record.PARTIAL.of(0), Record.PARTIAL.of(1))


def begin(own: Tiers, collection: Collection[K, S], segment: range) -> tuple[dict[K, S], int]:
    """The sums of a segment to go on with, and the micro-batches that are in them already."""
    keys = collection.within(segment)
    facts = {name: own.facts(name) for name in PARTIAL if segment.start == 0 and own.has(name)}
    usable = {name: found["batches"] for name, found in facts.items() if found["keys"] == len(keys)}
    if not usable:
        return {key: collection.empty(key) for key in keys}, 0
    newest = max(usable, key=lambda name: usable[name])

    def kept(key: K) -> S:
        return collection.restored(key, lambda part: own.read(newest, f"{key} {part}"))

    return {key: kept(key) for key in keys}, usable[newest]


def save(own: Tiers, records: Mapping[K, S], batches: int) -> None:
    """Keep the sums of so many micro-batches, in place of the older ones of two, where the disk has ample room."""
    size = sum(tensor.nbytes for sums in records.values() for _, tensor in sums.tensors())
    if own.free_bytes() < 4 * size:
        return
    there = {name: own.facts(name)["batches"] if own.has(name) else 0 for name in PARTIAL}
    with own.writing(min(there, key=lambda name: there[name]), batches=batches, keys=len(records)) as append:
        for key, sums in records.items():
            for part, tensor in sums.tensors():
                append(f"{key} {part}", tensor)


def drop(own: Tiers) -> None:
    """Forget what was kept: the segment is finished."""
    for name in PARTIAL:
        own.drop(name)
