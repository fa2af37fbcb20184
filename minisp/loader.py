"""Weights on their way from disk to where they compute: large reads into a few reusable buffers, ahead of their use.

    read(i + 1) in a thread, into one slot     |    compute(i) on the views of another slot

On a CPU a slot is one buffer, and parameters stored in the compute type are views of it: nothing is copied. On a GPU it
is pinned host memory and device memory, joined by a copy stream.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import cycle

import torch
from torch import Tensor

from minisp.checkpoint import DTYPE_OF, Checkpoint
from minisp.files import helper_thread

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

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[start : start + place.num_bytes].view(DTYPE_OF[place.dtype]).view(place.shape)
                for name, start in offsets.items()
                for place in [places[name]]
            }

        host = views(slot.host)
        self.checkpoint.read_into(host)
        self._check(host)
        slot.send(end)
        return views(slot.buffer)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        # A weight passes several times; its values are looked at once.
        for name, tensor in tensors.items():
            if name not in self._checked:
                self.checkpoint.check_finite(name, tensor)
                self._checked.add(name)


class _Slot:
    """One buffer of bytes where weights compute, and on a GPU the pinned one that they come through."""

    def __init__(self, device: torch.device):
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # What computes with the slot, as its caller has it; the loader's thread has a current stream of its own.
        self._user: torch.cuda.Stream | None = None
        self._released: torch.cuda.Event | None = None
        self.buffer = self.host = torch.empty(0, dtype=torch.uint8)

    def release(self) -> None:
        """Note what was queued so far: kernels that may still read the slot's earlier content."""
        if self._copies is not None:
            self._user = torch.cuda.current_stream(self._device)
            self._released = self._user.record_event()

    def reserve(self, size: int) -> None:
        if len(self.host) >= size:
            return
        self.buffer = self.host = torch.empty(0, dtype=torch.uint8)
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=self._copies is not None)
        if self._user is None:
            self.buffer = self.host
            return
        with torch.cuda.stream(self._user):
            self.buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        # New memory may be what other tensors have just given back: what is queued may still use it.
        self._released = self._user.record_event()

    def send(self, size: int) -> None:
        """Copy to the GPU beside the computation; returns when the copy is done, so that nobody has to wait for it."""
        if self._copies is None:
            return
        assert self._released is not None
        self._copies.wait_event(self._released)
        with torch.cuda.stream(self._copies):
            self.buffer[:size].copy_(self.host[:size], non_blocking=True)
        self._copies.synchronize()
