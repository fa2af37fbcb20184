"""The processes of one run, as torchrun starts them: windows are shared out, sums make the statistics one.

Statistics are sums over tokens, so the sum over the processes is what one process would have found, up to the order of
summation. Without torchrun, one process does it all, and nothing here does anything.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from minisp.errors import DistributedError, one_line

Items = TypeVar("Items", range, Tensor)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def share(self, items: Items) -> Items:
        """This process's part of a sequence or of a tensor's rows: every `size`-th one."""
        return items[self.rank :: self.size]

    def sum_(self, *tensors: Tensor) -> None:
        """Add up each tensor over the processes, in place.

        Raises:
            DistributedError: another process is gone.
        """
        for tensor in tensors:
            self._reduce_(tensor, distributed.ReduceOp.SUM)

    def total(self, value: int) -> int:
        """The sum of the processes' values."""
        return self._reduced(value, distributed.ReduceOp.SUM)

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        return self._reduced(value, distributed.ReduceOp.MAX)

    def everywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set in every process."""
        if self.size == 1:
            return list(flags)
        counts = torch.tensor([int(flag) for flag in flags], device=self._device)
        self._reduce_(counts, distributed.ReduceOp.SUM)
        return [count == self.size for count in counts.tolist()]

    def of_first(self, value: Value) -> Value:
        """The first process's value of something that can be pickled.

        Raises:
            DistributedError: another process is gone.
        """
        if self.size == 1:
            return value
        values = [value]
        try:
            distributed.broadcast_object_list(values)
        except RuntimeError as error:
            raise self._lost(error) from error
        return values[0]

    def wait(self) -> None:
        """Until every process is here."""
        self.most(0)

    @property
    def _device(self) -> str:
        """Where the processes can add up: NCCL takes tensors of GPUs alone."""
        return "cuda" if self.size > 1 and distributed.get_backend() == "nccl" else "cpu"

    def _reduced(self, value: int, operation: "distributed.ReduceOp.RedOpType") -> int:
        if self.size == 1:
            return int(value)
        tensor = torch.tensor(value, device=self._device)
        self._reduce_(tensor, operation)
        return int(tensor)

    def _reduce_(self, tensor: Tensor, operation: "distributed.ReduceOp.RedOpType") -> None:
        if self.size == 1:
            return
        try:
            distributed.all_reduce(tensor, op=operation)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> DistributedError:
        return DistributedError(
            f"Process {self.rank} of {self.size}: expected all processes of the run to take part, but one is gone "
            f"({one_line(error)[:200]}) Its own message says why; start the run again with --resume."
        )


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, joined by NCCL for GPUs and by gloo for CPUs; alone without torchrun.

    A process group that the caller made already is used as it is.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
    else:
        if device.type == "cuda":
            # NCCL takes the current device of each process.
            torch.cuda.set_device(device)
        # The others wait while the first one prepares text or writes; torchrun ends them where one is lost.
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        try:
            yield Ranks(distributed.get_rank(), distributed.get_world_size())
        finally:
            distributed.destroy_process_group()
