"""What is left of a symmetric system X A = R that was factored in place, and how large that is.

Of A, the strict upper triangle and the diagonal are still known. Shapes: n unknowns, d right-hand sides. Right-hand
sides are rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_ROWS = 32
"""Rows of A that a CPU works on at once: in float64, 4 % of a float32 matrix of 1536 rows."""
GPU_BYTES = 128 * 2**20
"""Memory that rows of A in float64 take on a GPU, or that of a GPU_BLOCKS-th of A where that is more."""
GPU_BLOCKS = 20


def blocks(matrix: Tensor) -> Iterator[slice]:
    """The rows of (n, n) that are worked on at once: a CPU's cache decides, on a GPU the number of launches."""
    rows = rows_at_once(matrix.device.type, len(matrix))
    return (slice(start, min(start + rows, len(matrix))) for start in range(0, len(matrix), rows))


def rows_at_once(device_type: str, size: int) -> int:
    """How many rows of a matrix (size, size) `blocks` takes."""
    return min(size, CPU_ROWS if device_type == "cpu" else max(GPU_BYTES // (8 * size), -(-size // GPU_BLOCKS)))


def remaining(matrix: Tensor, diagonal: Tensor, solution: Tensor, wanted: Tensor) -> Tensor:
    """r − xA (d, n), formed in float64, in the dtype of r; A (n, n) from its strict upper triangle and `diagonal`."""
    x = solution.to(torch.float64)
    left = wanted.to(torch.float64) - x * diagonal.to(x)
    room = x.new_empty(rows_at_once(matrix.device.type, len(matrix)), len(matrix))
    for rows in blocks(matrix):
        count = rows.stop - rows.start
        block = room[:count, rows.start :].copy_(matrix[rows, rows.start :])
        block[:, :count].triu_(1)
        left[:, rows.start :].addmm_(x[:, rows], block, alpha=-1)
        left[:, rows].addmm_(x[:, rows.start :], block.T, alpha=-1)
    return left.to(wanted.dtype)


def backward_error(remaining: Tensor, solution: Tensor, wanted: Tensor, norm: Tensor) -> float:
    """‖r − xA‖_∞ / (‖A‖_∞ ‖x‖_∞ + ‖r‖_∞), the largest of the right-hand sides (Rigal & Gaches, 1967).

    Args:
        remaining, solution, wanted: (d, n) r − xA, x and r.
        norm: () ‖A‖_∞.
    """
    size = norm * solution.abs().amax(1) + wanted.abs().amax(1)
    return float((remaining.abs().amax(1) / torch.where(size > 0, size, 1)).max())
