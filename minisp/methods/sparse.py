"""Matrices with zeros in them: which weights of a pattern go, SparseGPT, and the proof that a pattern holds.

All rules see a matrix by scores (R, C), of which the least go, and by the factor A of its curvature. With G = I and A
diagonal, the Surgeon's cost ½ W_ij² / ([G⁻¹]_ii [A⁻¹]_jj) is Wanda's score; with A = I too, magnitude; with A whole, it
is what SparseGPT starts from.

Patterns: "n:m" keeps at most n of every m consecutive inputs of an output; "unstructured" is free.

Shapes: W (R, C), outputs by inputs, without the bias. A mask `removed` (R, C) is True for what goes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from minisp.config import Pattern, group_of
from minisp.errors import ConfigError
from minisp.methods.curvature import Factor
from minisp.methods.thresholds import least_count

COLUMNS = 128
"""Columns that SparseGPT works on before it brings the others up to date, as published; a multiple of every m."""


def magnitude_scores(weight: Tensor) -> Tensor:
    """W² (R, C)."""
    return weight.float().square()


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """(|W_ij| ‖a_j‖)² (R, C); they compare inside a row (Sun et al., ICLR 2024).

    Args:
        squares: Σ a² (C,), the diagonal of A before damping.
    """
    return weight.float().square() * squares.to(weight.device, torch.float32)


def least(scores: Tensor, pattern: Pattern, share: float, *, by_row: bool = False) -> Tensor:
    """The mask (R, C) of what goes; of equal scores the first go.

    Args:
        scores: (R, C).
        pattern: of "n:m", m − n go from each group, whatever the share.
        share: in (0, 1), of what goes where the pattern is "unstructured", rounded up.
        by_row: the share is taken from each row rather than from the matrix.

    Raises:
        ConfigError: the groups do not fill the rows.
    """
    group = group_of(pattern)
    if group is None:
        flat = scores if by_row else scores.reshape(1, -1)
        return _lowest(flat, least_count(share, flat.shape[1])).view(scores.shape)
    kept, size = group
    return _lowest(_grouped(scores, size), size - kept).view(scores.shape)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` lowest of the last axis."""
    order = scores.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def _grouped(matrix: Tensor, size: int) -> Tensor:
    """(R, C / m, m)."""
    if matrix.shape[1] % size:
        raise ConfigError(
            f"Pattern: expected a number of inputs that is a multiple of {size}, got {matrix.shape[1]}. Leave this "
            "matrix dense, or use pattern='unstructured'."
        )
    return matrix.reshape(len(matrix), -1, size)


def least_groups(inputs: Factor, weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask (R, C) of "n:m" whose removal costs least in each group by itself, correlations inside it included.

    In a row i, removing the inputs P of a group costs ½ w_Pᵀ ([A⁻¹]_PP)⁻¹ w_P / [G⁻¹]_ii: of all P of m − n inputs the
    best is taken, which does not depend on G. All m!/(n!(m−n)!) of them are tried, with 2 R C (m − n)²/m FLOPs each:
    6 for 2:4, 70 for 4:8.

    Raises:
        ConfigError: the pattern has no groups, or they do not fill the rows.
    """
    group = group_of(pattern)
    if group is None:
        raise ConfigError(f"Pattern: expected one with groups, such as 2:4, got {pattern!r}. Use `least` for it.")
    kept, size = group
    values = _grouped(weight.to(inputs.matrix.dtype).masked_fill(inputs.dead, 0), size)
    blocks = inputs.inverse_blocks(torch.arange(len(inputs.matrix), device=weight.device).view(-1, size))
    best = values.new_full(values.shape[:2], torch.inf)
    removed = torch.zeros_like(values, dtype=torch.bool)
    for places in combinations(range(size), size - kept):
        chosen = torch.tensor(places, device=weight.device)
        inverse = torch.linalg.inv(blocks[:, chosen[:, None], chosen])
        some = values[:, :, chosen]
        cost = ((some[:, :, None] @ inverse).squeeze(2) * some).sum(2)
        is_less = cost < best
        best = torch.where(is_less, cost, best)
        removed[is_less] = torch.zeros(size, dtype=torch.bool, device=weight.device).index_fill_(0, chosen, True)
    return removed.view(weight.shape)


def sparsegpt(inputs: Factor, weight: Tensor, pattern: Pattern, share: float, *, columns: int = COLUMNS) -> Tensor:
    """W' (R, C) after Frantar & Alistarh (ICML 2023): left to right, what a weight leaves is taken up by those behind.

    With A⁻¹ = Uᵀ U, U upper triangular, U_jj² is [A⁻¹]_jj once the inputs before j are fixed, and U_j: / U_jj how those
    behind make up for w_j: exact for one weight among the inputs from j on, greedy for all. Which of a group go is
    decided when it is reached, by w²/U_jj²; of "unstructured", the share is taken from each block of columns.

    R C² FLOPs beside 2/3 C³ for U; memory: 2 C² + R C values.

    Args:
        inputs: A (C, C), damped.
        columns: in a block, a multiple of m. It changes which weights go if they are unstructured, nothing else.

    Raises:
        ConfigError: the groups do not fill the rows or the blocks.
        NumericalError: A cannot be inverted.
    """
    group = group_of(pattern)
    size = group[1] if group else 1
    if columns % size:
        raise ConfigError(
            f"SparseGPT: expected blocks of a multiple of {size} columns, got {columns}. Pass such a one."
        )
    _grouped(weight, size)
    upper = inputs.inverse_root()
    result = weight.to(upper.dtype, copy=True)
    # Weights of dead inputs go first.
    divisor = upper.diagonal().masked_fill(inputs.dead, torch.inf)

    def choose(start: int, place: int, current: Tensor) -> Tensor:
        first = start + place
        return least((current / divisor[first : first + current.shape[1]]).square(), pattern, share)

    for start in range(0, result.shape[1], columns):
        stop = min(start + columns, result.shape[1])
        errors = _sweep_(result[:, start:stop], upper[start:stop, start:stop], partial(choose, start), size)
        result[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


def _sweep_(block: Tensor, upper: Tensor, choose: Callable[[int, Tensor], Tensor], size: int) -> Tensor:
    """Remove weights from a block (R, k), left to right, in place; returns what each left, over U_jj (R, k).

    Args:
        choose: the mask of what goes of some columns, given the place of the first in the block, and what they are now.
        size: m, or 1 where the whole block is chosen from at once.
    """
    errors = torch.zeros_like(block)
    removed = choose(0, block) if size == 1 else torch.zeros_like(block, dtype=torch.bool)
    for place in range(block.shape[1]):
        if size > 1 and place % size == 0:
            removed[:, place : place + size] = choose(place, block[:, place : place + size])
        goes = removed[:, place]
        errors[:, place] = torch.where(goes, block[:, place], 0) / upper[place, place]
        block[:, place:] -= errors[:, place, None] * upper[place, place:]
        block[:, place].masked_fill_(goes, 0)
    return errors


@dataclass(frozen=True)
class SparsityFacts:
    """What is true of the zeros of a matrix.

    Attributes:
        pattern: that was looked for.
        weights, zeros: how many there are.
        groups, broken: groups of the pattern, and those with more than n weights that are not zero; 0 without groups.
        zero_rows, zero_columns: rows and columns of zeros alone.
    """

    pattern: str
    weights: int
    zeros: int
    groups: int
    broken: int
    zero_rows: int
    zero_columns: int

    @property
    def share(self) -> float:
        """Zeros among the weights."""
        return self.zeros / max(self.weights, 1)

    @property
    def holds(self) -> bool:
        """Whether every group is as the pattern says."""
        return self.broken == 0


def sparsity_facts(weight: Tensor, pattern: Pattern) -> SparsityFacts:
    """Count the zeros of W (R, C), and the groups of consecutive inputs that break the pattern.

    Raises:
        ConfigError: the groups do not fill the rows.
    """
    is_zero = weight == 0
    group = group_of(pattern)
    groups = broken = 0
    if group is not None:
        full = (~_grouped(is_zero, group[1])).sum(2)
        groups, broken = full.numel(), int((full > group[0]).sum())
    return SparsityFacts(
        pattern=pattern,
        weights=weight.numel(),
        zeros=int(is_zero.sum()),
        groups=groups,
        broken=broken,
        zero_rows=int(is_zero.all(1).sum()),
        zero_columns=int(is_zero.all(0).sum()),
    )
