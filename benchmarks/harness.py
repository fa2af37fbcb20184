"""What every benchmark shares: the machine in words, one contender per child process, medians, a table, a JSON file."""

import ctypes
import hashlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class ChildRun:
    """One finished child process: what it wrote, its wall seconds, its peak resident bytes, and how alone it was.

    `disturbance` is the share of the machine's CPU time that other processes used meanwhile, in [0, 1] (NaN where
    /proc/stat does not exist). Two-threaded matrix code slows down several times when it has to share its cores, so
    a figure with more than a few per cent is no measurement.
    """

    output: dict[str, Any]
    seconds: float
    peak_rss: int
    disturbance: float


def machine() -> dict[str, Any]:
    """CPU, cores, memory in bytes, GPU and driver if any, and the versions that matter."""
    import transformers

    description: dict[str, Any] = {
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = torch.version.cuda
        with suppress(FileNotFoundError):
            description["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return description


def machine_slug(description: dict[str, Any]) -> str:
    """A short file-name part for a machine: its GPU, else its CPU and number of cores."""
    words = description["gpu"] or f"{description['cpu']} {description['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", words.lower())).strip("-")


def result_name(kind: str, label: str = "") -> str:
    """The name of a result file of this machine, without its ending."""
    return f"{kind}_{machine_slug(machine())}" + (f"_{label}" if label else "")


def run_child(command: Sequence[str | Path], result: Path, python: str | Path = sys.executable) -> ChildRun:
    """Run `python command...`, which writes JSON to `result`; raise `SystemExit` with what it printed if it fails.

    `python` is the interpreter, by default this one; another belongs to another environment.
    """
    log = result.with_suffix(".log")
    with log.open("wb") as stream:
        busy, start = _busy_seconds(), time.perf_counter()
        arguments = [*map(str, (python, *command))]
        redirect = [(os.POSIX_SPAWN_DUP2, stream.fileno(), target) for target in (1, 2)]
        child = os.posix_spawn(arguments[0], arguments, os.environ, file_actions=redirect)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with wait status {status}:\n{log.read_text('utf-8')[-4000:]}")
    foreign = _busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    return ChildRun(
        output=json.loads(result.read_text("utf-8")),
        seconds=seconds,
        peak_rss=usage.ru_maxrss * 1024,
        disturbance=max(0.0, foreign) / (seconds * (os.cpu_count() or 1)),
    )


def machine_line(data: dict[str, Any]) -> str:
    """The machine of a result file in one line."""
    machine = data["machine"]
    name = machine["gpu"] or f"{machine['cpu'].replace('(R)', '')}, {machine['cores']} cores"
    return f"{name}, torch {machine['torch']}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (smallest–largest)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def say(words: str) -> None:
    """A line of progress, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {words}", flush=True)


def own_peak_rss() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sample_seconds(function: Callable[[], object], repeats: int = 9) -> list[float]:
    """Wall seconds of every call of `function()` after one warm-up call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def gemm_ceiling(dtype: torch.dtype, n: int = 2048, device: torch.device | None = None) -> float:
    """FLOP/s of the fastest of nine n×n×n matrix products, 2n³ operations each: a ceiling, so no median."""
    device = device or torch.device("cpu")
    n = n if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)
        synchronize(device)

    return 2 * n**3 / min(sample_seconds(product))


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> int:
    """Bytes in use now; `peak` then says how many were, at most, since."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # What the allocator holds in reserve would hide new memory behind memory that is resident already.
    ctypes.CDLL(None).malloc_trim(0)
    # Linux starts the high-water mark of resident memory anew on request (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return _status_bytes("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; the first column is left-aligned, the others right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def write_json(name: str, content: dict[str, Any]) -> Path:
    """Write `content` with this machine's description to benchmarks/results/`name`.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_whole(path, {"machine": machine(), **{key: value for key, value in content.items() if key != "machine"}})
    return path


def resume_json(name: str, measured_on: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run on the same data has left under the name; nothing where there was none.

    Raises:
        SystemExit: what is there was measured on something else.
    """
    found = read_json(name)
    if found and found.get("measured on") != measured_on:
        raise SystemExit(
            f"{RESULTS / name}.json: expected rows measured on {measured_on}, got {found.get('measured on')}. Move the "
            "file away, or repeat the arguments and the version of the earlier run."
        )
    return found


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """16 hex digits of the SHA-256 of tensors: equal where their values, types and shapes are."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tensor.shape, tensor.dtype)).encode())
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def read_json(name: str) -> dict[str, Any]:
    """What `write_json` has left under the name; nothing where it has not."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file holds either what it held before, or all of this."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    unfinished.replace(path)


def _status_bytes(name: str) -> int:
    return 1024 * int(_first_match("/proc/self/status", rf"{name}:\s*(\d+) kB"))


def _first_match(path: str, pattern: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text("utf-8"))
    except OSError:
        return ""
    return found.group(1).strip() if found else ""


def _busy_seconds() -> float:
    """CPU seconds the whole machine has worked since boot: the first line of /proc/stat less idle and iowait."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return float("nan")
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
