"""Where hidden states wait between the layers of a sweep: on the device, in main memory, or in the scratch folder.

States can be computed again, so a folder need not hold them: they wait in memory as far as the plan has room there.
Every few minutes, one boundary's states are saved to the folder as well; from the newest boundary that all processes
have, a run that was killed goes on to the same bits. Where there is no room, every boundary is in the folder.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minisp.store.names import STATES
from minisp.store.records import Append, Folder, Scratch
from minisp.store.transit import Transit

# What a run that is killed loses at most of a pass over the layers.
SAVE_SECONDS = 180.0


@dataclass(frozen=True)
class Room:
    """Bytes that what waits may take in memory during one phase.

    Attributes:
        device: where it computes.
        host: pinned main memory beside a GPU; 0 where a CPU computes.
    """

    device: int = 0
    host: int = 0


@dataclass
class _Held:
    """A record in memory: its tensors, each with the event of its copy, its facts, and the bytes that it was given."""

    facts: dict[str, Any]
    taken: Room
    tensors: "dict[str, tuple[Tensor, torch.cuda.Event | None]]" = field(default_factory=dict)


class Tiers:
    """Records of this process: states in memory as far as there is room, all else in `store`.

    Args:
        store: what else there is; what it holds already counts as saved.
        device: where states are computed.
        room: in memory; another phase may have another one.
    """

    def __init__(self, store: Scratch, device: torch.device, room: Room):
        self.store, self.room = store, room
        self._transit = Transit(device)
        self._held: dict[str, _Held] = {}
        self._used = Room()
        self._last = time.monotonic()
        # Saved for a run that goes on from here, and, of these, what this one has done with.
        self._saved: set[str] = set(store.names(STATES)) if isinstance(store, Folder) else set()
        self._done: set[str] = set()

    @contextmanager
    def writing(self, name: str, *, sizes: Sequence[int] = (), **facts: Any) -> Iterator[Append]:
        """As `Folder.writing`.

        Args:
            sizes: bytes of each tensor, of states; a record of no sizes goes to `store`.
        """
        self._saved.discard(name)
        self._done.discard(name)
        self.drop(name)
        taken = self._place(sizes) if sizes else None
        if taken is None:
            with self.store.writing(name, **facts) as append:
                leaves = sizes and isinstance(self.store, Folder)
                yield (lambda key, tensor: append(key, *self._transit.leave(tensor.detach()))) if leaves else append
            return
        held = _Held(facts, taken)
        self._take(taken)
        try:
            yield lambda key, tensor: held.tensors.__setitem__(key, self._kept(tensor.detach(), taken))
        except BaseException:
            self._take(taken, -1)
            raise
        self._held[name] = held

    def has(self, name: str) -> bool:
        """As `Folder.has`."""
        return name in self._held or (name not in self._done and self.store.has(name))

    def keys(self, name: str) -> list[str]:
        """As `Folder.keys`."""
        return list(self._held[name].tensors) if name in self._held else self.store.keys(name)

    def read(self, name: str, key: str, *, ahead: bool = False) -> Tensor:
        """One tensor of a record, on the device, where the record is of states.

        Raises:
            OutputError: as `Folder.read`.
        """
        held = self._held.get(name)
        if held is None:
            return self._transit.enter(self.store.read(name, key, ahead=ahead))
        return self._transit.enter(*held.tensors[key])

    def facts(self, name: str) -> dict[str, Any]:
        """As `Folder.facts`."""
        return self._held[name].facts if name in self._held else self.store.facts(name)

    def drop(self, name: str) -> None:
        """Forget a record, if there is one; what is saved of it stays until `forget`."""
        if name in self._held:
            self._take(self._held.pop(name).taken, -1)
        if name in self._saved:
            self._done.add(name)
        else:
            self.store.drop(name)

    def reserve(self, size: int, *, beside: int = 0) -> bool:
        """Whether a phase may keep so many bytes on the device itself; they then count until given back.

        Args:
            beside: bytes of a record that will be written before that, and is to find room too.
        """
        fits = self._used.device + size + beside <= self.room.device
        if fits:
            self._take(Room(size))
        return fits

    def give_back(self, size: int) -> None:
        """Bytes that were reserved are free again."""
        self._take(Room(size), -1)

    @property
    def due(self) -> bool:
        """Whether a boundary should be saved, for the last one is old."""
        return isinstance(self.store, Folder) and time.monotonic() - self._last >= SAVE_SECONDS

    def save(self, *names: str) -> None:
        """Have records in the folder, those in memory as well; without a folder, nothing outlives the process.

        Raises:
            OutputError: the folder cannot be written.
        """
        for name in names if isinstance(self.store, Folder) else ():
            if name in self._held and name not in self._saved:
                with self.store.writing(name, **self._held[name].facts) as append:
                    for key, (tensor, arrived) in self._held[name].tensors.items():
                        append(key, tensor, arrived)
            if self.has(name):
                self._saved.add(name)
        self.store.settle()
        self._last = time.monotonic()

    def forget(self, *newest: str) -> None:
        """Drop what was saved and is done with, but for the newest records, from which a run would go on."""
        for name in self._done - set(newest):
            self._done.discard(name)
            self._saved.discard(name)
            self.store.drop(name)

    def settle(self) -> None:
        """As `Folder.settle`."""
        self.store.settle()

    def free_bytes(self) -> int:
        """As `Folder.free_bytes`."""
        return self.store.free_bytes()

    def _place(self, sizes: Sequence[int]) -> Room | None:
        """Where tensors of these sizes find room, the fastest first; None: in the folder."""
        # Pinned blocks are rounded up to a power of two each.
        pinned = sum(1 << max(0, size - 1).bit_length() for size in sizes)
        # Each is asked by itself: what an earlier phase has left in one may be more than this phase has there.
        if self._used.device + sum(sizes) <= self.room.device:
            return Room(device=sum(sizes))
        if self._used.host + pinned <= self.room.host:
            return Room(host=pinned)
        return None

    def _take(self, room: Room, sign: int = 1) -> None:
        self._used = Room(self._used.device + sign * room.device, self._used.host + sign * room.host)

    def _kept(self, tensor: Tensor, taken: Room) -> "tuple[Tensor, torch.cuda.Event | None]":
        return self._transit.leave(tensor) if taken.host else (tensor, None)
