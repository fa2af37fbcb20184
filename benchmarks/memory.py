"""Does a run keep to its memory, does the plan say the truth about it, and what does streaming cost?

    python benchmarks/memory.py MODEL --limits 0 2GB [--windows 16 --window 256] [--streaming-repeats 3]

For every limit: `minisp.fast.minify` in a child process that the operating system holds to that much memory (a control
group; 0 is no limit), with the planned peak, the measured peak and the time. Expected: measured at most planned,
planned at most 15 % above it, and the same weights from every limit wherever the head stays in memory.

With --streaming-repeats: the same segments with all weights in memory and streamed from disk, interleaved, in child
processes. Floor of the difference: the layers are read twice, 2·bytes/(copy speed), beside the computation; states and
statistics are written and read once each. Expected below 15 % of the sweep.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import torch

GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A control group with a limit of memory, version 2 or 1; None for no limit.

    Raises:
        SystemExit: this machine lets us make none: nothing is measured then.
    """
    if limit == 0:
        yield None
        return
    version_2 = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if version_2 else GROUPS / "memory") / f"minisp-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError as error:
        raise SystemExit(f"Memory limit: expected to make a control group, got {error}. Run it as root.") from error
    try:
        yield group
    finally:
        group.rmdir()


def child(args: argparse.Namespace) -> dict[str, Any]:
    """In the child: one run."""
    from minisp.fast import minify
    from minisp.store.checkpoint import Checkpoint
    from minisp.units import parse_size

    vocabulary = Checkpoint.open(args.model).config.vocab_size
    windows = torch.randint(vocabulary, (args.windows, args.window), generator=torch.Generator().manual_seed(0))
    options = json.loads(args.child)
    if options.pop("in_memory", False):
        report = minify(args.model, calibration=windows, **options)
        return {"seconds": report.seconds}
    out = args.result.parent / "out"
    report = minify(args.model, out=out, calibration=windows, **options)
    digest = hashlib.sha256()
    for shard in sorted(out.glob("*.safetensors")):
        with shard.open("rb") as handle:
            while block := handle.read(2**24):
                digest.update(block)
    return {
        "seconds": report.seconds,
        "planned_bytes": report.plan.peak_memory,
        "limit_bytes": parse_size(options.get("host_memory", 0)),
        "segments": len(report.plan.segments),
        "vocabulary_streamed": report.plan.layout.stream_vocabulary,
        "weights": digest.hexdigest(),
    }


def run(args: argparse.Namespace, options: dict[str, Any], limit: int = 0) -> harness.ChildRun:
    """A child process of this script, within a limit that the system enforces."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, memory_group(limit) as group:
        result = Path(folder) / "result.json"
        command: list[str | Path] = [__file__, args.model, "--windows", args.windows, "--window", args.window]
        command += ["--child", json.dumps(options), "--result", result]
        if group is not None:
            command = ["-c", INSIDE, group / ("cgroup.procs"), *map(str, command)]
        return harness.run_child(list(map(str, command)), result)


# Enters the group before anything large is imported, then becomes the benchmark.
INSIDE = """
import os, runpy, sys
open(sys.argv[1], "w").write(str(os.getpid()))
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def limits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One run for every limit."""
    from minisp.units import parse_size

    rows = []
    for text in args.limits:
        limit = 0 if text == "0" else parse_size(text)
        found = run(args, {"host_memory": text} if limit else {}, limit)
        rows.append({"limit": text, "peak_bytes": found.peak_rss, "wall_seconds": found.seconds, **found.output})
        rows[-1]["disturbance"] = found.disturbance
        share = f"{found.peak_rss / 1e9:.2f} GB of {found.output['planned_bytes'] / 1e9:.2f} planned"
        harness.say(f"limit {text}: {share}, {found.seconds:.0f} s")
    return rows


def streaming(args: argparse.Namespace) -> dict[str, Any]:
    """The same arithmetic on weights in memory and on weights from disk."""
    seconds: dict[str, list[float]] = {"in memory": [], "streamed": []}
    for _ in range(args.streaming_repeats):
        for name in seconds:
            found = run(args, {"segment": args.segment, "in_memory": name == "in memory"})
            seconds[name].append(sum(found.output["seconds"][phase] for phase in ("saliency sweep", "refit")))
            harness.say(f"weights {name}: {seconds[name][-1]:.1f} s")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    overhead = medians["streamed"] / medians["in memory"] - 1
    harness.say(f"streaming costs {overhead:+.1%}")
    return {"seconds": seconds, "overhead": overhead, "segment": args.segment}


def table(data: dict[str, Any]) -> Iterator[str]:
    """Planned and measured, and what streaming costs."""
    columns = ["limit", "planned", "peak of the process", "segments", "seconds"]
    yield f"{data['windows']} windows of {data['window']} tokens.\n\n"
    yield harness.markdown(
        columns,
        (
            [
                run["limit"] if run["limit_bytes"] else "none",
                *(f"{run[key] / 1e9:.2f} GB" for key in ("planned_bytes", "peak_bytes")),
                run["segments"],
                f"{run['wall_seconds']:.0f}",
            ]
            for run in data["limits"]
        ),
    )
    same = len({run["weights"] for run in data["limits"]}) == 1
    yield f"\nThe results are {'the same bytes' if same else 'not the same'}."
    if data.get("streaming"):
        seconds = data["streaming"]["seconds"]
        ranges = (f"{name} {harness.spread(values)}" for name, values in seconds.items())
        yield f" Sweeps, seconds: {', '.join(ranges)}."
    yield "\n"


def main() -> None:
    """Measure, print, write benchmarks/results/memory_<model>_<machine>.json."""
    parser = argparse.ArgumentParser(description="Memory planned and measured, and what streaming costs.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--limits", nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--streaming-repeats", type=int, default=0)
    parser.add_argument("--segment", type=int, default=1, help="layers held at once where streaming is measured")
    parser.add_argument("--folder", type=Path, default=None, help="where results are written and removed again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.result.write_text(json.dumps(child(args)), "utf-8")
        return
    content: dict[str, Any] = {"model": args.model.name, "windows": args.windows, "window": args.window}
    name = harness.result_name(f"memory_{args.model.name}")
    earlier = harness.read_json(name)
    if content.items() <= earlier.items():
        # What an earlier run has measured with these windows, and this one does not, stays.
        content = earlier
    if args.limits:
        content["limits"] = limits(args)
    if args.streaming_repeats:
        content["streaming"] = streaming(args)
    path = harness.write_json(name, content)
    print("".join(table(content)) if "limits" in content else "", path)


if __name__ == "__main__":
    main()
