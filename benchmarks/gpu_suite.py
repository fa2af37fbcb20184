"""Everything about minisp that only a GPU can show, by one command in at most nine minutes.

    python benchmarks/gpu_suite.py [--only gram ridge] [--label NAME]

Builds the extension, checks correctness on the GPU, and only then measures. Every part is a process of its own with a
time limit: one that fails, hangs or runs out of memory is reported and the others go on; what no time is left for is
said to be so. A checkpoint for the capped runs is written meanwhile. A table comes last; all numbers, with the
machine's description, go to benchmarks/results/gpu_<machine>.json, of which plot.py makes figures. What each part
expects, and why, stands at its function in gpu_parts.py and in gpu_end_to_end.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).parent
ROOT = HERE.parent
# Seconds for everything; a part gets what is left where that is less than its own limit.
BUDGET = 530
# What matters most comes first.
PARTS = {
    "build": 90,
    "correctness": 120,
    "ceilings": 30,
    "gram": 70,
    "saliency": 50,
    "end_to_end": 70,
    "capped_8": 100,
    "naive": 120,
    "ridge": 60,
    "cross_entropy": 20,
    "capped_24": 80,
    "capped_12": 90,
    "accumulation": 20,
}


def environment() -> dict[str, str]:
    """Of every child process: the tree as it is, and no network."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "HF_HUB_OFFLINE": "1"}


def command_of(part: str, result: Path, checkpoint: Path) -> list[str]:
    """The command line of a part."""
    if part == "build":
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if part == "correctness":
        files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]
        files.append("tests/test_cuda.py")
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernel or gpu", *files]
    options = ["--result", str(result), "--checkpoint", str(checkpoint)]
    return [sys.executable, str(HERE / "gpu_parts.py"), part, *options]


def start_checkpoint(out: Path, log: Path) -> subprocess.Popen[bytes]:
    """Begin to write a 7B-shaped checkpoint; the capped runs wait for it."""
    command = [sys.executable, str(HERE / "synthetic.py"), str(out), "--params", "7B"]
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=stream, stderr=stream)


def run_part(part: str, command: list[str], folder: Path, limit: float) -> dict[str, Any]:
    """Run one part; its figures, or what it said when it failed."""
    result, log = folder / f"{part}.json", folder / f"{part}.log"
    if limit <= 5:
        return {"status": "no time left", "seconds": 0.0, "tail": ""}
    start = time.perf_counter()
    with log.open("wb") as stream:
        try:
            status: int | str = subprocess.run(
                command, cwd=ROOT, env=environment(), stdout=stream, stderr=stream, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
    outcome = {"status": status, "seconds": time.perf_counter() - start, "tail": log.read_text("utf-8")[-1500:]}
    if result.exists():
        outcome["figures"] = json.loads(result.read_text("utf-8"))
    return outcome


def run_parts(parts: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Run the parts one after another, the checkpoint being written beside them."""
    deadline, outcomes = time.perf_counter() + BUDGET, {}
    checkpoint = folder / "checkpoint"
    needs = [part for part in parts if part.startswith("capped")]
    writer = start_checkpoint(checkpoint, folder / "checkpoint.log") if needs else None
    try:
        for part in parts:
            if part in needs and writer is not None:
                _wait(writer, deadline - time.perf_counter())
            limit = min(PARTS[part], deadline - time.perf_counter())
            outcome = run_part(part, command_of(part, folder / f"{part}.json", checkpoint), folder, limit)
            if part in needs and outcome["status"] != 0:
                outcome["tail"] += (folder / "checkpoint.log").read_text("utf-8")[-500:]
            outcomes[part] = outcome
            print(f"== {part}: status {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
            if outcome["status"] != 0:
                print(outcome["tail"], flush=True)
    finally:
        if writer is not None and writer.poll() is None:
            writer.kill()
            writer.wait()
    return outcomes


def _wait(writer: subprocess.Popen[bytes], limit: float) -> None:
    try:
        writer.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        # The part says that it found no checkpoint.
        writer.kill()
        writer.wait()


def main() -> None:
    """Run the parts, write the results, print the table."""
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--label", default="", help="appended to the result file's name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_parts([part for part in PARTS if part in args.only], Path(folder))
    name = "gpu_" + harness.machine_slug(harness.machine()) + (f"_{args.label}" if args.label else "")
    print(harness.write_json(name, {"parts": outcomes}))
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
