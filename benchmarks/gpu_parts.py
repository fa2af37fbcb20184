"""The parts of gpu_suite.py that measure the machine and the matrix products, and the command that runs any part.

    python benchmarks/gpu_parts.py PART... --result FILE [--rehearse]

Every part is a function that says first what it expects and why. It yields all of its figures so far whenever there
are more, so that a part that runs out of time keeps what it has. Expected times are derived for an H100 SXM (3.0 TB/s
of copying, 790 TFLOP/s, cuBLAS at 680), not measured.

Times are [p20, p50, p80] in seconds as `gpu_bench.Bench.race` takes them. T tokens, m units, n kept units, d hidden
size, V vocabulary; bytes are counted as moved.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gpu_end_to_end
import gpu_layers
import gpu_passes
import gpu_solver
import harness
import torch
from gpu_bench import Bench, Contenders, Figures, line, ratio
from torch import Tensor

from minisp import ops
from minisp.kernels import cross as cross_kernel
from minisp.kernels import gram as gram_kernel


def ceilings(bench: Bench) -> Iterator[Figures]:
    """What the machine can do. Published for an H100 SXM: 3.35 TB/s, 989 TFLOP/s bf16, 64 GB/s each way over PCIe 5;
    expect 90 %, 80 % and 80 % of it. Disks: what 70B in a small memory is bound by.
    """
    big = torch.empty(bench.shapes(2**30, 2**12), dtype=torch.uint8, device=bench.device)
    size = bench.shapes(2**28, 2**10)
    begin = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=not bench.rehearsal)
    figures: Figures = {"pinning_bytes_per_s": size / (time.perf_counter() - begin)}
    other, device_part = torch.empty_like(big), big[:size]
    figures |= {
        "copy_bytes_per_s": 2 * big.numel() / bench.seconds(lambda: other.copy_(big)),
        "h2d_bytes_per_s": size / bench.seconds(lambda: device_part.copy_(host, non_blocking=True)),
        "d2h_bytes_per_s": size / bench.seconds(lambda: host.copy_(device_part, non_blocking=True)),
    }
    n = bench.shapes(8192, 16)
    for name, dtype in {"bf16": bench.half, "tf32": torch.float32, "fp32": torch.float32}.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (bench.randn(n, n, dtype=dtype) for _ in range(2))
        figures[f"{name}_flops"] = 2 * n**3 / bench.seconds(partial(torch.mm, a, b))
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = " / ".join(f"{figures[f'{name}_flops'] / 1e12:.0f}" for name in ("bf16", "tf32", "fp32"))
    ways = " / ".join(f"{figures[f'{way}_bytes_per_s'] / 1e9:.0f}" for way in ("h2d", "d2h", "pinning"))
    figures["summary"] = [
        line("copy", f"{figures['copy_bytes_per_s'] / 1e12:.2f} TB/s"),
        line("bf16 / tf32 / fp32 GEMM", f"{rates} TFLOP/s"),
        line("to / from the device / page-locking", f"{ways} GB/s"),
    ]
    yield figures
    for folder in dict.fromkeys((tempfile.gettempdir(), "/dev/shm")):
        file_size = bench.shapes(2**31, 2**12)
        # In a container, /dev/shm often has room for 64 MB.
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * file_size:
            figures |= disk_rates(folder, file_size)
            written, read = (figures[f"{folder} {way}_bytes_per_s"] / 1e9 for way in ("write", "read"))
            figures["summary"].append(line(f"{folder}, written / read", f"{written:.1f} / {read:.1f} GB/s"))
            yield figures


def disk_rates(folder: str, size: int) -> Figures:
    """Bytes per second of writing a file until it is durable, and of reading it back without the system's copy."""
    block = os.urandom(min(size, 2**24))
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(len(block)):
            pass
        seconds = time.perf_counter() - begin
    return {f"{folder} write_bytes_per_s": size / written, f"{folder} read_bytes_per_s": size / seconds}


def gram(bench: Bench) -> Iterator[Figures]:
    """G += XᵀX against cuBLAS. Floor: Tm² FLOPs, half of a GEMM's 2Tm², 2Tm bytes of X and 4m² bytes of G (its half,
    read and written). Expected 55 to 68 % of 790 TFLOP/s on the half that is computed, ×1.3 to 1.5 of the strongest
    cuBLAS call at m ≥ 8192 and 8192 tokens; at 2048 tokens, which runs in a small memory have, 40 %, for G is read and
    written as often as a fifth of the products take; ×1.0 at 1536, whose 78 tiles are split in three.
    In float32 with IEEE products no more than cuBLAS, which has the same units to offer. The mirror step: 4m² bytes,
    60 to 75 % of a copy.
    """
    figures: Figures = {"rows": [], "float32": [], "mirror": [], "summary": []}
    for width in bench.shapes((1536, 4096, 8192, 11008, 14336, 28672), (48, 136)):
        matrix = torch.zeros(width, width, device=bench.device)
        for tokens in bench.shapes((2048, 8192, 16384), (16,)):
            x = bench.randn(tokens, width)
            row = {"m": width, "T": tokens, **bench.race(_gram_contenders(matrix, x, tokens), budget=0.05)}
            figures["rows"].append(row)
            best = min((row[k][1] for k in ("addmm to float32", "bf16 matmul") if row[k]), default=None)
            if tokens in (8192, 16) and row["minisp"] and best:
                rate = tokens * width**2 / row["minisp"][1] / 1e12
                text = f"×{best / row['minisp'][1]:.2f} of cuBLAS, {rate:.0f} useful TFLOP/s"
                figures["summary"].append(line(f"Gram m = {width}", text))
            yield figures
            del x
        found = bench.race({"minisp": partial(gram_kernel.mirror_, matrix), "torch": partial(_mirrored, matrix)})
        figures["mirror"].append({"m": width, **found})
        del matrix
    for width in bench.shapes((4096, 11008), (48,)):
        yield from _gram_in_float32(bench, width, figures)


def _mirrored(matrix: Tensor) -> Tensor:
    return matrix.tril() + matrix.tril(-1).T


def _gram_contenders(matrix: Tensor, x: Tensor, tokens: int) -> Contenders:
    def float32_of_tools() -> None:
        wide = x.float()
        matrix.addmm_(wide.T, wide)

    contenders: Contenders = {
        "minisp": partial(gram_kernel.gram_update_, matrix, x),
        "addmm to float32": lambda: torch.addmm(matrix, x.T, x, out_dtype=torch.float32, out=matrix),
        # Without adding to anything, and rounded to 16 bits: less than what is asked.
        "bf16 matmul": lambda: x.T @ x,
    }
    # It takes seconds: once for every width.
    return contenders | ({"float32 of tools": float32_of_tools} if tokens in (8192, 16) else {})


def _gram_in_float32(bench: Bench, width: int, figures: Figures) -> Iterator[Figures]:
    tokens = bench.shapes(8192, 16)
    matrix = torch.zeros(width, width, device=bench.device)
    x = bench.randn(tokens, width, dtype=torch.float32)

    def tools(allow_tf32: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        matrix.addmm_(x.T, x)
        torch.backends.cuda.matmul.allow_tf32 = False

    contenders: Contenders = {
        f"minisp {precision}": partial(gram_kernel.gram_update_, matrix, x, input_precision=precision)
        for precision in cross_kernel.PRECISIONS
    }
    contenders |= {"addmm": partial(tools, False), "addmm tf32": partial(tools, True)}
    row = {"m": width, "T": tokens, **bench.race(contenders)}
    figures["float32"].append(row)
    text = ", ".join(ratio(row, "addmm", name) + f" ({name.split()[1]})" for name in list(contenders)[:3])
    figures["summary"].append(line(f"Gram in float32, m = {width}", text))
    yield figures


def product(bench: Bench) -> Iterator[Figures]:
    """C += XᵀY, which the drift correction needs. Floor: 2Tnd FLOPs. minisp takes cuBLAS here, 650 TFLOP/s expected at
    8192 tokens; its Triton kernel, which serves float32 and is measured beside it, 420 to 500; what tools ship,
    float32 copies, 50.
    """
    rows, summary = [], []
    for n, d in bench.shapes(((8806, 4096), (11469, 4096), (22938, 8192)), ((48, 32),)):
        for tokens in bench.shapes((2048, 8192), (16,)):
            x, y = bench.randn(tokens, n), bench.randn(tokens, d)
            row = {"n": n, "d": d, "T": tokens, **bench.race(_product_contenders(bench, x, y))}
            rows.append(row)
            if row["minisp"]:
                rate = 2 * tokens * n * d / row["minisp"][1] / 1e12
                others = ", ".join(ratio(row, name) for name in ("Triton", "float32 of tools"))
                summary.append(line(f"XᵀY {n} × {d}, {tokens} tokens", f"{rate:.0f} TFLOP/s, {others}"))
            yield {"rows": rows, "summary": summary}


def _product_contenders(bench: Bench, x: Tensor, y: Tensor) -> Contenders:
    total = torch.zeros(x.shape[1], y.shape[1], device=bench.device)
    wide, other = x.float(), y.float()
    return {
        "minisp": partial(ops.cross_update_, total, x, y),
        "Triton": partial(cross_kernel.cross_update_, total, x, y),
        "float32 of tools": lambda: total.addmm_(x.float().T, y.float()),
        "Triton, float32": partial(cross_kernel.cross_update_, total, wide, other),
        "cuBLAS, float32": lambda: total.addmm_(wide.T, other),
    }


def accumulation(bench: Bench) -> Iterator[Figures]:
    """A million tokens into one G: the diagonal's bias from truncating tensor cores should stay below 1e-4. One
    accumulator sums all 16384 tokens of a launch, for neither width leaves a GPU programs to split them among (528 and
    1176 tiles of the kernel with pointers, 600 of the one with descriptors, which serves the second width where there
    is one): −2e-5 a launch, which does not grow with their number.
    """
    tokens, launches, every = bench.shapes((16384, 64, 6), (32, 2, 6))
    rows, summary = [], []
    for width in bench.shapes((gram_kernel.NARROW, 6144), (48,)):
        matrix = torch.zeros(width, width, device=bench.device)
        exact = torch.zeros(len(range(0, width, every)), dtype=torch.float64, device=bench.device)
        for _ in range(launches):
            x = bench.randn(tokens, width)
            gram_kernel.gram_update_(matrix, x)
            exact += x[:, ::every].double().square().sum(0)
        errors = matrix.diagonal()[::every].double() / exact - 1
        row = {"m": width, "T": tokens * launches, "bias": float(errors.mean()), "worst": float(errors.abs().max())}
        rows.append(row)
        summary.append(line(f"bias of the diagonal, m = {width}", f"{row['bias']:.1e}, worst {row['worst']:.1e}"))
        yield {"rows": rows, "summary": summary}


FUNCTIONS: dict[str, Callable[[Bench], Iterator[Figures]]] = {
    "ceilings": ceilings,
    "gram": gram,
    "product": product,
    "saliency": gpu_passes.saliency,
    "cross_entropy": gpu_passes.cross_entropy,
    "norms": gpu_passes.norms,
    "ridge": gpu_solver.ridge_,
    "linalg": gpu_solver.linalg,
    "attention": gpu_layers.attention,
    "layer": gpu_layers.layer,
    "accumulation": accumulation,
}


def main() -> None:
    """Run parts one after another; what each has found so far is written whenever there is more."""
    parser = argparse.ArgumentParser(description="Parts of the GPU suite.")
    parser.add_argument("parts", nargs="+", choices=[*FUNCTIONS, *gpu_end_to_end.PARTS])
    parser.add_argument("--result", type=Path, required=True, help="folder for PART.json")
    parser.add_argument("--checkpoint", type=Path, help="the 7B-shaped checkpoint, for the runs from disk")
    parser.add_argument("--out", type=Path, help="folder that a run from disk writes, new")
    parser.add_argument("--scratch", type=Path, help="folder for what waits in a run from disk")
    parser.add_argument("--rehearse", action="store_true", help="small, on a CPU: figures mean nothing")
    args = parser.parse_args()
    bench = Bench(args.rehearse)
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("GPU suite: expected a CUDA device, found none.")
    for part in args.parts:
        if part in FUNCTIONS:
            found = FUNCTIONS[part](bench)
        else:
            found = gpu_end_to_end.run(part, bench, args.checkpoint, args.out / part, args.scratch)
        for figures in found:
            harness.write_whole(args.result / f"{part}.json", figures)
        harness.print_table(part, ["", ""], [(row["name"], row["text"]) for row in figures["summary"]])


if __name__ == "__main__":
    main()
