"""The contenders of `minify_cpu.py`: what was measured of each, who is the opponent, and what is printed of them."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import harness

# What minify() does before it minifies; the opponent's figure has no loading and no tokenising in it either.
NOT_MINIFYING = ("loading", "calibration text")
# A naive contender so many times slower than the other one is no opponent; nor is one with such seconds a run.
SLOW, PATIENCE = 3.0, 1200.0


@dataclass
class Contender:
    """One row: how it is started, what its first run gave, and time and memory of all runs."""

    name: str
    options: dict[str, Any]
    repeats: int
    quality: dict[str, float] = field(default_factory=dict)
    kept: list[list[int]] = field(default_factory=list)
    minify_seconds: list[float] = field(default_factory=list)
    runs: list[harness.ChildRun] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    def add(self, run: harness.ChildRun) -> None:
        """Count a run: the seconds of its minification, and the peak memory of its process."""
        phases = run.output["seconds"]
        self.runs.append(run)
        self.phases.append(phases)
        self.minify_seconds.append(sum(s for phase, s in phases.items() if phase not in NOT_MINIFYING))

    @property
    def naive(self) -> bool:
        """Whether this is the opponent, in one of its types."""
        return self.name.startswith("naive")

    @property
    def seconds(self) -> float:
        """Median of the runs."""
        return statistics.median(self.minify_seconds)

    @property
    def peak(self) -> float:
        """Median of the runs, in bytes."""
        return statistics.median(run.peak_rss for run in self.runs)

    def summary(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "name": self.name,
            "options": self.options,
            **self.quality,
            "widths": [len(indices) for indices in self.kept],
            "minify_seconds": self.minify_seconds,
            "phases": self.phases,
            "peak_rss_bytes": [run.peak_rss for run in self.runs],
            "disturbance": [run.disturbance for run in self.runs],
        }


def agreement(kept: list[list[int]], reference: list[list[int]]) -> float:
    """Share of the units in `reference` that `kept` has too."""
    common = sum(len(set(a) & set(b)) for a, b in zip(kept, reference, strict=True))
    return common / sum(len(b) for b in reference)


def print_correctness(contenders: list[Contender], dense: dict[str, float]) -> None:
    """Perplexity, on text and on the foreign domain, and kept units of every contender's first run."""
    first = contenders[0]

    def values(quality: dict[str, float]) -> list[str]:
        return [word for key, base in dense.items() for word in (f"{quality[key]:.3f}", f"×{quality[key] / base:.4f}")]

    rows = [["dense", *values(dense), "", ""]]
    for c in contenders:
        units, share = sum(map(len, c.kept)), f"{agreement(c.kept, first.kept):.2%}"
        rows.append([c.name, *values(c.quality), f"{units}", share])
    columns = ["", "perplexity", "of dense", "documentation", "of dense", "units kept", f"kept as {first.name} does"]
    harness.print_table("Correctness", columns, rows)


def opponent(contenders: list[Contender]) -> Contender:
    """What ratios refer to: the fastest naive contender; the first one where none ran."""
    return min((c for c in contenders if c.naive), key=lambda c: c.seconds, default=contenders[0])


def print_speed(contenders: list[Contender]) -> None:
    """Medians (and range) of seconds and peak memory, with ratios to the opponent."""
    base, rows = opponent(contenders), []
    for c in contenders:
        rows.append(
            (
                c.name,
                f"{c.seconds:.1f} ({min(c.minify_seconds):.1f}–{max(c.minify_seconds):.1f})",
                f"×{base.seconds / c.seconds:.2f}",
                f"{c.peak / 2**20:.0f}",
                f"{c.peak / base.peak:.2f}",
                len(c.runs),
                f"{max(run.disturbance for run in c.runs):.0%}",
            )
        )
    columns = ["", "minify s", "speed", "peak MiB", "memory", "runs", "disturbed up to"]
    harness.print_table(f"Speed and memory, interleaved runs; ratios to {base.name}", columns, rows)


def judged(contenders: list[Contender], seconds: dict[str, float], windows: int) -> tuple[list[Contender], list[str]]:
    """As `without_the_hopeless`, from the seconds that one window took."""
    fastest, notes = min(seconds, key=lambda name: seconds[name]), []
    for name, own in seconds.items():
        slower = own / seconds[fastest]
        if slower <= SLOW:
            continue
        contender = next(c for c in contenders if c.name == name)
        contender.repeats = 1 if own * windows <= PATIENCE else 0
        what = "one run only" if contender.repeats else "not run"
        notes.append(f"{name}: {what}: one window takes ×{slower:.1f} the seconds of {fastest}, {own:.1f} s.")
        say(notes[-1])
    return [c for c in contenders if c.repeats], notes


def say(words: str) -> None:
    """A line of progress, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {words}", flush=True)
