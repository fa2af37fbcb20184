"""The parts of gpu_suite.py that minify a Llama-7B-shaped random model, on 128 windows of 2048 tokens.

What is expected is derived, phase by phase, in docs/gpu_budgets.md; here in short, for an H100 of 80 GB with the rates
that stand there. Kernels that no part before has compiled are compiled within the time.

`end_to_end`, one sweep (`ONE_SWEEP`), which is naive.py's work too, and then the defaults, on a new model. Floors: 7.9
and 13.8 PFLOP at 790 TFLOP/s, 10 and 17.5 s. Matrix products at the rates of cuBLAS are 12 s of the first; attention,
which the demands leave out, is 0.5 PFLOP at 250 to 320 TFLOP/s, 2 s; norms, rotary and residuals move 13 TB in
transformers' eager operations, 5 s, and 3 TB where they are fused, 1.2 s; Gram 2 s; 32 solves 1 to 3 s. Expected: 17 to
27 s, and 29 to 45 s.
`naive`: weight gradients too, 10.4 PFLOP, and in float32 2.0 PFLOP of whole Gram matrices and 0.06 of solves, of its
67 s 40; `naive_tf32` is the same user who lets float32 products run on the matrix units: 30 s. Gram matrices are 15.5
GB, weights and their gradients 27 GB, and activations 15 GB for each window that passes at once.

`from_disk`: the defaults from a checkpoint to another one. States in files, as they were before they could stay in
memory: 95 to 160 s; in memory, read ahead, written behind and checked on the way: 40 s.
`capped_…`: one sweep again, with 24, 12 and 8 GB of the GPU's memory: layers are held in 4, 8 and 16 segments, 10.5 to
11.1 PFLOP, 16 to 17 s of products. What moves, by `Plan.traffic`: 41 to 43 GB of weights, read ahead; states and
gradients between segments, 26, 60 and 129 GB, which at 2 GB/s each way are 7, 15 and 32 s beside the computation.
Expected below 50, 55 and 80 s. Where the disk has no room for the states of 128 windows they run on 64, and say so.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import naive
import torch
from gpu_bench import Bench, Figures, line
from synthetic import llama_config as synthetic_config
from torch import Tensor, nn

from minisp.errors import ConfigError, OutputError
from minisp.fast import minify, plan

# Gigabytes of GPU memory that the process may have.
CAPS = {"capped_8": 8, "capped_12": 12, "capped_24": 24}
FROM_DISK = ("from_disk", *CAPS)
PARTS = ("end_to_end", "naive", "naive_tf32", *FROM_DISK)
KEEP = 0.8
# What the figure calls the whole runs.
RUNS = {
    "end_to_end": "minisp", "from_disk": "minisp, defaults, from disk", "capped_24": "minisp, 24 GB",
    "capped_12": "minisp, 12 GB", "capped_8": "minisp, 8 GB", "naive": "naive", "naive_tf32": "naive, TF32",
}  # fmt: skip
# The paper's recipe: saliency as it is scored, and one refit, on the dense model's activations.
ONE_SWEEP = {"allocation": "score", "correct_drift": False}


def run(part: str, bench: Bench, checkpoint: Path, out: Path, scratch: Path) -> Iterator[Figures]:
    """Figures of one of `PARTS`: seconds, or None with what it said when its memory or the disk had no room.

    Args:
        checkpoint: a 7B-shaped one, for the runs from disk.
        out: folder that such a run writes.
        scratch: folder for what waits in it.
    """
    config = llama_config(bench)
    shape = bench.shapes((128, 2048), (4, 16))
    windows = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    if part in FROM_DISK:
        scratch = scratch / part
        scratch.mkdir()
        options: dict[str, Any] = {"keep": KEEP, "scratch": str(scratch)}
        if part in CAPS:
            bench.limit_memory(CAPS[part])
            options |= ONE_SWEEP
        figures = attempt(part, bench, lambda: from_disk(bench, checkpoint, windows, out, options))
        yield figures | ({"gigabytes": CAPS[part]} if part in CAPS else {})
    elif part.startswith("naive"):
        torch.backends.cuda.matmul.allow_tf32 = part == "naive_tf32"
        yield attempt(part, bench, lambda: in_memory(bench, config, lambda model: run_naive(bench, model, windows)))
    else:

        def minified(options: dict[str, str]) -> Figures:
            return in_memory(bench, config, lambda model: run_minisp(model, windows, options))

        one = attempt("one sweep", bench, lambda: minified(ONE_SWEEP))
        yield one
        both = attempt("defaults", bench, lambda: minified({}))
        yield one | {"defaults": both, "summary": one["summary"] + both["summary"]}


def llama_config(bench: Bench) -> Any:
    """Of a 7B-shaped Llama, or of a tiny one."""
    config = synthetic_config(bench.shapes("7B", "tiny"))
    config.max_position_embeddings = 2048
    return config


def attempt(name: str, bench: Bench, measure: Callable[[], Figures]) -> Figures:
    """What `measure` finds, the peak of memory, and a line of the closing table."""
    bench.free()
    try:
        figures = measure()
        text = f"{figures['seconds']:.1f} s, peak {bench.peak_bytes() / 1e9:.1f} GB{figures.get('note', '')}"
    except (torch.OutOfMemoryError, ConfigError, OutputError) as error:
        figures = {"seconds": None, "error": str(error)[:300]}
        text = f"{'' if isinstance(error, OutputError) else 'out of memory: '}{str(error)[:200]}"
    figures["peak_bytes"] = bench.peak_bytes()
    return figures | {"summary": [line(f"7B, {name}", text)]}


def in_memory(bench: Bench, config: Any, cut: Callable[[nn.Module], dict[str, float]]) -> Figures:
    """Time of `cut` on a model that is on the GPU already; loading is nobody's time."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    # Half the memory from the start: float32 weights of this model would not leave room on every GPU.
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bench.device:
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    bench.synchronize()
    start = time.perf_counter()
    phases = cut(model)
    bench.synchronize()
    return {"seconds": time.perf_counter() - start, "phases": phases}


def run_minisp(model: nn.Module, windows: Tensor, options: dict[str, str]) -> dict[str, float]:
    """Seconds per phase."""
    return minify(model, keep=KEEP, calibration=windows, progress=lambda *_: None, **options).seconds


def run_naive(bench: Bench, model: Any, windows: Tensor) -> dict[str, float]:
    """Seconds per phase, with as many windows at once as there is room for."""
    batch = 4 if bench.memory_bytes() > 120e9 else 1
    return naive.minify_naive(model, windows.to(bench.device), KEEP, batch_size=batch).seconds


def from_disk(bench: Bench, checkpoint: Path, windows: Tensor, out: Path, options: dict[str, Any]) -> Figures:
    """minisp from a checkpoint on disk to another one, on as many of the windows as the disks have room for."""
    if not (checkpoint / "config.json").exists():
        raise SystemExit(f"Run from disk: expected a finished checkpoint, found none at {checkpoint}. See its log.")
    fitting = windows_with_room(checkpoint, windows, out.parent, options)
    start = time.perf_counter()
    report = minify(checkpoint, out=out, calibration=fitting, progress=lambda *_: None, **options)
    bench.synchronize()
    seconds = time.perf_counter() - start
    note = "" if len(fitting) == len(windows) else f", on {len(fitting)} windows for want of room on disk"
    return {
        "seconds": seconds,
        "phases": report.seconds,
        "windows": len(fitting),
        "note": note,
        "segments": len(report.plan.segments),
        "batch": report.plan.batch,
        "traffic": report.plan.traffic,
    }


def windows_with_room(checkpoint: Path, windows: Tensor, parent: Path, options: dict[str, Any]) -> Tensor:
    """All windows, or half of them, whichever the scratch folder and the output's disk have room for.

    Raises:
        OutputError: neither, by the plan.
    """
    scratch = Path(options["scratch"])
    free = shutil.disk_usage(scratch).free, shutil.disk_usage(parent).free
    shared = scratch.stat().st_dev == parent.stat().st_dev
    for count in (len(windows), len(windows) // 2):
        planned = plan(checkpoint, num_windows=count, window=windows.shape[1], **options)
        needed = planned.scratch_bytes, planned.bytes_after
        if sum(needed) <= free[0] if shared else (needed[0] <= free[0] and needed[1] <= free[1]):
            return windows[:count]
    raise OutputError(
        f"no room: needs {needed[0] / 1e9:.1f} GB in {scratch} and {needed[1] / 1e9:.1f} GB in {parent} for {count} "
        f"windows, has {free[0] / 1e9:.1f} and {free[1] / 1e9:.1f} GB{' on one disk' if shared else ''}. Free some."
    )


def figure(data: dict[str, Any]) -> Any:
    """Seconds of the whole runs; a run that found no room is named, without a bar. None where nothing was measured."""
    from drawing import OURS, THEIRS, bars, plt

    figures = {name: part["figures"] for name, part in data["parts"].items() if "figures" in part}
    runs = {name: figures[name] for name in RUNS if name in figures}
    if not any(run["seconds"] for run in runs.values()):
        return None
    names = [RUNS[name] + ("" if run["seconds"] else ": out of memory") for name, run in runs.items()]
    seconds = [[run["seconds"] or 0.0] for run in runs.values()]
    drawn, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    bars(axes, names, seconds, [THEIRS if name.startswith("naive") else OURS for name in runs], "seconds")
    axes.set_title("7B, 128 windows of 2048 (less is better)")
    drawn.supxlabel(harness.machine_line(data), fontsize=8.5, color="0.35")
    return drawn
