"""Everything about minisp that only a GPU can show, by one command in at most nine minutes.

    python benchmarks/gpu_suite.py [--only gram ridge] [--label NAME]

Builds the extension, checks correctness on the GPU, and only then measures. Every part has processes of its own and a
time limit: one that fails, hangs or runs out of memory is reported, with the figures that it had written by then, and
the others go on; what no time is left for is said to be so. A checkpoint for the capped runs is written meanwhile. All
numbers, with the machine's description, go to benchmarks/results/gpu_<machine>.json, anew after every part; a table
comes last, and plot.py makes figures. What each part expects, and why, stands at its function in gpu_parts.py and in
gpu_end_to_end.py.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
# Seconds from the start of the process to the end of the last part; one gets what is left where that is less than its
# own limit. Nine minutes leave 40 s more, for folders to go.
BUDGET = 500
# What matters most comes first.
PARTS = {
    "build": 90,
    "correctness": 240,
    "ceilings": 30,
    "gram": 70,
    "saliency": 70,
    "end_to_end": 120,
    "capped_8": 130,
    "naive": 120,
    "ridge": 60,
    "cross_entropy": 30,
    "capped_24": 90,
    "capped_12": 100,
    "accumulation": 30,
}
# Tests of kernels that launch none on a GPU.
WITHOUT_GPU = ("test_compiles.py", "test_interpreter.py")
Outcomes = dict[str, dict[str, Any]]


def environment() -> dict[str, str]:
    """Of every child process: the tree as it is, and no network."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "HF_HUB_OFFLINE": "1"}


def commands_of(part: str, folder: Path, scratch: Path) -> list[list[str]]:
    """The command lines of a part, which run side by side.

    Args:
        folder: holds the checkpoint, gets the part's figures, and has a folder named like the part for what it writes.
        scratch: a folder for what waits in a capped run.
    """
    if part == "build":
        return [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
    if part == "correctness":
        # Compiling the kernels for hundreds of cases takes most of the time, and one core of each process.
        files = {*(ROOT / "tests" / "kernels").glob("test_*.py"), ROOT / "tests" / "test_cuda.py"}
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernel or gpu"]
        # What is stopped in the middle has shown no failure: it had better stop by itself.
        pytest += ["--maxfail=3", "--tb=short"]
        return [[*pytest, str(path)] for path in sorted(files) if path.name not in WITHOUT_GPU]
    options = {
        "result": folder / f"{part}.json",
        "checkpoint": folder / "checkpoint",
        "out": folder / part / "out",
        "scratch": scratch,
    }
    words = [word for name, path in options.items() for word in (f"--{name}", str(path))]
    return [[sys.executable, str(HERE / "gpu_parts.py"), part, *words]]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Begin to run a command in a process group of its own: what it starts can be ended with it."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and all that it has started."""
    # Until it has been waited for, nobody else can have its number.
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        # A driver that hangs does not let it go.
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)


def start_checkpoint(out: Path, log: Path) -> subprocess.Popen[bytes]:
    """Begin to write a 7B-shaped checkpoint; the capped runs wait for it."""
    return start([sys.executable, str(HERE / "synthetic.py"), str(out), "--params", "7B"], log)


@contextmanager
def room_for(part: str, folder: Path) -> Iterator[Path]:
    """A folder for what a part writes, and, yielded, one for what waits, where there is most room, which may be memory.

    Both go whatever happens to the part: they may hold tens of gigabytes.
    """
    places = [path for path in (folder, Path("/dev/shm")) if path.is_dir()]
    roomy = max(places, key=lambda path: shutil.disk_usage(path).free)
    written = folder / part
    written.mkdir()
    with TemporaryDirectory(dir=roomy, prefix="minisp-gpu-suite-") as waiting:
        try:
            yield Path(waiting)
        finally:
            shutil.rmtree(written)


def run_part(part: str, commands: list[list[str]], folder: Path, limit: float) -> dict[str, Any]:
    """Run one part: its figures as far as it got, and the end of what its processes said."""
    if limit <= 5:
        return {"status": "no time left", "seconds": 0.0, "tail": ""}
    begin = time.perf_counter()
    logs = [folder / f"{part}_{number}.log" for number in range(len(commands))]
    children: list[subprocess.Popen[bytes]] = []
    status: int | str = 0
    try:
        for command, log in zip(commands, logs, strict=True):
            children.append(start(command, log))
        for child in children:
            status = child.wait(max(0.0, begin + limit - time.perf_counter())) or status
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        for child in children:
            stop(child)
    tails = "\n".join(tail(log, 3000) for log in logs)
    outcome: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - begin, "tail": tails}
    try:
        return outcome | {"figures": json.loads((folder / f"{part}.json").read_text("utf-8"))}
    except (OSError, ValueError):
        # None were written.
        return outcome


def tail(log: Path, length: int) -> str:
    """The end of a log; a process that was killed may have left half a character."""
    return log.read_text("utf-8", errors="replace")[-length:]


def run_parts(parts: list[str], folder: Path, keep: Callable[[Outcomes], object], seconds: float = BUDGET) -> Outcomes:
    """Run the parts one after another, the checkpoint being written beside them.

    Args:
        keep: called after every part with all outcomes so far.
        seconds: for all of them.
    """
    deadline, outcomes = time.perf_counter() + seconds, Outcomes()
    log = folder / "checkpoint.log"
    needs = [part for part in parts if part.startswith("capped")]
    writer = start_checkpoint(folder / "checkpoint", log) if needs else None
    try:
        for part in parts:
            if part in needs and writer is not None:
                # Most of the time it has had that of all earlier parts.
                _wait(writer, deadline - PARTS[part] - time.perf_counter())
            with room_for(part, folder) as scratch:
                limit = min(PARTS[part], deadline - time.perf_counter())
                outcome = run_part(part, commands_of(part, folder, scratch), folder, limit)
            if part in needs and outcome["status"] != 0:
                outcome["tail"] += tail(log, 500)
            outcomes[part] = outcome
            keep(outcomes)
            print(f"== {part}: status {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
            if outcome["status"] != 0:
                print(outcome["tail"], flush=True)
    finally:
        if writer is not None:
            stop(writer)
    return outcomes


def _wait(writer: subprocess.Popen[bytes], limit: float) -> None:
    try:
        writer.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        # The part says that it found no checkpoint.
        stop(writer)


def machine() -> dict[str, Any]:
    """The machine's description, from another process: this one shall take no memory of the GPU."""
    command = [sys.executable, "-c", "import json, harness; print(json.dumps(harness.machine()))"]
    try:
        answer = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True, timeout=60).stdout
        found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        # The parts say more about what is wrong.
        found = {"gpu": "unknown", "error": str(error)}
    return found


def age() -> float:
    """Seconds since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


def main() -> None:
    """Run the parts, write the results, print the table."""
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--label", default="", help="appended to the result file's name")
    args = parser.parse_args()
    # Children are in groups of their own: whoever ends this process must let it end them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    here = machine()
    name = "gpu_" + harness.machine_slug(here) + (f"_{args.label}" if args.label else "")
    path = harness.RESULTS / f"{name}.json"
    harness.RESULTS.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="minisp-gpu-suite-") as folder:
        parts = [part for part in PARTS if part in args.only]
        outcomes = run_parts(
            parts,
            Path(folder),
            lambda so_far: harness.write_whole(path, {"machine": here, "parts": so_far}),
            BUDGET - age(),
        )
    print(path)
    rows = []
    for part, outcome in outcomes.items():
        state = "ok" if outcome["status"] == 0 else f"FAILED ({outcome['status']})"
        rows.append((part, state, ""))
        rows += [("", row["name"], row["text"]) for row in outcome.get("figures", {}).get("summary", [])]
    harness.print_table("GPU suite", ["part", "", ""], rows)
    if any(outcome["status"] != 0 for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
