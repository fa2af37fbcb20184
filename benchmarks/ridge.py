"""Is the ridge solver as accurate as torch.linalg's, and faster in less memory? Systems, contenders, table and figure.

test_solver.py runs it, on a CPU or a GPU; gpu_suite.py in its part `ridge`.

Systems (G + μI) Δᵀ = R of the sizes that Llama-like models give: n kept units, d right-hand sides. Accuracy comes
first, then time, then memory beyond G and R. The floor, written down before measuring: n³/3 + 2dn² FLOPs at the speed
of a matrix product of the same type. Expected of it: on a CPU 60 % at n = 1536, where the 128-wide diagonal blocks of
one core and the copies of panels still show, 80 % from 5504 on. On an H100 see docs/derived-solver.md: the floor is
that of float32 products, and large products in bfloat16 pieces may pass it.
"""

import statistics
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from minisp.ops import cholesky, native_cholesky

# The excess loss takes a solve in float64, 12 GB and minutes for larger systems.
LARGEST_EXACT = 11008
# Of the matrix that are in float64 at once, for the backward error.
COLUMNS = 2048


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


def flops(n: int, d: int) -> float:
    """The floor: a factorisation and two triangular solves."""
    return n**3 / 3 + 2 * d * n * n


def serves(name: str, device: torch.device) -> bool:
    """Whether a contender can run on a device: torch's always, ours where the extension has code for it."""
    return name.startswith("torch") or native_cholesky.serves_cholesky(device, torch.float32)


def accuracy(gram: Tensor, right: Tensor, solution: Tensor) -> dict[str, float]:
    """Backward error ‖R − XA‖/(‖A‖‖X‖ + ‖R‖) of 64 right-hand sides; and, of systems up to `LARGEST_EXACT`, the excess
    loss tr(E A Eᵀ)/tr(X A Xᵀ), E = X less float64's.
    """
    r, x, squares = right[:64].double(), solution[:64].double(), 0.0
    for start in range(0, len(gram), COLUMNS):
        part = gram[:, start : start + COLUMNS].double()
        squares += float((r[:, start : start + COLUMNS] - x @ part).square().sum())
    found = {"backward_error": squares**0.5 / float(gram.norm().double() * x.norm() + r.norm())}
    if len(gram) > LARGEST_EXACT:
        return found
    a = gram.double()
    exact = torch.linalg.solve(a, r, left=False)
    excess = (((x - exact) @ a) * (x - exact)).sum() / ((exact @ a) * exact).sum()
    return found | {"excess_loss": float(excess)}


def require(found: dict[str, float], gram: Tensor) -> None:
    """Fail where a solution is not accurate.

    Backward stable solvers keep to n·eps, in practice to √n·eps. At this damping, products in bfloat16 pieces miss the
    optimum by 5e-7, and products in TF32, which are not good enough, by 1e-1 (`minisp.ops.cholesky`).

    Raises:
        AssertionError: a larger backward error than √n·eps, or a larger excess loss than 1e-3.
    """
    assert found["backward_error"] <= len(gram) ** 0.5 * torch.finfo(gram.dtype).eps, found
    assert found.get("excess_loss", 0.0) <= 1e-3, found


def table(data: dict[str, Any]) -> str:
    """Solvers by size; speed against torch's Cholesky, memory in multiples of the Gram matrix."""
    found = {(s["dtype"], s["n"], s["d"], s["name"]): s for s in data["solves"]}
    columns = ["n, d, solver", "seconds", "speed", "memory", "backward error"]
    rows = []
    for (dtype, n, d, name), solve in sorted(found.items()):
        base = statistics.median(found[dtype, n, d, "torch cholesky"]["seconds"])
        speed = f"×{base / statistics.median(solve['seconds']):.2f}"
        share = f"{solve['extra_bytes'] / solve['gram_bytes']:.2f}"
        who = f"{n}, {d}, {dtype}, {name.replace('ours', 'minisp')}"
        rows.append([who, harness.spread(solve["seconds"], 3), speed, share, f"{solve['backward_error']:.1e}"])
    return harness.markdown(columns, rows)


def figure(data: dict[str, Any]) -> Any:
    """Speed of the solver relative to torch's Cholesky, and memory beside the matrix, per size."""
    from drawing import OURS, OURS_LIGHT, THEIRS, THEIRS_LIGHT, plt

    found = {(s["n"], s["dtype"], s["name"]): s for s in data["solves"]}
    sizes = sorted({(n, dtype) for n, dtype, _ in found}, key=lambda size: (size[1], size[0]))
    labels = [f"{n}\n{dtype}" for n, dtype in sizes]
    styles = {
        "torch cholesky": THEIRS,
        "torch solve": THEIRS_LIGHT,
        "ours": OURS,
        "ours with checks": OURS_LIGHT,
    }
    drawn, (speed, memory) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    for number, (name, color) in enumerate(styles.items()):
        rows = [(place, found[n, dtype, name]) for place, (n, dtype) in enumerate(sizes) if (n, dtype, name) in found]
        offsets = [place + (number - 1.5) * 0.2 for place, _ in rows]
        base = [statistics.median(found[s["n"], s["dtype"], "torch cholesky"]["seconds"]) for _, s in rows]
        label = name.replace("ours", "minisp")
        ratios = [b / statistics.median(s["seconds"]) for b, (_, s) in zip(base, rows, strict=True)]
        speed.bar(offsets, ratios, 0.18, color=color, label=label)
        memory.bar(offsets, [s["extra_bytes"] / s["gram_bytes"] for _, s in rows], 0.18, color=color, label=label)
    speed.axhline(1, color="0.25", linewidth=1, linestyle=":")
    speed.set_title("Speed, torch's Cholesky = 1 (more is better)")
    memory.set_title("Memory beside the matrix, in matrices (less is better)")
    for axes in (speed, memory):
        axes.set_xticks(range(len(sizes)), labels)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("size of the system")
    drawn.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    drawn.supxlabel(harness.machine_line(data), fontsize=8.5, color="0.35")
    return drawn
