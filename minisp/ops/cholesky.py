"""Symmetric positive definite systems X A = R, in place: what surrounds the factorisation, and who does it.

The matrix is scaled to a nearly equal diagonal first (Jacobi; van der Sluis, 1969: within a factor n of the best
diagonal scaling), by powers of two, which rounds nothing. Units whose row is zero are set aside exactly. A
factorisation that fails is tried again with a small shift of the diagonal, announced by a warning and recorded.
Solutions can be refined with residuals in float64 (Wilkinson). The backward error of every solve is measured.

On a GPU, large float32 products can be made of bfloat16 pieces (csrc/cholesky_cuda.h), which is what the engine asks
for. How accurate that is was found on CPUs, with products rounded alike, for a power-law Gram matrix of 1536 units and
random right-hand sides, in three kinds of product (excess: by how much of the optimum the ridge objective is missed):

    damping   float32 error, excess    bfloat16 pieces          TF32, truncated
    1e-4      7e-09          3e-06     1e-07          5e-04     not positive definite
    1e-3      7e-09          9e-08     1e-07          2e-05     not positive definite
    1e-2      8e-09          3e-09     1e-07          5e-07     3e-05          1e-01
    5e-2      8e-09          2e-10     1e-07          4e-08     1e-05          8e-04

The error is backward, as in `Solved`. Truncated TF32 does not converge under refinement below a damping of 5e-2;
products in pieces need none. tests/ops/test_pieces.py holds this.

Shapes: n unknowns, d right-hand sides. Right-hand sides are rows.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from minisp.errors import BackendError, NumericalError
from minisp.ops import native_cholesky, residual

SHIFTS = (1.0, 10.0, 100.0)
"""Diagonal shifts of the second and later attempts, in units of n·eps, for a diagonal of about 1."""
MEASURED = 16
"""Right-hand sides whose backward error is measured."""


@dataclass(frozen=True)
class Solved:
    """How a solve went.

    Attributes:
        backward_error: ‖r − xA‖_∞ / (‖A‖_∞ ‖x‖_∞ + ‖r‖_∞), the largest of the right-hand sides measured, for the
            scaled matrix without any shift (Rigal & Gaches, 1967).
        shift: what was added to its diagonal, in [½, 2]; 0 unless the factorisation failed without.
    """

    backward_error: float
    shift: float


class Factorisation(Protocol):
    """A = L Lᵀ of a matrix whose strict upper triangle stays readable."""

    def factor_(self, matrix: Tensor) -> int:
        """0, or the number of the first pivot that is not positive, counted from 1."""

    def solve_(self, right: Tensor) -> None:
        """right (d, n) ← right A⁻¹."""


class TorchFactorisation:
    """torch.linalg: the factor is a second matrix."""

    def factor_(self, matrix: Tensor) -> int:
        """See `Factorisation`."""
        self.factor, info = torch.linalg.cholesky_ex(matrix)
        return int(info)

    def solve_(self, right: Tensor) -> None:
        """See `Factorisation`."""
        right.copy_(torch.cholesky_solve(right.T, self.factor).T)


def solve_(
    matrix: Tensor,
    right: Tensor,
    *,
    impl: Literal["torch", "native"] = "native",
    refine: int = 0,
    pieces: bool = False,
) -> Solved:
    """right ← right A⁻¹; the matrix is overwritten.

    Besides factorisation and substitution, a solve on a GPU launches some 60 operations and 6 more for each of
    `residual.blocks`, of which there are at most 20, and the host waits three times: for the checks, for the pivot and
    for the backward error.

    Args:
        matrix: (n, n) A, float32 or float64, symmetric positive definite or with zero rows; rows contiguous.
        right: (d, n) in the dtype and on the device of `matrix`, rows contiguous; not overlapping it. For a zero row,
            the smallest solution, 0, is taken.
        impl: "native" works in place with the kernels of minisp._C, "torch" with torch.linalg and a second matrix.
        refine: steps of refinement with residuals in float64; takes a copy of `right`.
        pieces: see `native_cholesky.Factorisation`; without effect on CPUs, for float64, and for "torch".

    Raises:
        BackendError: tensors of another type, shape or layout than stated, or the device refuses a call.
        NumericalError: values that are not finite, a matrix that is not symmetric, or one that is not positive
            definite even with the last shift; the message counts or names the units.
    """
    _require_layout(matrix, right)
    if min(right.shape) == 0:
        return Solved(0.0, 0.0)
    diagonal = matrix.diagonal().clone()
    dead = diagonal == 0
    has_dead = _check(matrix, right, diagonal, dead)
    scale = torch.where(dead, 1, diagonal).rsqrt().log2().round().exp2()
    for rows in residual.blocks(matrix):
        matrix[rows].mul_(scale[rows, None]).mul_(scale)
    matrix.diagonal().masked_fill_(dead, 1)
    diagonal = matrix.diagonal().clone()
    # ‖A‖_∞, the largest row sum of |A|.
    norm = torch.linalg.vector_norm(matrix, 1, dim=1).max()
    right *= scale
    if has_dead:
        right.masked_fill_(dead, 0)
    wanted = right.clone() if refine else right[:MEASURED].clone()
    engine: Factorisation = native_cholesky.Factorisation(pieces=pieces) if impl == "native" else TorchFactorisation()
    shift = _factor_(matrix, diagonal, engine)
    engine.solve_(right)
    for _ in range(refine):
        correction = residual.remaining(matrix, diagonal, right, wanted)
        engine.solve_(correction)
        right += correction
    wanted = wanted[:MEASURED]
    left = residual.remaining(matrix, diagonal, right[:MEASURED], wanted)
    solved = Solved(residual.backward_error(left, right[:MEASURED], wanted, norm), shift)
    right *= scale
    return solved


def _require_layout(matrix: Tensor, right: Tensor) -> None:
    def describe(tensor: Tensor) -> str:
        layout = f"strides {tensor.stride()}" if tensor.layout == torch.strided else f"layout {tensor.layout}"
        return f"{tensor.dtype} {tuple(tensor.shape)} with {layout} on {tensor.device}"

    def usable(tensor: Tensor) -> bool:
        rows, columns = tensor.shape
        return (
            tensor.layout == torch.strided
            and tensor.device.type in ("cpu", "cuda")
            and (columns <= 1 or tensor.stride(1) == 1)
            and (rows <= 1 or tensor.stride(0) >= columns)
            and not tensor.requires_grad
        )

    fits = (
        matrix.dim() == right.dim() == 2
        and matrix.shape[0] == matrix.shape[1] == right.shape[1]
        and matrix.dtype == right.dtype in (torch.float32, torch.float64)
        and usable(matrix)
        and usable(right)
        and matrix.device == right.device
    )
    if fits and not _overlap(matrix, right):
        return
    raise BackendError(
        "Ridge system: expected a square matrix and right-hand sides (d, n), both float32 or both float64, rows "
        f"contiguous, in memory of their own, without gradients, got {describe(matrix)} and {describe(right)}"
        f"{' that overlap' if fits else ''}. Convert or copy them."
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    def extent(tensor: Tensor) -> tuple[int, int]:
        start = tensor.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return start, start + (last + 1) * tensor.element_size()

    if a.device != b.device or not (a.numel() and b.numel()):
        return False
    (a_first, a_last), (b_first, b_last) = extent(a), extent(b)
    return a_first < b_last and b_first < a_last


def _check(matrix: Tensor, right: Tensor, diagonal: Tensor, dead: Tensor) -> bool:
    """Whether a unit is dead; raises where the system is none that `solve_` answers. The host waits once."""
    # A product with one random vector shows everything: a value that is not finite spreads, and A z = Aᵀ z for
    # (almost) no z but of a symmetric A. Two passes over the matrix and no copy of it.
    probe = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = probe.to(matrix)
    across, down = matrix @ vector, matrix.T @ vector
    # |A| |z| bounds the rounding of both products; after Cauchy–Schwarz, |a_ij| ≤ √(a_ii a_jj).
    root = diagonal.double().sqrt()
    allowed = root * (root * vector.abs().double()).sum() * 4 * torch.finfo(matrix.dtype).eps * len(matrix) ** 0.5
    faults = torch.stack(
        [
            ~across.isfinite(),
            (~torch.linalg.vector_norm(right, torch.inf).isfinite()).expand(len(matrix)),
            diagonal < 0,
            dead & (across != 0),
            (across.double() - down.double()).abs() > allowed,
            dead,
        ]
    )
    matrix_bad, right_bad, negative, stray, asymmetric, has_dead = faults.any(1).tolist()
    if matrix_bad or right_bad:
        _refuse_not_finite(matrix, right)
    if negative:
        raise NumericalError(
            f"Ridge system: expected a positive definite matrix, got {int(faults[2].sum())} negative values on the "
            f"diagonal, the first of unit {_first(faults[2])}. It is no Gram matrix."
        )
    if stray:
        raise NumericalError(
            "Ridge system: expected a positive definite matrix, got a row that is not zero but is on the diagonal. It "
            "is not a Gram matrix."
        )
    if asymmetric:
        raise NumericalError(
            f"Ridge system: expected a symmetric matrix with |a_ij|² ≤ a_ii a_jj, got {int(faults[4].sum())} rows that "
            f"differ from their columns, the first of unit {_first(faults[4])}. It is no Gram matrix."
        )
    return bool(has_dead)


def _first(fault: Tensor) -> int:
    return int(fault.nonzero()[0])


def _refuse_not_finite(matrix: Tensor, right: Tensor) -> None:
    bad = sum(int((~matrix[rows].isfinite()).sum()) for rows in residual.blocks(matrix))
    wrong = int((~right.isfinite()).sum())
    if bad or wrong:
        raise NumericalError(
            f"Ridge system: expected finite values, got {bad} in the matrix and {wrong} in the right-hand sides "
            "that are NaN or infinite. Look for them in the activations, or compute in float32."
        )
    raise NumericalError("Ridge system: expected values whose sums are finite, got an overflow. Scale the matrix.")


def _factor_(matrix: Tensor, diagonal: Tensor, engine: Factorisation) -> float:
    """Factor the scaled matrix, with the first shift of its diagonal that serves; the shift is returned."""
    pivot = engine.factor_(matrix)
    if pivot == 0:
        return 0.0
    unit = len(matrix) * torch.finfo(matrix.dtype).eps
    for shift in (factor * unit for factor in SHIFTS):
        _restore_lower_(matrix, diagonal + shift)
        again = engine.factor_(matrix)
        if again == 0:
            warnings.warn(
                f"A ridge system was not positive definite in {matrix.dtype} (pivot of unit {pivot - 1} of "
                f"{len(matrix)}): solved with {shift:.1e} added to its scaled diagonal. More damping avoids this.",
                stacklevel=3,
            )
            return shift
    raise NumericalError(
        f"Ridge system: expected a positive definite matrix, got a non-positive pivot at unit {pivot - 1} of "
        f"{len(matrix)}, and still one after {len(SHIFTS)} shifts of the diagonal, up to {SHIFTS[-1] * unit:.1e} of "
        "it. Raise the damping."
    )


def _restore_lower_(matrix: Tensor, diagonal: Tensor) -> None:
    for rows in residual.blocks(matrix):
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T
        square = matrix[rows, rows]
        upper = square.triu(1)
        square.copy_(upper + upper.T)
    matrix.diagonal().copy_(diagonal)
