"""Symmetric positive definite systems X A = R, in place: what surrounds the factorisation, and who does it.

The matrix is scaled to a nearly equal diagonal first (Jacobi; van der Sluis, 1969: within a factor n of the best
diagonal scaling), by powers of two, which rounds nothing. Units whose row is zero are set aside exactly. A
factorisation that fails is tried again with a small shift of the diagonal, announced by a warning and recorded.
Solutions can be refined with residuals in float64 (Wilkinson). The backward error of every solve is measured.

Shapes: n unknowns, d right-hand sides. Right-hand sides are rows.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from minisp import native_cholesky
from minisp.errors import BackendError, NumericalError

SHIFTS = (1.0, 10.0, 100.0)
"""Diagonal shifts of the second and later attempts, in units of n·eps, for a diagonal of about 1."""
MEASURED = 16
"""Right-hand sides whose backward error is measured where nothing is refined."""
BLOCK = 64
"""Rows scaled or restored at once."""
RESIDUAL_ROWS = 32
"""Rows of the matrix in float64 at once: 4 % of a float32 matrix of 1536 rows."""


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


def solve_(matrix: Tensor, right: Tensor, *, impl: Literal["torch", "native"] = "native", refine: int = 0) -> Solved:
    """right ← right A⁻¹; the matrix is overwritten.

    Args:
        matrix: (n, n) A, float32 or float64, symmetric positive definite or with zero rows; rows contiguous. With the
            matrix on the host and `right` on a GPU, panels of A are streamed through the GPU.
        right: (d, n) in the dtype of `matrix`, rows contiguous; not overlapping it. For a zero row, the smallest
            solution, 0, is taken.
        impl: "native" works in place with the kernels of minisp._C, "torch" with torch.linalg and a second matrix.
        refine: steps of refinement with residuals in float64; takes a copy of `right`.

    Raises:
        BackendError: tensors of another type, shape or layout than stated.
        NumericalError: values that are not finite, a matrix that is not symmetric, or one that is not positive
            definite even with the last shift; the message counts or names the units.
    """
    _require_layout(matrix, right)
    if min(right.shape) == 0:
        return Solved(0.0, 0.0)
    diagonal = matrix.diagonal().clone()
    _check(matrix, right, diagonal)
    dead = diagonal == 0
    scale = torch.where(dead, 1, diagonal).rsqrt().log2().round().exp2()
    for start in range(0, len(matrix), BLOCK):
        matrix[start : start + BLOCK] *= scale[start : start + BLOCK, None]
        matrix[start : start + BLOCK] *= scale
    matrix.diagonal().masked_fill_(dead, 1)
    diagonal = matrix.diagonal().clone()
    norm = _infinity_norm(matrix)
    right *= scale.to(right.device)
    if dead.any():
        right.masked_fill_(dead.to(right.device), 0)
    wanted = right.clone() if refine else right[:MEASURED].clone()
    engine: Factorisation = native_cholesky.Factorisation() if impl == "native" else TorchFactorisation()
    shift = _factor_(matrix, diagonal, engine)
    engine.solve_(right)
    for _ in range(refine):
        correction = _remaining(matrix, diagonal, right, wanted)
        engine.solve_(correction)
        right += correction
    solved = Solved(
        _backward_error(_remaining(matrix, diagonal, right[: len(wanted)], wanted), right, wanted, norm), shift
    )
    right *= scale.to(right.device)
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
        and (matrix.device == right.device or matrix.device.type == "cpu")
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


def _check(matrix: Tensor, right: Tensor, diagonal: Tensor) -> None:
    # A product with one random vector shows everything: a value that is not finite spreads, and A z = Aᵀ z for
    # (almost) no z but of a symmetric A. Two passes over the matrix and no copy of it.
    probe = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = probe.to(matrix)
    across, down = matrix @ vector, matrix.T @ vector
    if not (across.isfinite().all() and torch.linalg.vector_norm(right, torch.inf).isfinite()):
        bad = sum(int((~block.isfinite()).sum()) for block in matrix.split(BLOCK))
        wrong = int((~right.isfinite()).sum())
        if bad or wrong:
            raise NumericalError(
                f"Ridge system: expected finite values, got {bad} in the matrix and {wrong} in the right-hand sides "
                "that are NaN or infinite. Look for them in the activations, or compute in float32."
            )
        raise NumericalError("Ridge system: expected values whose sums are finite, got an overflow. Scale the matrix.")
    if (diagonal < 0).any():
        first = int((diagonal < 0).nonzero()[0])
        raise NumericalError(
            f"Ridge system: expected a positive definite matrix, got {int((diagonal < 0).sum())} negative values on "
            f"the diagonal, the first of unit {first}. It is no Gram matrix."
        )
    if (across[diagonal == 0] != 0).any():
        raise NumericalError(
            "Ridge system: expected a positive definite matrix, got a row that is not zero but is on the diagonal. It "
            "is not a Gram matrix."
        )
    # |A| |z| bounds the rounding of both products; after Cauchy–Schwarz, |a_ij| ≤ √(a_ii a_jj).
    root = diagonal.double().sqrt()
    allowed = root * (root * vector.abs().double()).sum() * 4 * torch.finfo(matrix.dtype).eps * len(matrix) ** 0.5
    asymmetric = (across.double() - down.double()).abs() > allowed
    if asymmetric.any():
        raise NumericalError(
            f"Ridge system: expected a symmetric matrix with |a_ij|² ≤ a_ii a_jj, got {int(asymmetric.sum())} rows "
            f"that differ from their columns, the first of unit {int(asymmetric.nonzero()[0])}. It is no Gram matrix."
        )


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
    for start in range(0, len(matrix), BLOCK):
        stop = min(start + BLOCK, len(matrix))
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        square = matrix[start:stop, start:stop]
        upper = square.triu(1)
        square.copy_(upper + upper.T)
    matrix.diagonal().copy_(diagonal)


def _infinity_norm(matrix: Tensor) -> float:
    """The largest row sum of |A|."""
    return float(torch.linalg.vector_norm(matrix, 1, dim=1).max())


def _remaining(matrix: Tensor, diagonal: Tensor, solution: Tensor, wanted: Tensor) -> Tensor:
    """r − xA in float64, rounded to the dtype of r; A from its strict upper triangle and its diagonal."""
    x = solution.to(torch.float64)
    left = wanted.to(torch.float64) - x * diagonal.to(x)
    room = x.new_empty(RESIDUAL_ROWS, len(matrix))
    for start in range(0, len(matrix), RESIDUAL_ROWS):
        stop = min(start + RESIDUAL_ROWS, len(matrix))
        block = room[: stop - start, start:].copy_(matrix[start:stop, start:])
        block[:, : stop - start].triu_(1)
        left[:, start:] -= x[:, start:stop] @ block
        left[:, start:stop] -= x[:, start:] @ block.T
    return left.to(wanted.dtype)


def _backward_error(remaining: Tensor, solution: Tensor, wanted: Tensor, norm: float) -> float:
    size = norm * solution[: len(wanted)].abs().amax(1) + wanted.abs().amax(1)
    return float((remaining.abs().amax(1) / torch.where(size > 0, size, 1)).max())
