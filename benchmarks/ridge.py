"""Is the ridge solver as accurate as torch.linalg's, and faster in less memory?

    python benchmarks/ridge.py                      # on the CPU; --device cuda on a GPU
    python benchmarks/ridge.py --model FOLDER --calibration TEXT     # Gram matrices of a real model too

Systems (G + μI) Δᵀ = R of the sizes that Llama-like models give: n kept units, d right-hand sides. Accuracy comes
first, then time, all contenders interleaved in one process, then memory beyond G and R. The floor, written down before
measuring: n³/3 + 2dn² FLOPs at the measured speed of a matrix product of the same type. Expected of it: on a CPU
60 % at n = 1536, where the 128-wide diagonal blocks of one core and the copies of panels still show, 80 % from 5504 on.
On an H100 see docs/derived-solver.md: the floor is that of float32 products, and large products in bfloat16 pieces may
pass it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from minisp.ops import cholesky, native_cholesky

# Width and hidden size: SmolLM2-135M, TinyLlama's half, TinyLlama, Llama-2-7B, Llama-3-8B, Llama-3-70B.
SIZES = ((1536, 576), (2816, 1024), (5504, 2048), (11008, 4096), (14336, 4096), (28672, 8192))


def make_system(n: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A Gram matrix whose spectrum falls by a power law, damped by 1e-2 of its mean diagonal; right-hand sides."""
    generator = torch.Generator(device).manual_seed(n)
    x = torch.randn(n, n, generator=generator, device=device)
    x *= torch.arange(1, n + 1, device=device).float().pow(-0.5)[:, None]
    gram = (x.T @ x).to(dtype)
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(1e-2 * gram.diagonal().mean())
    return gram, torch.randn(d, n, generator=generator, device=device).to(dtype)


def ours(gram: Tensor, right: Tensor, *, pieces: bool = True) -> Tensor:
    """Factor and solve in place, nothing else; on a GPU with the products that the engine asks for."""
    engine = native_cholesky.Factorisation(pieces=pieces)
    assert engine.factor_(gram) == 0
    engine.solve_(right)
    return right


def ours_checked(gram: Tensor, right: Tensor) -> Tensor:
    """What the engine calls: with scaling, checks, and the backward error measured."""
    cholesky.solve_(gram, right, pieces=True)
    return right


def ours_in_full(gram: Tensor, right: Tensor) -> Tensor:
    """As `ours`, with float32 products on a GPU; on a CPU the same."""
    return ours(gram, right, pieces=False)


def torch_cholesky(gram: Tensor, right: Tensor) -> Tensor:
    """torch.linalg.cholesky and cholesky_solve."""
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T


def torch_solve(gram: Tensor, right: Tensor) -> Tensor:
    """torch.linalg.solve, which does not know that the matrix is symmetric."""
    return torch.linalg.solve(gram, right, left=False)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch cholesky": torch_cholesky,
    "torch solve": torch_solve,
    "ours": ours,
    "ours with checks": ours_checked,
    "ours in full products": ours_in_full,
}


def accuracy(gram: Tensor, right: Tensor, solution: Tensor) -> dict[str, float]:
    """Backward error ‖R − XA‖/(‖A‖‖X‖ + ‖R‖), and the excess loss tr(E A Eᵀ)/tr(X A Xᵀ), E = X less float64's."""
    rows = slice(0, 64)
    a, r, x = gram.double(), right[rows].double(), solution[rows].double()
    error = (r - x @ a).norm() / (a.norm() * x.norm() + r.norm())
    exact = torch.linalg.solve(a, r, left=False)
    excess = (((x - exact) @ a) * (x - exact)).sum() / ((exact @ a) * exact).sum()
    return {"backward_error": float(error), "excess_loss": float(excess)}


def measure(n: int, d: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per contender: accuracy, seconds of every repeat, extra bytes."""
    gram, right = make_system(n, d, dtype, device)
    rows: dict[str, dict[str, Any]] = {}
    for name, solve in CONTENDERS.items():
        # The buffers that BLAS makes once and keeps are nobody's.
        solve(gram[:512, :512].clone(), right[:64, :512].clone())
        a, r = gram.clone(), right.clone()
        base = harness.start_peak(device)
        solution = solve(a, r)
        extra = harness.peak(device) - base
        rows[name] = {"name": name, "n": n, "d": d, "dtype": str(dtype).removeprefix("torch."), "seconds": []}
        rows[name] |= accuracy(gram, right, solution) | {"extra_bytes": extra, "gram_bytes": gram.nbytes}
    a, r = gram.clone(), right.clone()
    for _ in range(repeats):
        for name, solve in CONTENDERS.items():
            a.copy_(gram)
            r.copy_(right)
            harness.synchronize(device)
            start = time.perf_counter()
            solve(a, r)
            harness.synchronize(device)
            rows[name]["seconds"].append(time.perf_counter() - start)
    return list(rows.values())


def print_rows(rows: list[dict[str, Any]], ceiling: float) -> None:
    """Accuracy, then time as a ratio to torch's Cholesky, then memory."""
    n, d, dtype = rows[0]["n"], rows[0]["d"], rows[0]["dtype"]
    base, floor = statistics.median(rows[0]["seconds"]), (n**3 / 3 + 2 * d * n**2) / ceiling
    eps = torch.finfo(getattr(torch, dtype)).eps
    table = []
    for row in rows:
        seconds = statistics.median(row["seconds"])
        times = f"{seconds * 1e3:.1f} ({min(row['seconds']) * 1e3:.1f}-{max(row['seconds']) * 1e3:.1f})"
        table.append(
            (
                row["name"],
                f"{row['backward_error'] / (n * eps):.1e}",
                f"{row['excess_loss']:.1e}",
                times,
                f"×{base / seconds:.2f}",
                f"{floor / seconds:.0%}",
                f"{row['extra_bytes'] / row['gram_bytes']:.2f}",
            )
        )
    columns = ["", "backward error / (n·eps)", "excess loss", "ms", "faster", "of the floor", "extra memory / G"]
    harness.print_table(f"n = {n}, d = {d}, {dtype}", columns, table)


def ratios(rows: list[dict[str, Any]]) -> str:
    """Of one size, in a line: factor and solve alone, and the solve that the engine calls, against torch.linalg."""
    seconds = {row["name"]: statistics.median(row["seconds"]) for row in rows}
    bare, checked = (seconds["torch cholesky"] / seconds[name] for name in ("ours", "ours with checks"))
    error = next(row["backward_error"] for row in rows if row["name"] == "ours with checks")
    return f"×{bare:.2f} of torch.linalg, with the engine's checks ×{checked:.2f}, error {error:.0e}"


def real_systems(model: str, calibration: Path, windows: int) -> list[dict[str, Any]]:
    """Backward error on the Gram matrices of a model's first, middle and last layer, four fifths of the units kept."""
    from transformers import AutoTokenizer

    from minisp.models.stream import Stream
    from minisp.phases.batches import Batches
    from minisp.phases.run import Run
    from minisp.phases.saliency import saliency_sweep
    from minisp.store.checkpoint import Checkpoint

    tokens = AutoTokenizer.from_pretrained(model)(calibration.read_text("utf-8"))["input_ids"][: windows * 512]
    stream = Stream.from_checkpoint(Checkpoint.open(model), torch.device("cpu"), torch.bfloat16)
    layers = len(stream.layers)
    batches = Batches.scoring(list(torch.tensor(tokens).view(windows, 1, 512)))
    rows = []
    work = Run.in_memory()
    saliency_sweep(stream, batches, [range(layers)], work, gram=True)
    for layer in (0, layers // 2, layers - 1):
        statistics_ = work.statistics(layer, gram=True)
        assert statistics_.gram is not None
        kept = statistics_.score("fisher").sort(descending=True).indices[: len(statistics_.gram) * 4 // 5]
        for dtype in (torch.float32, torch.float64):
            for damping in (0.0, 1e-4, 1e-2):
                system = statistics_.gram[kept][:, kept].to(dtype)
                system.diagonal().add_(damping * system.diagonal().mean())
                solved = cholesky.solve_(system, torch.randn(16, len(kept), dtype=dtype))
                allowed = len(kept) * torch.finfo(dtype).eps
                rows.append({"layer": layer, "dtype": str(dtype), "damping": damping, "shift": solved.shift})
                rows[-1]["backward_error_over_n_eps"] = solved.backward_error / allowed
    harness.print_table("Gram matrices of the model", list(rows[0]), [list(row.values()) for row in rows])
    return rows


def main() -> None:
    """Measure, print, write benchmarks/results/ridge_<machine>.json."""
    parser = argparse.ArgumentParser(description="The ridge solver against torch.linalg.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-n", type=int, default=5504, help="largest n in float32; in float64 at most 5504")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="folder of a Llama-shaped model, for its Gram matrices")
    parser.add_argument("--calibration", type=Path, help="text for them")
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    device = torch.device(args.device)
    results, ceilings = [], {}
    for dtype in (torch.float32, torch.float64):
        ceilings[str(dtype)] = ceiling = harness.gemm_ceiling(dtype, device=device)
        print(f"{dtype}: a matrix product runs at {ceiling / 1e9:.0f} GFLOP/s")
        for n, d in SIZES:
            if n <= (args.max_n if dtype == torch.float32 else min(args.max_n, 5504)):
                rows = measure(n, d, dtype, device, args.repeats)
                print_rows(rows, ceiling)
                results += rows
    real = real_systems(args.model, args.calibration, args.windows) if args.model else []
    name = f"ridge_{harness.machine_slug(harness.machine() | ({'gpu': None} if device.type == 'cpu' else {}))}"
    print(harness.write_json(name, {"gemm_flops": ceilings, "solves": results, "model": real}))


if __name__ == "__main__":
    main()
