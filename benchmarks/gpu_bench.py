"""What the parts of gpu_suite.py share: where they measure, on what shapes, and how a GPU's time is taken.

`Bench` is the only seam between a GPU and a rehearsal: a dry run on a CPU, through Triton's interpreter and on small
shapes, which goes through the same lines and whose figures mean nothing.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import harness
import torch
from cases import Case, Place, Shape, check, checked_shape

# More than any GPU's second-level cache.
FLUSH_BYTES = 2**28
# Clock cycles that a GPU waits before a timed call, about 0.3 ms: the host has queued the call by then, so that what is
# timed is the GPU's work and not the launcher's.
WAIT_CYCLES = 500_000
Figures = dict[str, Any]
Contenders = dict[str, Callable[[], object]]
T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """Where a part measures.

    Attributes:
        rehearsal: on a CPU, small, and without meaning; else on the GPU.
    """

    rehearsal: bool = False

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type: bfloat16, which Triton's interpreter does not multiply."""
        return torch.float16 if self.rehearsal else torch.bfloat16

    def shapes(self, real: T, small: T) -> T:
        """The shapes to measure."""
        return small if self.rehearsal else real

    def synchronize(self) -> None:
        """Wait for what was queued."""
        if not self.rehearsal:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what nothing holds, and count the peak of memory anew."""
        gc.collect()
        if not self.rehearsal:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """The most that was allocated on the GPU since `free`; 0 in a rehearsal."""
        return 0 if self.rehearsal else torch.cuda.max_memory_allocated()

    def memory_bytes(self) -> float:
        """Of the GPU; in a rehearsal that of an H100."""
        return 80e9 if self.rehearsal else torch.cuda.get_device_properties(0).total_memory

    def limit_memory(self, gigabytes: int) -> None:
        """Let this process have so much of the GPU's memory."""
        if not self.rehearsal:
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / self.memory_bytes()))

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of the GPU for one call, of the wall clock in a rehearsal."""
        if self.rehearsal:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(WAIT_CYCLES)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def race(
        self, contenders: Contenders, *, budget: float = 0.3, before: Callable[[], object] = lambda: None
    ) -> Figures:
        """[p20, p50, p80] seconds of every contender, interleaved, after a first call, the second-level cache
        overwritten before each, and "name: extra_bytes", what its first call allocated at most beside what was there;
        None, and "name: error", for one that fails.

        Args:
            contenders: what to call, by name.
            budget: seconds that one contender may take about; it is called 3 to 9 times.
            before: called before each call, not timed.
        """
        figures: Figures = {}
        first: dict[str, float] = {}
        flush = torch.empty(self.shapes(FLUSH_BYTES, 16), dtype=torch.uint8, device=self.device)
        for name, call in contenders.items():
            before()
            held = 0 if self.rehearsal else harness.start_peak(self.device)
            try:
                call()
                figures[f"{name}: extra_bytes"] = self.peak_bytes() - held
                before()
                first[name] = self.timed(call)
            except Exception as error:  # one that is missing or has no room is no reason to lose the rest
                figures[name], figures[f"{name}: error"] = None, f"{type(error).__name__}: {error}"[:200]
        times: dict[str, list[float]] = {name: [] for name in first}
        most = self.shapes(9, 3)
        repeats = {name: max(3, min(most, int(budget / max(once, 1e-6)))) for name, once in first.items()}
        for number in range(max(repeats.values(), default=0)):
            for name in first:
                if number < repeats[name]:
                    before()
                    flush.fill_(number)
                    times[name].append(self.timed(contenders[name]))
        return figures | {name: quantiles(found) for name, found in times.items()}

    def measure(
        self, build: Callable[[Shape, Place], Case], shape: Shape, dtype: torch.dtype | None = None, budget: float = 0.3
    ) -> Figures:
        """A row: shape, least work, errors of minisp's contenders in units of what is allowed, and a race of all.

        Raises:
            AssertionError: an error is larger than what is allowed, see `cases.check`.
        """
        self.free()
        place = Place(self.device, dtype or self.half)
        small, errors = build(checked_shape(shape), place), {}
        for name in small.contenders:
            if name.startswith("minisp"):
                try:
                    errors[name] = check(small, name)
                except AssertionError:
                    raise
                except Exception as error:  # the race goes on without it
                    errors[name] = f"{type(error).__name__}: {error}"[:200]
        del small
        case = build(shape, place)
        row = {"shape": shape, "dtype": str(place.dtype).removeprefix("torch."), "errors": errors}
        row |= {"flops": case.flops, "bytes": case.num_bytes}
        return row | self.race(case.contenders, budget=budget, before=case.before)

    def seconds(self, call: Callable[[], object]) -> float:
        """Median seconds of one call, which must not fail."""
        found = self.race({"it": call})
        if found["it"] is None:
            raise SystemExit(f"GPU suite: {found['it: error']}")
        return float(found["it"][1])


def quantiles(times: list[float]) -> list[float]:
    """[p20, p50, p80]."""
    ordered = sorted(times)
    return [ordered[int(q * (len(ordered) - 1) + 0.5)] for q in (0.2, 0.5, 0.8)]


def line(name: str, text: str) -> dict[str, str]:
    """One line of the closing table."""
    return {"name": name, "text": text}


def told(row: Figures) -> str:
    """A row of `Bench.measure` in words: the rate of minisp's first contender, how much longer others take, errors."""
    timed = {name: found[1] for name, found in row.items() if isinstance(found, list)}
    ours = next((name for name in timed if name.startswith("minisp")), None)
    failed = [f"{key} {text[:60]}" for key, text in row.items() if key.endswith(": error")]
    if ours is None:
        return ", ".join(["minisp was not timed", *failed])
    work, unit = (row["flops"], "TFLOP/s") if row["flops"] else (row["bytes"], "TB/s")
    words = [f"{work / timed[ours] / 1e12:.3g} {unit} ({ours.removeprefix('minisp ')})"]
    words += [f"×{seconds / timed[ours]:.2f} of {name}" for name, seconds in timed.items() if name != ours]
    extra = row.get(f"{ours}: extra_bytes")
    return ", ".join([*words, *([f"{extra / 1e9:.2f} GB beside"] if extra else []), *failed])
