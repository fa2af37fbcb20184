"""Hidden states between a GPU and main memory, on streams of their own, beside the computation.

Floor: the bytes over the bus, both ways at once: 25 GB/s each over PCIe 4, 50 over PCIe 5 (derived). Hidden where a
micro-batch computes longer than its states travel. On a CPU nothing moves.
"""

from collections import deque

import torch
from torch import Tensor

# Tensors on their way in at once. The host runs far ahead of a GPU, and each of them has memory there from the moment
# at which the host asks for it.
UNDER_WAY = 4


class Transit:
    """The copies of one process to and from its device.

    A tensor that leaves must not be changed in place afterwards: its copy is not in the order of the computation.
    """

    def __init__(self, device: torch.device):
        self._device = device
        gpu = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if gpu else None
        self._in = torch.cuda.Stream(device) if gpu else None
        self._under_way: deque[torch.cuda.Event] = deque()

    def leave(self, tensor: Tensor) -> "tuple[Tensor, torch.cuda.Event | None]":
        """A tensor on its way to main memory, pinned there, and what to wait for before it has arrived."""
        if self._out is None or not tensor.is_cuda:
            return tensor, None
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # What computes the tensor is queued, and may not have run.
        self._out.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._out):
            host.copy_(tensor, non_blocking=True)
            arrived = self._out.record_event()
        # Its memory is not given to another tensor before it is copied.
        tensor.record_stream(self._out)
        return host, arrived

    def enter(self, host: Tensor, arrived: "torch.cuda.Event | None" = None) -> Tensor:
        """A tensor from main memory, there for all that is queued on the current stream from now on.

        Args:
            arrived: as `leave` gave it, of a tensor that may still be on its way out.
        """
        if self._in is None or host.is_cuda:
            return host
        user = torch.cuda.current_stream(self._device)
        self._under_way.append(user.record_event())
        if len(self._under_way) > UNDER_WAY:
            self._under_way.popleft().synchronize()
        if arrived is not None:
            self._in.wait_event(arrived)
        with torch.cuda.stream(self._in):
            tensor = host.to(self._device, non_blocking=True)
            there = self._in.record_event()
        user.wait_event(there)
        # It was allocated for another stream than the one that uses it.
        tensor.record_stream(user)
        return tensor
