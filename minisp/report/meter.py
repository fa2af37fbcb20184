"""What each phase of a run took: wall time, and the memory that the process had taken at most when it ended."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Meter:
    """Measurements by phase, in the order in which the phases ended.

    Attributes:
        seconds: wall time.
        resident: highest resident memory of the process so far, in bytes, read when the phase ended.
        device: the same of the memory that torch has allocated on the current GPU; empty without one.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as a phase of this name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
            self.resident[name] = peak_resident()
            if torch.cuda.is_initialized():
                self.device[name] = torch.cuda.max_memory_allocated()


def peak_resident() -> int:
    """Highest resident memory of this process so far, in bytes."""
    # Linux counts in units of 1024 bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
