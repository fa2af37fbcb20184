"""A few chunks of pinned memory, through which weights of any size pass from disk to a GPU.

    read(i + 1) in a thread of its own     |     check(i) in the caller's     |     copy(i − 1) by the device

Floor: the slowest of the three, bytes over the disk's, the check's or the bus's rate; the first read and the last copy
stand alone. Page-locking, which takes about as long as writing the memory does, is bounded by the chunks.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import cycle
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from minisp.store.files import helper_thread

# One is read into, one is checked, one is on its way. A power of two, to which torch rounds pinned blocks up.
NUM_CHUNKS, CHUNK_BYTES = 3, 64 * 2**20

Step: TypeAlias = Callable[[int, Tensor], None]
"""Does something with a chunk: its first byte in the whole, and its memory (n,) uint8."""


class Copied(Protocol):
    """What a copy that was begun gives: `torch.cuda.Event`, or a test's own."""

    def synchronize(self) -> None:
        """Return once the copy is done."""


class _Chunk:
    def __init__(self, memory: Tensor):
        self.memory = memory
        self._copied: Copied | None = None

    def begin(self, copied: Copied) -> None:
        """Note that a copy out of the chunk was begun."""
        self._copied = copied

    def settle(self) -> None:
        """Wait until the memory may be written again."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


class Ring:
    """Chunks that are used in turn.

    Args:
        allocate: bytes → memory (n,) uint8 on the CPU, pinned where a GPU reads it.
        num_chunks: at least 2; with 3, reading never waits for the copy before the last.
        chunk_bytes: a multiple of `minisp.models.loader.ALIGNMENT`.
    """

    def __init__(
        self, allocate: Callable[[int], Tensor], num_chunks: int = NUM_CHUNKS, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._allocate = allocate
        self._num_chunks = num_chunks
        self._chunk_bytes = chunk_bytes
        self._chunks: list[_Chunk] = []
        self._reader = helper_thread("minisp-reader")

    def carry(self, size: int, read: Step, check: Step, copy: Callable[[int, Tensor], Copied]) -> None:
        """Pass bytes 0 to `size` of something through the chunks, in order; returns when all copies are done.

        Args:
            read: fills the memory; runs in the reader's thread, one chunk ahead.
            check: looks at what was read.
            copy: begins to copy the memory to its place.

        Raises:
            Exception: that of `read`, `check` or `copy`. No read and no copy is under way then either.
        """
        starts = range(0, size, self._chunk_bytes)
        while len(self._chunks) < min(self._num_chunks, len(starts)):
            self._chunks.append(_Chunk(self._allocate(self._chunk_bytes)))
        turns = ((start, chunk, chunk.memory[: size - start]) for start, chunk in zip(starts, cycle(self._chunks)))
        reading: deque[tuple[int, _Chunk, Tensor, Future[None]]] = deque()

        def read_next() -> None:
            for start, chunk, memory in turns:
                reading.append((start, chunk, memory, self._reader.submit(_read, chunk, read, start, memory)))
                return

        try:
            read_next()
            while reading:
                start, chunk, memory, future = reading[0]
                future.result()
                read_next()
                reading.popleft()
                check(start, memory)
                chunk.begin(copy(start, memory))
        finally:
            wait([future for *_, future in reading])
            for chunk in self._chunks:
                chunk.settle()


def ring_bytes(size: int) -> int:
    """Memory in bytes of a ring that `size` bytes pass through."""
    return CHUNK_BYTES * min(NUM_CHUNKS, -(-size // CHUNK_BYTES))


def _read(chunk: _Chunk, read: Step, start: int, memory: Tensor) -> None:
    chunk.settle()
    read(start, memory)


def pinned(device: torch.device) -> Callable[[int], Tensor]:
    """An `allocate` for a GPU."""

    def allocate(size: int) -> Tensor:
        # Of this GPU's context: another one's would be made on the first GPU.
        with torch.cuda.device(device):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    return allocate
