"""The parts of gpu_suite.py that measure kernels, each a function that says first what it expects and why.

Each yields all of its figures so far whenever there are more, so that a part that runs out of time keeps what it has.

Times are [p20, p50, p80] in seconds of CUDA-event timings after warm-up, contenders interleaved, the second-level cache
overwritten before each call. T tokens, m units, d hidden size, V vocabulary; bytes are counted as moved.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_end_to_end
import harness
import ridge
import torch
from torch import Tensor
from torch.nn import functional

from minisp import ops
from minisp.kernels import gram as gram_kernel
from minisp.kernels import saliency as saliency_kernel

DEVICE = torch.device("cuda")
# More than any GPU's second-level cache.
FLUSH_BYTES = 2**28
Figures = dict[str, Any]
Contenders = dict[str, Callable[[], object]]


def race(contenders: Contenders, *, budget: float = 0.3, before: Callable[[], object] = lambda: None) -> Figures:
    """[p20, p50, p80] seconds of every contender on the GPU; None, and "name: error", for one that fails.

    Args:
        contenders: what to call, by name.
        budget: seconds that one contender may take about; it is called 3 to 9 times.
        before: called before each call, not timed.
    """
    figures: Figures = {}
    first: dict[str, float] = {}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    for name, call in contenders.items():
        before()
        try:
            call()
            before()
            first[name] = _timed(call)
        except Exception as error:  # one that is missing or has no room is no reason to lose the rest
            figures[name], figures[f"{name}: error"] = None, str(error)[:200]
    times: dict[str, list[float]] = {name: [] for name in first}
    repeats = {name: max(3, min(9, int(budget / max(once, 1e-6)))) for name, once in first.items()}
    for number in range(max(repeats.values(), default=0)):
        for name in first:
            if number < repeats[name]:
                before()
                flush.fill_(number)
                times[name].append(_timed(contenders[name]))
    for name, found in times.items():
        ordered = sorted(found)
        figures[name] = [ordered[int(q * (len(ordered) - 1) + 0.5)] for q in (0.2, 0.5, 0.8)]
    return figures


def _timed(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def seconds(call: Callable[[], object]) -> float:
    """Median seconds of one call."""
    return float(race({"it": call})["it"][1])


def line(name: str, text: str) -> dict[str, str]:
    """One line of the closing table."""
    return {"name": name, "text": text}


def ceilings() -> Iterator[Figures]:
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
    for name, dtype in {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        figures[f"{name}_flops"] = 2 * n**3 / seconds(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = " / ".join(f"{figures[f'{name}_flops'] / 1e12:.0f}" for name in ("bf16", "tf32", "fp32"))
    ways = " / ".join(f"{figures[f'{way}_bytes_per_s'] / 1e9:.0f}" for way in ("h2d", "d2h"))
    figures["summary"] = [
        line("copy", f"{figures['copy_bytes_per_s'] / 1e12:.2f} TB/s"),
        line("bf16 / tf32 / fp32 GEMM", f"{rates} TFLOP/s"),
        line("to / from the device", f"{ways} GB/s"),
    ]
    yield figures


def gram() -> Iterator[Figures]:
    """G += XᵀX against cuBLAS. Floor: Tm² FLOPs, half of a GEMM's 2Tm², 2Tm bytes of X and 4m² bytes of G (its half,
    read and written). Expected 65 % of the GEMM rate on the half that is computed, ×1.3 of the strongest cuBLAS call at
    m ≥ 8192; ×1.0 at 1536, whose 78 tiles are split in three.
    """
    rows, summary = [], []
    for width in (1536, 4096, 8192, 11008, 14336, 28672):
        matrix = torch.zeros(width, width, device=DEVICE)
        for tokens in (4096, 8192, 16384, 32768):
            x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
            row = {"m": width, "T": tokens, **race(_gram_contenders(x, matrix), budget=0.05)}
            rows.append(row)
            best = min((row[k][1] for k in ("addmm to float32", "bf16 matmul") if row[k]), default=None)
            if tokens == 8192 and row["minisp"] and best:
                rate = tokens * width**2 / row["minisp"][1] / 1e12
                text = f"×{best / row['minisp'][1]:.2f} of cuBLAS, {rate:.0f} useful TFLOP/s"
                summary.append(line(f"Gram m = {width}", text))
            yield {"rows": rows, "summary": summary}
            del x
        del matrix


def _gram_contenders(x: Tensor, matrix: Tensor) -> Contenders:
    def float32_of_tools() -> None:
        wide = x.float()
        matrix.addmm_(wide.T, wide)

    return {
        "minisp": lambda: gram_kernel.gram_update_(matrix, x),
        "addmm to float32": lambda: torch.addmm(matrix, x.T, x, out_dtype=torch.float32, out=matrix),
        # Without adding to anything, and rounded to 16 bits: less than what is asked.
        "bf16 matmul": lambda: x.T @ x,
        "float32 of tools": float32_of_tools,
    }


def saliency() -> Iterator[Figures]:
    """The fused pass against autograd with a hook, the same op by op, and torch.compile. Floor: 12 bytes per element;
    expected 85 % of the copy bandwidth and, autograd moving 54 bytes and more, ×3.8 of it.
    """
    tokens, rows, summary = 8192, [], []
    for width in (1536, 4096, 11008, 14336, 28672):
        sources = [torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        work = [source.clone() for source in sources]
        contenders = _saliency_contenders(*work)
        row = {"m": width, "T": tokens, **race(contenders, before=partial(_restore, work, sources))}
        rows.append(row)
        if row["minisp"]:
            ours = row["minisp"][1]
            row["bytes_per_s"] = 12 * tokens * width / ours
            ratios = [f"×{row[name][1] / ours:.1f} of {name}" for name in list(contenders)[1:] if row[name]]
            text = ", ".join([f"{row['bytes_per_s'] / 1e12:.2f} TB/s", *ratios])
            summary.append(line(f"saliency m = {width}", text))
        yield {"rows": rows, "summary": summary}


def _restore(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _saliency_contenders(gate: Tensor, up: Tensor, grad: Tensor) -> Contenders:
    # For this width alone, as if it were the first: a second one would be compiled for all, and count towards a limit.
    torch._dynamo.reset()
    compiled = torch.compile(_eager_saliency, dynamic=False)
    return {
        "minisp": lambda: saliency_kernel.activation_backward_(gate, up, grad, "silu"),
        "autograd with a hook": lambda: _autograd_saliency(gate, up, grad),
        "op by op": lambda: _eager_saliency(gate, up, grad),
        "torch.compile": lambda: compiled(gate, up, grad),
    }


def _autograd_saliency(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """What a user writes: the forward under autograd, a hook on x, the backward."""
    z, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
    sums = []

    def hook(g: Tensor) -> None:
        product = x.detach().float() * g.float()
        sums.append(torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)]))

    x = functional.silu(z) * u
    x.register_hook(hook)
    return *torch.autograd.grad(x, (z, u), grad), *sums


def _eager_saliency(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """What autograd and the hook compute, op by op."""
    sigmoid = torch.sigmoid(gate)
    value = gate * sigmoid
    x = value * up
    product = x.float() * grad.float()
    sums = torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)])
    return x, torch.ops.aten.silu_backward(grad * up, gate), grad * value, sums


def cross_entropy() -> Iterator[Figures]:
    """The cross entropy's gradient against the same in PyTorch. Floor: 6 bytes per bfloat16 logit (read twice, written
    once); expected 80 % of the copy bandwidth, and ×5 of the operations one by one.
    """
    rows, summary = [], []
    for vocabulary in (32000, 128256):
        logits = torch.randn(4096, vocabulary, device=DEVICE, dtype=torch.bfloat16)
        targets = torch.randint(vocabulary, (4096,), device=DEVICE)
        contenders: Contenders = {
            impl: lambda z=logits, t=targets, impl=impl: ops.cross_entropy_gradient(z, t, impl=impl)  # type: ignore[misc]
            for impl in ("triton", "torch")
        }
        row = {"V": vocabulary, "T": 4096, **race(contenders)}
        rows.append(row)
        if row["triton"] and row["torch"]:
            rate = 6 * logits.numel() / row["triton"][1] / 1e12
            text = f"{rate:.2f} TB/s, ×{row['torch'][1] / row['triton'][1]:.1f} of PyTorch"
            summary.append(line(f"cross entropy V = {vocabulary}", text))
        yield {"rows": rows, "summary": summary}


def accumulation() -> Iterator[Figures]:
    """A million tokens into one G: the diagonal's bias from truncating tensor cores should stay below 1e-4. One
    accumulator sums all 16384 tokens of a launch, for neither width leaves a GPU programs to split them among (528 and
    1176 tiles of the kernel with pointers, 600 of the one with descriptors, which serves the second width where there
    is one): −2e-5 a launch, which does not grow with their number.
    """
    tokens, launches, every = 16384, 64, 6
    rows, summary = [], []
    for width in (gram_kernel.NARROW, 6144):
        matrix = torch.zeros(width, width, device=DEVICE)
        exact = torch.zeros(len(range(0, width, every)), dtype=torch.float64, device=DEVICE)
        for _ in range(launches):
            x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
            gram_kernel.gram_update_(matrix, x)
            exact += x[:, ::every].double().square().sum(0)
        errors = matrix.diagonal()[::every].double() / exact - 1
        row = {"m": width, "T": tokens * launches, "bias": float(errors.mean()), "worst": float(errors.abs().max())}
        rows.append(row)
        summary.append(line(f"bias of the diagonal, m = {width}", f"{row['bias']:.1e}, worst {row['worst']:.1e}"))
        yield {"rows": rows, "summary": summary}


def solver() -> Iterator[Figures]:
    """The ridge solver against torch.linalg: see ridge.py for what is expected."""
    rows, summary = [], []
    for dtype in (torch.float32, torch.float64):
        for n, d in ridge.SIZES:
            if n > (14336 if dtype == torch.float32 else 5504):
                continue
            found = ridge.measure(n, d, dtype, DEVICE, 3)
            rows += found
            base, ours = (statistics.median(r["seconds"]) for r in (found[0], found[2]))
            text = f"×{base / ours:.2f} of torch.linalg, error {found[2]['backward_error']:.0e}"
            summary.append(line(f"ridge n = {n} {found[0]['dtype']}", text))
            yield {"rows": rows, "summary": summary}


FUNCTIONS: dict[str, Callable[[], Iterator[Figures]]] = {
    "ceilings": ceilings,
    "gram": gram,
    "saliency": saliency,
    "cross_entropy": cross_entropy,
    "accumulation": accumulation,
    "ridge": solver,
}


def main() -> None:
    """Run one part; what it has found so far is written whenever there is more."""
    parser = argparse.ArgumentParser(description="One part of the GPU suite.")
    parser.add_argument("part", choices=[*FUNCTIONS, *gpu_end_to_end.PARTS])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="the 7B-shaped checkpoint, for the capped runs")
    parser.add_argument("--out", type=Path, help="folder that a capped run writes, new")
    parser.add_argument("--scratch", type=Path, help="folder for what waits in a capped run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("GPU suite: expected a CUDA device, found none.")
    if args.part in FUNCTIONS:
        found = FUNCTIONS[args.part]()
    else:
        found = gpu_end_to_end.run(args.part, args.checkpoint, args.out, args.scratch)
    for figures in found:
        harness.write_whole(args.result, figures)
    harness.print_table(args.part, ["", ""], [(row["name"], row["text"]) for row in figures["summary"]])


if __name__ == "__main__":
    main()
