"""Bytes of tensors to and from files: scattered reads, and the one place through which large data is written."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Piece: TypeAlias = tuple[int, memoryview]
"""Where bytes lie in a file, and the memory that they fill."""

# Pieces that one system call fills at most, under the limit of every system.
MAX_PIECES = 512
# Bytes that a checksum weighs alike.
PAGE = 4096


def helper_thread(name: str) -> ThreadPoolExecutor:
    """A thread for work beside the computation, in which torch's operations start no OpenMP team of their own.

    As soon as a process has more OpenMP threads than cores, libgomp lets waiting threads sleep between parallel loops
    in all its teams, the computing one among them: a streamed run of SmolLM2-135M had 117 000 context switches where
    one in memory had 61, and left cores idle.
    """
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    pool.submit(_compute_alone).result()
    # Threads that others start later begin with the number that was set last.
    torch.set_num_threads(own)
    return pool


def _compute_alone() -> None:
    # Asked first, for a thread's first question sets its number to the process's.
    torch.get_num_threads()
    torch.set_num_threads(1)


# Jobs that may always wait to be written while the computation goes on: what they hold is in memory.
WRITES_BEHIND = 2


class WriteBehind:
    """A thread that does jobs in order, beside the computation; as a context, it ends with the block.

    Attributes:
        room: bytes that waiting jobs may hold where they are more than `WRITES_BEHIND`.
    """

    def __init__(self) -> None:
        self.room = 0
        self._thread = helper_thread("minisp-writer")
        self._waiting: deque[tuple[Future[Any], int]] = deque()

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def submit(self, job: Callable[..., Any], *arguments: Any, size: int = 0) -> None:
        """Have a job done, once few enough are waiting.

        Args:
            size: bytes that it holds until it is done.

        Raises:
            Exception: that of an earlier job.
        """
        while len(self._waiting) >= WRITES_BEHIND and size + sum(held for _, held in self._waiting) >= self.room:
            self._waiting.popleft()[0].result()
        self._waiting.append((self._thread.submit(job, *arguments), size))

    def do(self, job: Callable[..., Any], *arguments: Any, size: int = 0) -> None:
        """Do a job at once where none waits, else after those; raises as `submit`."""
        if self._waiting:
            self.submit(job, *arguments, size=size)
        else:
            job(*arguments)

    def settle(self) -> None:
        """Wait until all is done; raises what a job raised."""
        while self._waiting:
            self._waiting.popleft()[0].result()

    def close(self) -> None:
        """End the thread after what it has still to do; failures no longer matter."""
        self._thread.shutdown(wait=True)
        self._waiting.clear()


class BesideDigest:
    """SHA-256 in a thread of its own: a piece is hashed while the next one is written; as a context, it ends with it.

    Hashing costs as much as writing does (1 to 2 GB/s), so one thread for both would take the sum of the two.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = helper_thread("minisp-digest")
        self._last: Future[None] | None = None

    def __enter__(self) -> "BesideDigest":
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown(wait=True)

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes, once those before are done with: no more than one piece is held."""
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._digest.update, data)

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        if self._last is not None:
            self._last.result()
        return self._digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def checksum(data: memoryview) -> int:
    """Sums of 64-bit words, weighted by the page that they are in, modulo 2⁶⁴: finds what is torn, zeroed or misplaced.

    A CRC-32 would take longer than reading the data does.
    """
    whole = len(data) // PAGE * PAGE
    pages = np.frombuffer(data[:whole], dtype=np.uint64).reshape(-1, PAGE // 8).sum(1, dtype=np.uint64)
    rest = int.from_bytes(hashlib.blake2b(data[whole:], digest_size=8).digest(), "little")
    return (int(pages @ np.arange(1, len(pages) + 1, dtype=np.uint64)) + rest) % 2**64


def write_tensor(handle: IO[bytes], tensor: Tensor) -> memoryview:
    """Write the raw data of a tensor of any device and layout; returns what was written."""
    data = tensor_bytes(tensor.detach().cpu().contiguous())
    handle.write(data)
    return data


def read_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """Fill memory from pieces in ascending order, joining those that touch into one scattered read.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        start = 0
        while start < len(pieces):
            stop, end = start + 1, pieces[start][0] + len(pieces[start][1])
            while stop < len(pieces) and stop - start < MAX_PIECES and pieces[stop][0] == end:
                end += len(pieces[stop][1])
                stop += 1
            _fill(descriptor, [memory for _, memory in pieces[start:stop]], pieces[start][0])
            start = stop
    finally:
        os.close(descriptor)


def _fill(descriptor: int, memory: list[memoryview], offset: int) -> None:
    """Read until all of `memory` is full: one call returns at most 2 GB, and fewer bytes wherever it likes."""
    while memory := [piece for piece in memory if len(piece)]:
        count = os.preadv(descriptor, memory, offset)
        if count == 0:
            raise OSError("the file ends too early")
        offset += count
        while count:
            taken = min(count, len(memory[0]))
            memory[0] = memory[0][taken:]
            count -= taken
            if not len(memory[0]):
                memory.pop(0)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def publish_folder(partial: Path, folder: Path) -> None:
    """Rename a complete folder to its final name; where another process was faster, that one's folder stays.

    Raises:
        OSError: it cannot be renamed, and no folder of that name is there.
    """
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
