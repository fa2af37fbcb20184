"""Everything about minisp that only a GPU can show, by one command in under ten minutes.

    python benchmarks/gpu_suite.py [--only gram ridge] [--label NAME]

Builds the extension, checks correctness on the GPU, and only then measures. Every part is a process of its own with a
time limit: one that fails, hangs or runs out of memory is reported and the others go on. A table comes last; all
numbers, with the machine's description, go to benchmarks/results/gpu_<machine>.json. What each part expects, and why,
stands at its function in gpu_parts.py.
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
# Seconds each part may take; together less than ten minutes.
PARTS = {
    "build": 100,
    "correctness": 120,
    "ceilings": 30,
    "gram": 60,
    "saliency": 40,
    "accumulation": 30,
    "ridge": 90,
    "end_to_end": 120,
}


def command_of(part: str, result: Path) -> list[str]:
    """The command line of a part."""
    if part == "build":
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if part == "correctness":
        files = ["tests/kernels/test_gram.py", "tests/kernels/test_saliency.py", "tests/test_cuda.py"]
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernel or gpu", *files]
    return [sys.executable, str(HERE / "gpu_parts.py"), part, "--result", str(result)]


def run_part(part: str, folder: Path) -> dict[str, Any]:
    """Run one part; its figures, or what it said when it failed."""
    result, log = folder / f"{part}.json", folder / f"{part}.log"
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as stream:
        try:
            status: int | str = subprocess.run(
                command_of(part, result), cwd=ROOT, env=environment, stdout=stream, stderr=stream, timeout=PARTS[part]
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {PARTS[part]} s"
    outcome = {"status": status, "seconds": time.perf_counter() - start, "tail": log.read_text("utf-8")[-1500:]}
    if result.exists():
        outcome["figures"] = json.loads(result.read_text("utf-8"))
    return outcome


def main() -> None:
    """Run the parts, write the results, print the table."""
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--label", default="", help="appended to the result file's name")
    args = parser.parse_args()
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if part in args.only:
                outcomes[part] = run_part(part, Path(folder))
                print(f"== {part}: status {outcomes[part]['status']}, {outcomes[part]['seconds']:.0f} s", flush=True)
                if outcomes[part]["status"] != 0:
                    print(outcomes[part]["tail"], flush=True)
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
