"""The parts of gpu_suite.py that minify a Llama-7B-shaped random model, on 128 windows of 2048 tokens.

Work is what `minisp.costs` counts, which leaves out attention's own products (0.5 PFLOP); floors are at 700 TFLOP/s in
bfloat16 and 50 in float32. Kernels that no part before has compiled are compiled within the time.

`end_to_end`, one sweep (`ONE_SWEEP`), which is naive.py's work too: 4 FLOPs per weight and token in the layers, 6.8
PFLOP, and in the head, 0.1; Tm² of Gram a layer, 1.0; solves, 0.06 in float32: 7.9 PFLOP and 1.3 s, 13 s. On a GPU of
80 GB, activations allow two segments of layers: the lower one's forward pass is run twice, 9.6 PFLOP, 15 s. Expected
below 30 s.
Then the defaults, on a new model: trial cuts, 0.4 PFLOP; a heal sweep on every second window, 5.4 PFLOP; 0.15 PFLOP of
solves: 13.8 PFLOP and 3 s, 23 s, on a GPU of 80 GB 15.5 PFLOP, 25 s. Expected below 50 s.
`naive`: weight gradients too, 10.4 PFLOP, and in float32 2.0 PFLOP of whole Gram matrices and 0.06 of solves: 57 s;
expected below 90 s. Gram matrices are 15.5 GB, weights and their gradients 27 GB, and activations 15 GB for each window
that passes at once.

`capped_…`: one sweep again, for the heal sweep's states through a scratch folder would be another measurement. With 24,
12 and 8 GB of the GPU's memory the layers are held in 4, 8 and 16 segments: 10.5, 10.9 and 11.1 PFLOP, 16 to 17 s with
the solves. What moves, by `Plan.traffic`: 41 to 43 GB of weights, read ahead; states and gradients between segments,
26, 60 and 129 GB, half of them written and half read; statistics, 15.5 GB in the same way; refitted weights, 6 GB; 12
GB of result, read once more for its checksum. States are read ahead and written behind by threads, through pinned
memory: 26 to 129 GB at 2 GB/s each way are 7, 15 and 32 s beside the computation, statistics 4 s, and the result, 12 s,
comes after it. Floors are 33, 33 and 48 s; expected below 50, 55 and 80 s.
"""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import torch
from torch import Tensor, nn

from minisp.errors import ConfigError
from minisp.fast import minify

# Gigabytes of GPU memory that the process may have.
CAPS = {"capped_8": 8, "capped_12": 12, "capped_24": 24}
PARTS = ("end_to_end", "naive", *CAPS)
KEEP, VOCABULARY, WINDOWS = 0.8, 32000, (128, 2048)
# The paper's recipe: saliency as it is scored, and one refit, on the dense model's activations.
ONE_SWEEP = {"allocation": "score", "inputs": "dense"}
Figures = dict[str, Any]


def run(part: str, checkpoint: Path, out: Path, scratch: Path) -> Iterator[Figures]:
    """Figures of one of `PARTS`: seconds, or None with what it said when its memory ran out.

    Args:
        checkpoint: a 7B-shaped one, for the capped runs.
        out: folder that a capped run writes.
        scratch: folder for what waits in it.
    """
    windows = torch.randint(0, VOCABULARY, WINDOWS, generator=torch.Generator().manual_seed(0))
    torch.cuda.init()
    if part in CAPS:
        yield attempt(part, lambda: capped(CAPS[part], checkpoint, windows, out, scratch))
    elif part == "naive":
        yield attempt(part, lambda: in_memory(lambda model: run_naive(model, windows)))
    else:
        one = attempt("one sweep", lambda: in_memory(lambda model: run_minisp(model, windows, ONE_SWEEP)))
        yield one
        both = attempt("defaults", lambda: in_memory(lambda model: run_minisp(model, windows, {})))
        yield one | {"defaults": both, "summary": one["summary"] + both["summary"]}


def attempt(name: str, measure: Callable[[], Figures]) -> Figures:
    """What `measure` finds, the peak of memory, and a line of the closing table."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        figures = measure()
        text = f"{figures['seconds']:.1f} s, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    except (torch.OutOfMemoryError, ConfigError) as error:
        figures, text = {"seconds": None, "error": str(error)[:300]}, f"out of memory: {str(error)[:80]}"
    figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures | {"summary": [{"name": f"7B, {name}", "text": text}]}


def in_memory(cut: Callable[[nn.Module], dict[str, float]]) -> Figures:
    """Time of `cut` on a model that is on the GPU already; loading is nobody's time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=VOCABULARY, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    # Half the memory from the start: float32 weights of this model would not leave room on every GPU.
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.cuda.synchronize()
    start = time.perf_counter()
    phases = cut(model)
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "phases": phases}


def run_minisp(model: nn.Module, windows: Tensor, options: dict[str, str]) -> dict[str, float]:
    """Seconds per phase."""
    return minify(model, keep=KEEP, calibration=windows, progress=lambda *_: None, **options).seconds


def run_naive(model: Any, windows: Tensor) -> dict[str, float]:
    """Seconds per phase, with as many windows at once as there is room for."""
    batch = 4 if torch.cuda.get_device_properties(0).total_memory > 120e9 else 1
    return naive.minify_naive(model, windows.cuda(), KEEP, batch_size=batch).seconds


def capped(gigabytes: int, checkpoint: Path, windows: Tensor, out: Path, scratch: Path) -> Figures:
    """minisp from a checkpoint on disk to another one, in a process that may have so much of the GPU's memory."""
    if not (checkpoint / "config.json").exists():
        raise SystemExit(f"Capped run: expected a finished checkpoint, found none at {checkpoint}. See its log.")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    options: dict[str, Any] = {"keep": KEEP, "scratch": str(scratch), "progress": lambda *_: None, **ONE_SWEEP}
    start = time.perf_counter()
    report = minify(checkpoint, out=out, calibration=windows, **options)
    torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - start,
        "phases": report.seconds,
        "gigabytes": gigabytes,
        "segments": len(report.plan.segments),
        "batch": report.plan.batch,
        "traffic": report.plan.traffic,
    }
