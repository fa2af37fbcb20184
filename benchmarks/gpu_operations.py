"""The parts of gpu_suite.py that measure operations and the solver: on which shapes, and what is expected.

Operations are checked against float64 before they are timed; a wrong one ends its part, with the rows before it kept.

Expected, derived for an H100 SXM (3.0 TB/s of copying, 790 TFLOP/s, cuBLAS at 680), not measured:
    gram           55 to 68 % of 790 TFLOP/s on the half that is computed, ×1.3 to 1.5 of the strongest cuBLAS call at
                   m ≥ 8192 and 8192 tokens; 40 % at 2048 tokens, where G is read and written as often as a fifth of the
                   products take; ×1.0 at 1536. In float32 with IEEE products no more than cuBLAS. Mirror: 60 to 75 % of
                   a copy.
    product        cuBLAS, which the engine takes in 16 bits, 650 TFLOP/s at 8192 tokens; Triton 420 to 500; float32
                   copies 50.
    saliency       72 to 85 % of the copy bandwidth, ×3.5 to 4 of autograd; the forward activation 70 to 82 %, ×1.6.
    cross_entropy  75 to 85 %, ×4 to 6 of the operations one by one.
    norms          75 %, ×5 of transformers, which moves some 60 bytes an element of a norm, 50 of rotary.
    attention      320 TFLOP/s forward and 250 backward in 16 bits; in float32 some 20, and no (L, L) matrix.
    ridge          see docs/derived-solver.md.

Symbols are those of operations.py.
"""

from collections.abc import Iterator
from functools import partial

import operations
import ridge
import torch
from cases import Shape
from gpu_bench import Bench, Figures, line, told

WIDTHS = (1536, 4096, 8192, 11008, 14336, 28672)
HEADED = {"B": 4, "L": 2048, "D": 128}
LITTLE = {"m": 48, "d": 32, "T": 16}
Shapes = list[Shape]
# Part → builder of `operations`, its shapes on a GPU and in a rehearsal, and the types (None: 16 bits).
OPERATIONS: dict[str, list[tuple[str, Shapes, Shapes, tuple[torch.dtype | None, ...]]]] = {
    "gram": [
        ("gram", [{"m": m, "T": 8192} for m in WIDTHS], [LITTLE, {"m": 136, "T": 16}], (None,)),
        ("gram", [{"m": m, "T": tokens} for m in (4096, 11008) for tokens in (2048, 16384)], [LITTLE], (None,)),
        ("gram", [{"m": m, "T": 8192} for m in (4096, 11008)], [LITTLE], (torch.float32,)),
        ("mirror", [{"m": m} for m in (4096, 11008, 28672)], [LITTLE], (torch.float32,)),
    ],
    "product": [
        (
            "cross",
            [{"m": n, "d": d, "T": t} for n, d in ((8806, 4096), (11469, 4096), (22938, 8192)) for t in (2048, 8192)],
            [LITTLE],
            (None,),
        ),
        ("cross", [{"m": 8806, "d": 4096, "T": 8192}], [LITTLE], (torch.float32,)),
    ],
    "saliency": [
        (name, [{"m": m, "T": 8192} for m in WIDTHS if m != 8192], [{"m": 24, "T": 16}], (None,))
        for name in ("saliency", "activation")
    ],
    "cross_entropy": [("cross_entropy", [{"V": v, "T": 4096} for v in (32000, 128256)], [{"V": 50, "T": 8}], (None,))],
    "norms": [
        ("rms_norm", [{"d": d, "T": 8192} for d in (4096, 8192)], [LITTLE], (None,)),
        (
            "rotary",
            [{"H": heads, "K": keys, **HEADED} for heads, keys in ((32, 32), (64, 8))],
            [{"B": 2, "H": 4, "K": 2, "L": 8, "D": 16}],
            (None,),
        ),
    ],
    "attention": [
        (
            "attention",
            [{"H": heads, "K": keys, **HEADED} for heads, keys in ((32, 32), (32, 8), (64, 8))],
            [{"B": 1, "H": 4, "K": 2, "L": 16, "D": 8}],
            (None, torch.float32),
        )
    ],
}
# n = 17000 is no multiple of a panel: the last one is not full.
SYSTEMS = ((1536, 576), (5504, 2048), (11008, 4096), (14336, 4096), (17000, 4096), (28672, 8192))


def operation(part: str, bench: Bench) -> Iterator[Figures]:
    """A part of `OPERATIONS`."""
    rows: list[Figures] = []
    summary: list[dict[str, str]] = []
    for name, real, small, dtypes in OPERATIONS[part]:
        for shape in bench.shapes(real, small):
            for dtype in dtypes:
                # So many float32 products take seconds.
                row = bench.measure(getattr(operations, name), shape, dtype, 0.1 if part == "gram" else 0.3)
                rows.append({"operation": name, **row})
                words = ", ".join(f"{key} = {size}" for key, size in shape.items())
                summary.append(line(f"{name} {words}, {row['dtype']}", told(row)))
                yield {"rows": rows, "summary": summary}


def systems(bench: Bench) -> Iterator[Figures]:
    """The ridge solver against torch.linalg: see ridge.py for what is expected."""
    rows: list[Figures] = []
    summary: list[dict[str, str]] = []
    for dtype in (torch.float32, torch.float64):
        for n, d in bench.shapes(SYSTEMS, ((80, 24),)):
            if dtype == torch.float64 and n > 5504:
                continue
            rows.append(system(bench, n, d, dtype))
            error = rows[-1]["accuracy"].get(ENGINE, {}).get("backward_error", float("nan"))
            text = f"{told(rows[-1])}, backward error {error:.0e}"
            summary.append(line(f"ridge n = {n}, {rows[-1]['dtype']}", text))
            yield {"rows": rows, "summary": summary}


# What the engine calls, with its scaling and checks; without them; and torch's two.
ENGINE = "minisp with checks"
SOLVERS = {ENGINE: "ours with checks", "minisp": "ours", "torch cholesky": "torch cholesky"}


def system(bench: Bench, n: int, d: int, dtype: torch.dtype) -> Figures:
    """A row: accuracy of every solver, and a race of all.

    Raises:
        AssertionError: a solution is not accurate, see `ridge.require`.
    """
    gram, right = ridge.make_system(n, d, dtype, bench.device)
    a, r = gram.clone(), right.clone()

    def restore() -> None:
        a.copy_(gram)
        r.copy_(right)

    contenders = {name: partial(ridge.CONTENDERS[key], a, r) for name, key in SOLVERS.items()}
    found: dict[str, dict[str, float]] = {}
    for name, solve in contenders.items():
        # The buffers that BLAS makes once and keeps are nobody's.
        restore()
        try:
            found[name] = ridge.accuracy(gram, right, solve())
        except Exception:  # the race goes on without it, and says why
            continue
        ridge.require(found[name], gram)
    row = {"n": n, "d": d, "dtype": str(dtype).removeprefix("torch."), "accuracy": found, "gram_bytes": gram.nbytes}
    return row | {"flops": ridge.flops(n, d), "bytes": 0.0} | bench.race(contenders, before=restore)
