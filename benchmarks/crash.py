"""Kill runs at random moments, resume them, and compare what they end with, byte for byte.

    python benchmarks/crash.py MODEL [--kills 30] [--seed 0] [--refit-on dense pruned]

One undisturbed run gives the bytes and the time to expect. Then, again and again: a run in a process of its own is
killed (SIGKILL) after a random time, several times in a row where it lives on; after every kill nothing at the output
path may load; the last run of a row is left alone, and must end with the expected bytes. What the kills hit is counted
by the newest record in the scratch folder. Prints a table, writes benchmarks/results/crash_<machine>.json, and fails
where anything differed.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import torch

from minisp import fast
from minisp.errors import CheckpointError
from minisp.export import folder
from minisp.store import tiers
from minisp.store.checkpoint import Checkpoint
from minisp.store.hub import load_tokenizer

# Kills in a row before a run is left alone.
ROW = 3


def run_in_child(model: Path, out: Path, windows: torch.Tensor, options: dict[str, Any], seconds: float | None) -> bool:
    """Minify in a forked process, killed after `seconds`; whether it ended by itself.

    Nothing was computed in this process, so that a child inherits no threads, and starts in no time.
    """
    child = os.fork()
    if child == 0:
        status = 1
        # Drawing takes longer than all the rest on a small model: most kills would hit nothing else.
        folder.plot_layers = lambda report, path: False
        try:
            fast.minify(model, out=out, calibration=windows, resume=True, progress=lambda *_: None, **options)
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds if seconds is not None else float("inf")
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)
    if status != 0:
        raise SystemExit(f"crash.py: a run ended with wait status {status}, see above.")
    return True


def contents(out: Path) -> dict[str, str]:
    """File name → SHA-256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def newest_record(out: Path) -> str:
    """What a killed run had finished last: the kind of the newest record, or how far the output was."""
    found = [*out.with_name(f".{out.name}.scratch").glob("*_*.json"), *out.with_name(f"{out.name}.partial").glob("*")]
    if not found:
        return "start"
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return "writing" if newest.parent.suffix == ".partial" else newest.stem.split("_")[0]


def assert_nothing_loads(out: Path) -> None:
    """Fail where something at the output path looks like a checkpoint."""
    try:
        Checkpoint.open(out)
    except CheckpointError:
        return
    raise SystemExit(f"crash.py: {out} loads although its run was killed.")


def campaign(model: Path, windows: torch.Tensor, options: dict[str, Any], kills: int, seed: int) -> dict[str, Any]:
    """Kill and resume until `kills` processes have died; the figures."""
    dice = random.Random(seed)
    hit: Counter[str] = Counter()
    rows = 0
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        run_in_child(model, Path(name) / "expected", windows, options, None)
        seconds = time.perf_counter() - start
        expected = contents(Path(name) / "expected")
        while hit.total() < kills:
            out = Path(name) / "out"
            for _ in range(ROW):
                # A resumed run is shorter than a whole one: most kills still hit.
                if run_in_child(model, out, windows, options, dice.uniform(0, 0.7 * seconds)):
                    break
                hit[newest_record(out)] += 1
                if out.exists():
                    # Killed between the rename and the end: the output is complete, and must be right.
                    break
                assert_nothing_loads(out)
            if not out.exists():
                run_in_child(model, out, windows, options, None)
            rows += 1
            harness.say(f"{options['refit_on']}: {hit.total()} of {kills} killed, last finished: {dict(hit)}")
            if contents(out) != expected:
                raise SystemExit(f"crash.py: {options}: a resumed run ended with other bytes than an undisturbed one.")
            shutil.rmtree(out)
            shutil.rmtree(out.with_name(f".{out.name}.scratch"), ignore_errors=True)
    return {"kills": hit.total(), "resumed": rows, "hit": dict(hit), "undisturbed_seconds": seconds}


def table(data: dict[str, Any]) -> str:
    """Processes killed at random moments."""
    parts = {name: part for name, part in data.items() if isinstance(part, dict) and "kills" in part}
    rows = ([name, part["kills"], part["resumed"]] for name, part in parts.items())
    return harness.markdown(["refitted on", "killed", "of these, resumed from records"], rows)


def main() -> None:
    """Run the campaigns and print what the kills hit."""
    parser = argparse.ArgumentParser(description="Kill runs at random moments and compare what they end with.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=30, help="processes to kill, for each kind of refit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refit-on", nargs="+", default=["dense", "pruned"])
    parser.add_argument("--save-seconds", type=float, default=0.0, help="between boundaries that are saved to disk")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiers.SAVE_SECONDS = args.save_seconds
    options = {"segment": 1, "batch": 1, "num_windows": args.windows, "window": args.window}
    # What every child would otherwise import anew.
    fast.plan(args.model, **options)
    vocabulary = Checkpoint.open(args.model).config.vocab_size
    load_tokenizer(args.model)
    windows = torch.randint(vocabulary, (args.windows, args.window), generator=torch.Generator().manual_seed(args.seed))
    figures = {
        kind: campaign(args.model, windows, {**options, "refit_on": kind}, args.kills, args.seed)
        for kind in args.refit_on
    }
    print(table(figures))
    harness.write_json(harness.result_name("crash"), {"model": args.model.name, **figures})


if __name__ == "__main__":
    main()
