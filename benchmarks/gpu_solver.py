"""The parts of gpu_suite.py that measure the ridge solver: see gpu_parts.py. Contenders and systems are ridge.py's."""

import statistics
from collections.abc import Iterator
from typing import Any

import ridge
import torch
from gpu_bench import Bench, Figures, line
from torch import Tensor

# What the engine calls, with its scaling and checks; without them; and torch's.
CHECKED, BARE, TORCH = "ours with checks", "ours", "torch cholesky"
# n = 17000 is no multiple of a panel: the last one is not full.
SIZES = ((1536, 576), (5504, 2048), (11008, 4096), (14336, 4096), (17000, 4096), (28672, 8192))


def ridge_(bench: Bench) -> Iterator[Figures]:
    """The ridge solver against torch.linalg: see ridge.py for what is expected. Both of ours are in the table: what
    the engine calls scales the system, checks it, and measures its backward error.
    """
    figures: Figures = {"rows": [], "summary": []}
    for dtype in (torch.float32, torch.float64):
        for n, d in bench.shapes(SIZES, ((80, 24),)):
            if dtype == torch.float64 and n > 5504:
                continue
            found = measure(bench, n, d, dtype)
            figures["rows"] += found.values()
            figures["summary"].append(line(f"ridge n = {n}, {str(dtype).removeprefix('torch.')}", _text(found)))
            yield figures


def _text(found: dict[str, Figures]) -> str:
    base = found[TORCH].get("seconds")
    words = [f"torch {statistics.median(base) * 1e3:.1f} ms" if base else f"torch: {found[TORCH]['error']}"]
    for name, what in ((CHECKED, "of torch.linalg with the engine's checks"), (BARE, "without")):
        if base and found[name].get("seconds"):
            words.append(f"×{statistics.median(base) / statistics.median(found[name]['seconds']):.2f} {what}")
        elif "error" in found[name]:
            words.append(f"{name}: {found[name]['error'][:60]}")
    if "backward_error" in found[CHECKED]:
        words.append(f"error {found[CHECKED]['backward_error']:.0e}")
    return ", ".join(words)


def measure(bench: Bench, n: int, d: int, dtype: torch.dtype) -> dict[str, Figures]:
    """A row per contender: accuracy, seconds of every repeat, extra bytes; or the error of one that fails."""
    gram, right = ridge.make_system(n, d, dtype, bench.device)
    rows: dict[str, Figures] = {}
    for name in (TORCH, BARE, CHECKED):
        rows[name] = {"name": name, "n": n, "d": d, "dtype": str(dtype).removeprefix("torch.")}
        try:
            rows[name] |= _first(bench, name, gram, right)
        except Exception as error:  # an extension without CUDA must not lose torch's row
            rows[name]["error"] = f"{type(error).__name__}: {error}"[:200]
    a, r = gram.clone(), right.clone()
    for _ in range(3):
        for name, row in rows.items():
            if "error" not in row:
                a.copy_(gram)
                r.copy_(right)
                seconds = bench.timed(lambda name=name: ridge.CONTENDERS[name](a, r))  # type: ignore[misc]
                row.setdefault("seconds", []).append(seconds)
    return rows


def _first(bench: Bench, name: str, gram: Tensor, right: Tensor) -> Figures:
    solve = ridge.CONTENDERS[name]
    # The buffers that BLAS makes once and keeps are nobody's.
    solve(gram[:512, :512].clone(), right[:64, :512].clone())
    a, r = gram.clone(), right.clone()
    bench.free()
    base = bench.peak_bytes()
    solution = solve(a, r)
    row: dict[str, Any] = {"extra_bytes": bench.peak_bytes() - base, "gram_bytes": gram.nbytes}
    # The excess loss takes a solve in float64, 12 GB and minutes at the largest size.
    if gram.shape[0] <= 11008:
        return row | ridge.accuracy(gram, right, solution)
    return row | {"backward_error": backward_error(gram, right[:64], solution[:64])}


def backward_error(gram: Tensor, right: Tensor, solution: Tensor) -> float:
    """‖R − XA‖/(‖A‖‖X‖ + ‖R‖) with residuals in float64, 2048 columns of A at a time."""
    r, x, squares = right.double(), solution.double(), 0.0
    for start in range(0, len(gram), 2048):
        squares += float((r[:, start : start + 2048] - x @ gram[:, start : start + 2048].double()).square().sum())
    return squares**0.5 / float(gram.norm().double() * x.norm() + r.norm())


def linalg(bench: Bench) -> Iterator[Figures]:
    """torch.linalg alone, the two halves of the opponent: no public rates exist for this GPU. Expected: the
    factorisation at 20 to 27 TFLOP/s of its n³/3, the two triangular solves at 38 of their 2n²d.
    """
    rows, summary = [], []
    for n, d in bench.shapes(((11008, 4096), (14336, 4096), (28672, 8192)), ((80, 24),)):
        gram, right = ridge.make_system(n, d, torch.float32, bench.device)
        columns = right.T.contiguous()
        factor, _ = torch.linalg.cholesky_ex(gram)
        row = {"n": n, "d": d}
        row |= bench.race(
            {
                "cholesky_ex": lambda gram=gram: torch.linalg.cholesky_ex(gram),  # type: ignore[misc]
                "cholesky_solve": lambda b=columns, factor=factor: torch.cholesky_solve(b, factor),  # type: ignore[misc]
            },
            budget=0.6,
        )
        rows.append(row)
        parts = {"cholesky_ex": n**3 / 3, "cholesky_solve": 2 * n**2 * d}
        words = [
            f"{name} {row[name][1] * 1e3:.1f} ms, {flops / row[name][1] / 1e12:.0f} TFLOP/s"
            for name, flops in parts.items()
            if row[name]
        ]
        summary.append(line(f"torch.linalg n = {n}", ", ".join(words)))
        yield {"rows": rows, "summary": summary}
        del gram, right, columns, factor
