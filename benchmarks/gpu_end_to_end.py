"""The parts of gpu_suite.py that minify a Llama-7B-shaped random model, on 128 windows of 2048 tokens.

Floor of minisp, one sweep (4 FLOPs per weight and token, and Tm² of Gram a layer): 6.6e9 · 262144 · 4 = 6.9 PFLOP and
32 · 32e12 = 1.0 PFLOP, 11 s at 700 TFLOP/s; expected below 30 s. With a cap on the GPU's memory the layers are held in
segments: a second forward pass, 3.5 PFLOP or 5 s more, and 13.5 GB of weights read twice and 11 GB written, 10 s at
4 GB/s where they do not hide; expected below 45 s at 24 GB, below 60 s at 8 GB.
Floor of naive.py: weight gradients too, 10.4 PFLOP, and 2.0 PFLOP of float32 Gram matrices at 50 TFLOP/s: 55 s. Its
Gram matrices alone, 32 · 11008² · 4 bytes, are 15.5 GB, its weights and their gradients 27 GB.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import naive
import torch
from torch import nn

from minisp.fast import minify

# Gigabytes of GPU memory that the process may have.
CAPS = {"capped_8": 8, "capped_12": 12, "capped_24": 24}
PARTS = ("end_to_end", "naive", *CAPS)
VOCABULARY = 32000


def run(part: str, checkpoint: Path | None) -> dict[str, Any]:
    """Figures of one of `PARTS`: seconds, or None with what it said when its memory ran out."""
    windows = torch.randint(0, VOCABULARY, (128, 2048), generator=torch.Generator().manual_seed(0))
    start_of_run: dict[str, Any] = {"part": part, "windows": list(windows.shape)}
    torch.cuda.init()
    try:
        figures = capped(CAPS[part], checkpoint, windows) if part in CAPS else in_memory(part, windows)
        text = f"{figures['seconds']:.1f} s, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    except torch.OutOfMemoryError as error:
        figures, text = {"seconds": None, "error": str(error)[:300]}, f"out of memory: {str(error)[:80]}"
    figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return start_of_run | figures | {"summary": [{"name": f"7B, {part}", "text": text}]}


def in_memory(part: str, windows: torch.Tensor) -> dict[str, Any]:
    """minisp or its opponent on a model that is on the GPU already; loading is nobody's time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=VOCABULARY, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    # Half the memory from the start: float32 weights of this model would not leave room on every GPU.
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: nn.Module = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    if part == "naive":
        phases = naive.minify_naive(model, windows.cuda(), 0.8, batch_size=4).seconds
    else:
        phases = minify(model, keep=0.8, calibration=windows, progress=lambda *_: None).seconds
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "phases": phases}


def capped(gigabytes: int, checkpoint: Path | None, windows: torch.Tensor) -> dict[str, Any]:
    """minisp from a checkpoint on disk to another one, in a process that may have so much of the GPU's memory."""
    if checkpoint is None or not (checkpoint / "config.json").exists():
        raise SystemExit(f"Capped run: expected a finished checkpoint, found none at {checkpoint}. See its log.")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
    # Boundary states of many segments are tens of gigabytes: they wait where there is most room, which may be memory.
    roomy = max((checkpoint.parent, Path("/dev/shm")), key=lambda path: shutil.disk_usage(path).free)
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder,
        tempfile.TemporaryDirectory(dir=roomy) as waiting,
    ):
        out, silent = Path(folder) / "out", lambda *_: None
        report = minify(checkpoint, keep=0.8, out=out, calibration=windows, progress=silent, scratch=waiting)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    segments = [list(segment) for segment in getattr(report.plan, "segments", ())]
    return {"seconds": elapsed, "phases": report.seconds, "gigabytes": gigabytes, "segments": len(segments)}
