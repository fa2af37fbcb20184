"""Weights on their way from disk to where they compute: large reads into a few reusable buffers, ahead of their use.

    read(i + 1) in a thread, into one slot     |    compute(i) on the views of another slot

On a CPU a slot is one buffer, and parameters stored in the compute type are views of it: nothing is copied. On a GPU it
is device memory, filled by a copy stream from the ring of pinned chunks that all slots share.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from itertools import cycle

import torch
from torch import Tensor

from minisp.store.checkpoint import DTYPE_OF, Checkpoint
from minisp.store.files import helper_thread, tensor_bytes
from minisp.store.ring import Ring, pinned

# Tensors start at multiples of this in a slot, for vector loads and for the copy engine.
ALIGNMENT = 64


class Loader:
    """Reads groups of stored tensors ahead.

    Args:
        checkpoint: where they are.
        device: where they go.
        num_slots: groups in memory at once: 1 reads when the last group is done with, 2 while it computes.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, num_slots: int):
        self.checkpoint = checkpoint
        self.num_slots = num_slots
        self._device = device
        self.release()
        self._ring = Ring(pinned(device)) if device.type == "cuda" else None
        self._thread = helper_thread("minisp-loader")
        self._checked: set[str] = set()

    def release(self) -> None:
        """Give the slots back; the tensors of futures that were taken stay valid."""
        self._slots = cycle([_Slot(self._device) for _ in range(self.num_slots)])

    def start(self, names: Sequence[str]) -> "Future[dict[str, Tensor]]":
        """Begin to read stored tensors into the next slot, whose earlier content is lost.

        Returns:
            A future of stored name → tensor on the device, in the stored dtype. Its errors are those of
            `Checkpoint.read`.
        """
        slot = next(self._slots)
        slot.release()
        return self._thread.submit(self._read, slot, list(names))

    def _read(self, slot: "_Slot", names: Sequence[str]) -> dict[str, Tensor]:
        places = {name: self.checkpoint.tensors[name] for name in names}
        offsets: dict[str, int] = {}
        end = 0
        for name in sorted(names, key=lambda name: (places[name].file, places[name].offset)):
            offsets[name] = end
            end += -(-places[name].num_bytes // ALIGNMENT) * ALIGNMENT
        slot.reserve(end)
        tensors = {
            name: slot.buffer[start : start + place.num_bytes].view(DTYPE_OF[place.dtype]).view(place.shape)
            for name, start in offsets.items()
            for place in [places[name]]
        }
        if self._ring is None:
            self.checkpoint.read_into(tensors)
            self._check(tensors)
        else:
            self._carry(self._ring, slot, offsets, end)
        # A weight passes several times; its values are looked at once.
        self._checked.update(names)
        return tensors

    def _carry(self, ring: Ring, slot: "_Slot", offsets: Mapping[str, int], end: int) -> None:
        """Fill bytes 0 to `end` of a slot through the ring; a tensor that a chunk's end falls into comes in parts."""

        def parts(start: int, memory: Tensor) -> Iterator[tuple[str, int, Tensor]]:
            # Name, first byte in the tensor, and the memory (n,) uint8 of what lies in this chunk.
            for name, offset in offsets.items():
                first = max(offset, start)
                last = min(offset + self.checkpoint.tensors[name].num_bytes, start + len(memory))
                if first < last:
                    yield name, first - offset, memory[first - start : last - start]

        def read(start: int, memory: Tensor) -> None:
            self.checkpoint.read_parts([(name, at, tensor_bytes(part)) for name, at, part in parts(start, memory)])

        def check(start: int, memory: Tensor) -> None:
            # Tensors and chunks start at multiples of `ALIGNMENT`, so that a part holds whole elements.
            types = {name: DTYPE_OF[self.checkpoint.tensors[name].dtype] for name in offsets}
            self._check({name: part.view(types[name]) for name, _, part in parts(start, memory)})

        ring.carry(end, read, check, slot.copy)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name not in self._checked:
                self.checkpoint.check_finite(name, tensor)


class _Slot:
    """One buffer of bytes where weights compute; on a GPU, with the stream that fills it beside the computation."""

    def __init__(self, device: torch.device):
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # What computes with the slot, as its caller has it; the loader's thread has a current stream of its own.
        self._user: torch.cuda.Stream | None = None
        self._released: torch.cuda.Event | None = None
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def release(self) -> None:
        """Note what was queued so far: kernels that may still read the slot's earlier content."""
        if self._copies is not None:
            self._user = torch.cuda.current_stream(self._device)
            self._released = self._user.record_event()

    def reserve(self, size: int) -> None:
        if len(self.buffer) < size:
            self.buffer = torch.empty(0, dtype=torch.uint8)
            # `torch.cuda.stream(None)` would start CUDA on a machine that has it.
            with torch.cuda.stream(self._user) if self._user is not None else nullcontext():
                self.buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            if self._user is not None:
                # New memory may be what other tensors have just given back: what is queued may still use it.
                self._released = self._user.record_event()
        if self._copies is not None:
            assert self._released is not None
            self._copies.wait_event(self._released)

    def copy(self, start: int, memory: Tensor) -> torch.cuda.Event:
        """Begin to copy pinned memory to the buffer's bytes from `start` on, beside the computation."""
        assert self._copies is not None
        with torch.cuda.stream(self._copies):
            self.buffer[start : start + len(memory)].copy_(memory, non_blocking=True)
        return self._copies.record_event()  # type: ignore[no-any-return]
