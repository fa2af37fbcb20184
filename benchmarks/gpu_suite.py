"""Everything about minisp that only a GPU can show, in calls of at most nine minutes.

    python benchmarks/gpu_suite.py [--call 1|2|3] [--only gram ridge] [--label NAME]
    python benchmarks/gpu_suite.py --rehearse       # every line of it on a CPU; figures mean nothing and are not kept

The first call builds the extension, checks correctness on the GPU, and only then measures; what matters most comes
first. Every part has processes of its own and a time limit, and the limits of a call keep to its time: one that fails,
hangs or runs out of memory is reported, with the figures that it had written by then, and the others go on. A
checkpoint for the runs from disk is written meanwhile. All numbers, with the machine's description, go to
benchmarks/results/gpu_<machine>.json, anew after every part and beside what other calls have left there; each part has
its date and versions. A table comes last. What each part expects, and why, stands in gpu_operations.py, gpu_parts.py
and gpu_end_to_end.py.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
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
# How much longer a CPU may take for a rehearsal.
PATIENCE = 20
# Limits in seconds, about 1.5 times what is expected of a part, its imports (10 s) included.
CALLS = {
    1: {
        "build": 60, "correctness": 110, "ceilings": 30, "gram": 50, "saliency": 45, "ridge": 45, "cross_entropy": 20,
        "end_to_end": 120,
    },
    2: {"from_disk": 200, "norms": 20, "product": 25, "attention": 25, "layer": 40, "capped_8": 130},
    3: {"naive": 130, "naive_tf32": 80, "capped_24": 80, "capped_12": 90, "accumulation": 30},
}  # fmt: skip
PARTS = {part: limit for limits in CALLS.values() for part, limit in limits.items()}
FROM_DISK = ("from_disk", "capped_8", "capped_12", "capped_24")
# Bytes of the 7B-shaped checkpoint that they read, and of what is cut from it at most.
CHECKPOINT_BYTES, RESULT_BYTES = 13.5e9, 12e9
# Processes that share the tests of correctness: compiling kernels takes most of the time, and one core of each.
SHARDS = max(2, min(12, (os.cpu_count() or 1) - 2))
# Tests of kernels that launch none on a GPU.
WITHOUT_GPU = ("test_compiles.py", "test_interpreter.py")
Outcomes = dict[str, dict[str, Any]]
# A command line, and what its environment has beside that of all.
Command = tuple[list[str], dict[str, str]]


def environment(folder: Path | None, rehearse: bool = False) -> dict[str, str]:
    """Of every child process: the tree as it is, no network, and one folder for compiled kernels."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "HF_HUB_OFFLINE": "1"}
    found |= {"TRITON_CACHE_DIR": str(folder / "triton")} if folder is not None else {}
    return found | ({"TRITON_INTERPRET": "1"} if rehearse else {})


def commands_of(part: str, folder: Path, scratch: Path, *, rehearse: bool = False) -> list[Command]:
    """The commands of a part, which run side by side.

    Args:
        folder: gets the part's figures, and has a folder named like the part for what it writes.
        scratch: a folder for what waits in a run from disk.
        rehearse: on a CPU; nothing is built, and tests are only collected.
    """
    if part == "build":
        return [([sys.executable, "setup.py", "-q", *(["--name"] if rehearse else ["build_ext", "--inplace"])], {})]
    if part == "correctness":
        files = {*(ROOT / "tests" / "kernels").glob("test_*.py"), ROOT / "tests" / "runs" / "test_cuda.py"}
        named = [str(path) for path in sorted(files) if path.name not in WITHOUT_GPU]
        # Without the plugins that pyproject.toml's options ask for: a machine with a GPU may not have them.
        pytest = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib"]
        pytest += ["-p", "no:cacheprovider", "-p", "shard", "-m", "kernel or gpu"]
        # What is stopped in the middle has shown no failure: it had better stop by itself.
        pytest += ["--maxfail=3", "--tb=short", *(["--collect-only"] if rehearse else [])]
        count = 2 if rehearse else SHARDS
        return [([*pytest, *named], {"MINISP_SHARD": f"{number}/{count}"}) for number in range(count)]
    options = {"result": folder, "checkpoint": folder / "checkpoint", "out": folder / part, "scratch": scratch}
    words = [word for name, path in options.items() for word in (f"--{name}", str(path))]
    return [([sys.executable, str(HERE / "gpu_parts.py"), part, *words, *(["--rehearse"] if rehearse else [])], {})]


def start(command: Command, log: Path, shared: dict[str, str]) -> subprocess.Popen[bytes]:
    """Begin to run a command in a process group of its own: what it starts can be ended with it."""
    words, own = command
    with log.open("wb") as stream:
        return subprocess.Popen(words, cwd=ROOT, env=shared | own, stdout=stream, stderr=stream, start_new_session=True)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and all that it has started."""
    # Until it has been waited for, nobody else can have its number.
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        # A driver that hangs does not let it go.
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)


def start_checkpoint(folder: Path, log: Path, rehearse: bool = False) -> subprocess.Popen[bytes]:
    """Begin to write a 7B-shaped checkpoint, which the runs from disk wait for."""
    free = shutil.disk_usage(folder).free
    if free < CHECKPOINT_BYTES + RESULT_BYTES and not rehearse:
        needed = (CHECKPOINT_BYTES + RESULT_BYTES) / 1e9
        text = f"no room for the checkpoint and a result: needs {needed:.0f} GB in {folder}, has {free / 1e9:.0f} GB"
        return start(([sys.executable, "-c", f"raise SystemExit({text!r})"], {}), log, environment(None))
    words = [str(folder / "checkpoint"), "--params", "tiny" if rehearse else "7B"]
    return start(([sys.executable, str(HERE / "synthetic.py"), *words], {}), log, environment(None))


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


def run_part(
    part: str, commands: Sequence[Command], folder: Path, limit: float, shared: dict[str, str]
) -> dict[str, Any]:
    """Run one part: its figures as far as it got, and the end of what its processes said."""
    if limit <= 5:
        return {"status": "no time left", "seconds": 0.0, "tail": ""}
    begin = time.perf_counter()
    logs = [folder / f"{part}_{number}.log" for number in range(len(commands))]
    children: list[subprocess.Popen[bytes]] = []
    status: int | str = 0
    try:
        for command, log in zip(commands, logs, strict=True):
            children.append(start(command, log, shared))
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


def run_parts(
    parts: list[str], folder: Path, keep: Callable[[Outcomes], object], seconds: float = BUDGET, rehearse: bool = False
) -> Outcomes:
    """Run the parts one after another, the checkpoint being written beside them.

    Args:
        keep: called after every part with all outcomes so far.
        seconds: for all of them.
    """
    patience = PATIENCE if rehearse else 1
    deadline, outcomes = time.perf_counter() + seconds * patience, Outcomes()
    shared, log = environment(folder, rehearse), folder / "checkpoint.log"
    needs = [part for part in parts if part in FROM_DISK]
    writer = start_checkpoint(folder, log, rehearse) if needs else None
    try:
        for part in parts:
            if part in needs and writer is not None:
                # Most of the time it has had that of all earlier parts.
                _wait(writer, deadline - PARTS[part] - time.perf_counter())
            harness.say(part)
            with room_for(part, folder) as scratch:
                limit = min(PARTS[part] * patience, deadline - time.perf_counter())
                commands = commands_of(part, folder, scratch, rehearse=rehearse)
                outcome = run_part(part, commands, folder, limit, shared)
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
        answer = subprocess.run(command, env=environment(None), stdout=subprocess.PIPE, check=True, timeout=60).stdout
        found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        # The parts say more about what is wrong.
        found = {"gpu": "unknown", "error": str(error)}
    return found


def merge(path: Path, here: dict[str, Any], outcomes: Outcomes) -> None:
    """Put outcomes beside what earlier calls on this machine have left in its file; each has its date and versions."""
    known = json.loads(path.read_text("utf-8"))["parts"] if path.exists() else {}
    said = {name: here[name] for name in ("torch", "cuda", "driver", "python") if name in here}
    said["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    # What has been written by this call keeps its date.
    dated = {
        part: known[part] if new.items() <= known.get(part, {}).items() else new | said
        for part, new in outcomes.items()
    }
    harness.write_whole(path, {"machine": here, "parts": known | dated})


def age() -> float:
    """Seconds since this process began, imports included."""
    return time.time() - psutil.Process().create_time()


def chosen_parts(only: list[str] | None, call: int, rehearse: bool) -> list[str]:
    """What to run, in the order of `PARTS`; the extension is built first where there is none."""
    parts = [part for part in PARTS if part in (only or (PARTS if rehearse else CALLS[call]))]
    is_built = any((ROOT / "minisp").glob("_C*.so"))
    return parts if is_built or "build" in parts else ["build", *parts]


def table(data: dict[str, Any]) -> str:
    """Every part, and what its figures say in short."""
    rows = []
    for part, outcome in data["parts"].items():
        status = outcome.get("status")
        rows.append((part, "ok" if status == 0 else f"FAILED ({status})", ""))
        rows += [("", row["name"], row["text"]) for row in outcome.get("figures", {}).get("summary", [])]
    return harness.markdown(["part", "", ""], rows)


def main() -> None:
    """Run the parts, write the results, print the table."""
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU.")
    parser.add_argument("--call", type=int, choices=CALLS, default=1, help="which of the calls that make the suite")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--label", default="", help="appended to the result file's name")
    parser.add_argument("--rehearse", action="store_true", help="every line on a CPU, with small shapes")
    args = parser.parse_args()
    # Children are in groups of their own: whoever ends this process must let it end them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    here = machine()
    name = "gpu_" + harness.machine_slug(here) + (f"_{args.label}" if args.label else "")
    path = harness.RESULTS / f"{name}.json"
    harness.RESULTS.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="minisp-gpu-suite-") as folder:
        parts = chosen_parts(args.only, args.call, args.rehearse)
        target = Path(folder) / "rehearsal.json" if args.rehearse else path
        outcomes = run_parts(
            parts, Path(folder), lambda so_far: merge(target, here, so_far), BUDGET - age(), args.rehearse
        )
    print("A rehearsal: nothing was measured." if args.rehearse else path)
    print(table({"parts": outcomes}))
    if any(outcome["status"] != 0 for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
