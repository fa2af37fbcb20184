"""The parts of gpu_suite.py, each a function that measures, and says first what it expects and why.

Times are medians of CUDA-event timings after warm-up. T tokens, m units, d hidden size; bytes are counted as moved.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import naive
import ridge
import torch
from torch import Tensor, nn

from minisp.kernels import gram as gram_kernel
from minisp.kernels import saliency as saliency_kernel

DEVICE = torch.device("cuda")
Figures = dict[str, Any]


def seconds(function: Callable[[], object], repeats: int = 7) -> float:
    """Median seconds of a call on the GPU."""
    function()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def line(name: str, text: str) -> dict[str, str]:
    """One line of the closing table."""
    return {"name": name, "text": text}


def ceilings() -> Figures:
    """What the machine can do. Published for an H100 SXM: 3.35 TB/s, 989 TFLOP/s bf16; expect 90 % and 80 % of it."""
    big = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    other, host = torch.empty_like(big), torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    device_part = big[: 2**28]
    figures: Figures = {
        "copy_bytes_per_s": 2 * big.numel() / seconds(lambda: other.copy_(big)),
        "h2d_bytes_per_s": host.numel() / seconds(lambda: device_part.copy_(host, non_blocking=True)),
        "d2h_bytes_per_s": host.numel() / seconds(lambda: host.copy_(device_part, non_blocking=True)),
    }
    n = 8192
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        figures[f"{name}_flops"] = 2 * n**3 / seconds(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    figures["summary"] = [
        line("copy", f"{figures['copy_bytes_per_s'] / 1e12:.2f} TB/s"),
        line(
            "bf16 / tf32 / fp32 GEMM",
            " / ".join(f"{figures[f'{k}_flops'] / 1e12:.0f}" for k in ("bf16", "tf32", "fp32")),
        ),
        line(
            "to / from the device",
            f"{figures['h2d_bytes_per_s'] / 1e9:.0f} / {figures['d2h_bytes_per_s'] / 1e9:.0f} GB/s",
        ),
    ]
    return figures


def gram() -> Figures:
    """G += XᵀX against cuBLAS. Floor: Tm² FLOPs, half of a GEMM's 2Tm², and 8m² bytes of G a launch. The pointer
    kernel should reach 60-70 % of the GEMM rate on the half that it computes: ×1.2-1.4 of the strongest cuBLAS call at
    m ≥ 8192.
    """
    rows = []
    for width in (1536, 4096, 8192, 11008, 14336, 28672):
        matrix = torch.zeros(width, width, device=DEVICE)
        for tokens in (4096, 8192, 16384, 32768):
            x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
            contenders = {
                "minisp": lambda x=x, g=matrix: gram_kernel.gram_update_(g, x),
                "addmm to float32": lambda x=x, g=matrix: torch.addmm(g, x.T, x, out_dtype=torch.float32, out=g),
                "bf16 matmul": lambda x=x: x.T @ x,
                "float32 of tools": lambda x=x, g=matrix: g.addmm_(x.float().T, x.float()),
            }
            row: Figures = {"m": width, "T": tokens}
            for name, call in contenders.items():
                try:
                    row[name] = seconds(call, 5)
                except (RuntimeError, TypeError) as error:
                    row[name] = None
                    row[f"{name}: error"] = str(error)[:200]
            rows.append(row)
        del matrix
    summary = []
    for row in rows:
        if row["T"] == 8192 and row["minisp"]:
            best = min(row[k] for k in ("addmm to float32", "bf16 matmul") if row[k])
            rate = row["T"] * row["m"] ** 2 / row["minisp"] / 1e12
            summary.append(
                line(f"Gram m = {row['m']}", f"×{best / row['minisp']:.2f} of cuBLAS, {rate:.0f} useful TFLOP/s")
            )
    return {"rows": rows, "summary": summary}


def saliency() -> Figures:
    """The fused pass against eager autograd with hooks and torch.compile. Floor: 12 bytes per element; expected 85 % of
    the copy bandwidth, and, eager moving 54 bytes and more, ×3.8 of it.
    """
    tokens, rows, summary = 8192, [], []
    for width in (1536, 4096, 11008, 14336, 28672):
        gate, up, grad = (torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        compiled = torch.compile(_eager_saliency)
        row: Figures = {
            "m": width,
            "minisp": seconds(lambda: saliency_kernel.activation_backward_(gate, up, grad, "silu")),  # noqa: B023
            "eager": seconds(lambda: _eager_saliency(gate, up, grad)),  # noqa: B023
        }
        try:
            row["torch.compile"] = seconds(lambda: compiled(gate, up, grad))  # noqa: B023
        except Exception as error:  # a compiler that is missing is no reason to lose the rest
            row["torch.compile"], row["error"] = None, str(error)[:200]
        row["bytes_per_s"] = 12 * tokens * width / row["minisp"]
        rows.append(row)
        summary.append(
            line(
                f"saliency m = {width}",
                f"{row['bytes_per_s'] / 1e12:.2f} TB/s, ×{row['eager'] / row['minisp']:.1f} of eager",
            )
        )
    return {"rows": rows, "summary": summary}


def _eager_saliency(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """What autograd and two hooks compute, op by op."""
    sigmoid = torch.sigmoid(gate)
    value = gate * sigmoid
    x = value * up
    product = x.float() * grad.float()
    sums = torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)])
    return x, torch.ops.aten.silu_backward(grad * up, gate), grad * value, sums


def accumulation() -> Figures:
    """A million tokens into one G: the diagonal's bias from truncating tensor cores should stay below 1e-4 (16k tokens
    per launch: −2e-5 a launch, which does not grow with their number).
    """
    width, tokens, launches = 1024, 16384, 64
    matrix, exact = torch.zeros(width, width, device=DEVICE), torch.zeros(width, dtype=torch.float64, device=DEVICE)
    for _ in range(launches):
        x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
        gram_kernel.gram_update_(matrix, x)
        exact += x.double().square().sum(0)
    bias = float((matrix.diagonal().double() / exact - 1).mean())
    worst = float((matrix.diagonal().double() / exact - 1).abs().max())
    return {
        "tokens": tokens * launches,
        "bias": bias,
        "worst": worst,
        "summary": [line("bias of the diagonal", f"{bias:.1e}, worst {worst:.1e}")],
    }


def solver() -> Figures:
    """The ridge solver against torch.linalg: see ridge.py for what is expected."""
    rows, summary = [], []
    for dtype in (torch.float32, torch.float64):
        for n, d in ridge.SIZES:
            if n > (14336 if dtype == torch.float32 else 5504):
                continue
            found = ridge.measure(n, d, dtype, DEVICE, 3)
            rows += found
            base, ours = (statistics.median(r["seconds"]) for r in (found[0], found[2]))
            summary.append(
                line(
                    f"ridge n = {n} {found[0]['dtype']}",
                    f"×{base / ours:.2f} of torch.linalg, error {found[2]['backward_error']:.0e}",
                )
            )
    return {"rows": rows, "summary": summary}


def end_to_end() -> Figures:
    """A Llama-7B-shaped random model, 128 windows of 2048 tokens, ours against naive.py. Floor: 4 FLOPs per weight and
    token, 6.6e9 · 262144 · 4 = 6.9 PFLOP, and 32 Tm² = 1.0 PFLOP of Gram: 11 s at 700 TFLOP/s; expected below 30 s.
    Naive also forms weight gradients and float32 Gram matrices: 10.4 PFLOP, and 2 · 1.0 PFLOP at float32 rates: 50 s.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from minisp.fast import minify

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    windows = torch.randint(0, 32000, (128, 2048), generator=torch.Generator().manual_seed(0))
    figures: Figures = {"summary": []}
    for name in ("ours", "naive"):
        torch.manual_seed(0)
        torch.cuda.empty_cache()
        with DEVICE:
            model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            if name == "ours":
                figures["phases"] = minify(model, keep=0.8, calibration=windows).seconds
            else:
                naive.minify_naive(model, windows.to(DEVICE), 0.8, batch_size=4)
            torch.cuda.synchronize()
            figures[name] = time.perf_counter() - start
            text = f"{figures[name]:.1f} s, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        except torch.OutOfMemoryError as error:
            figures[name], text = None, f"out of memory: {str(error)[:80]}"
        figures[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated()
        figures["summary"].append(line(f"7B, {name}", text))
        del model
    return figures


FUNCTIONS: dict[str, Callable[[], Figures]] = {
    "ceilings": ceilings,
    "gram": gram,
    "saliency": saliency,
    "accumulation": accumulation,
    "ridge": solver,
    "end_to_end": end_to_end,
}


def main() -> None:
    """Run one part and write its figures."""
    parser = argparse.ArgumentParser(description="One part of the GPU suite.")
    parser.add_argument("part", choices=FUNCTIONS)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("GPU suite: expected a CUDA device, found none.")
    figures = FUNCTIONS[args.part]()
    harness.print_table(args.part, ["", ""], [(row["name"], row["text"]) for row in figures["summary"]])
    args.result.write_text(json.dumps(figures), "utf-8")


if __name__ == "__main__":
    main()
