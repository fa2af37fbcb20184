"""Which weights go, over all matrices at once: one threshold on what removal costs, reached in several shots.

What costs at most the threshold goes. It is the least one by which at least the target goes. Of equal costs all go, so
what is free (dead places, weights that are zero already) goes, and what went in one shot goes in every later one.
Units of coupled structures need no rule of their own: their costs are the scores of `selection.allocate`.

Shapes: R rows and C columns of one matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from minisp.errors import ConfigError, NumericalError
from minisp.ranks import Ranks

DROPPED_BITS = 11
"""Of the 31 bits of a positive float32 the histogram reads the first 20, which tell apart 1 in 4096."""
BINS = 1 << (31 - DROPPED_BITS)


def linear_shots(share: float, shots: int) -> list[float]:
    """The share of the weights that is gone after each shot: equal steps.

    Raises:
        ConfigError: no shot, or a share outside (0, 1).
    """
    if shots < 1 or not 0 < share < 1:
        raise ConfigError(
            f"Shots: expected at least 1 of them and a share in (0, 1) to remove, got {shots} and {share}. Pass such "
            "values."
        )
    return [share * (shot + 1) / shots for shot in range(shots)]


def least_count(share: float, total: int) -> int:
    """The least whole number that is at least `share` of `total`; the share is read as it is written."""
    return ceil(Fraction(repr(float(share))) * total)


@dataclass(frozen=True)
class LineScores:
    """What each row and each column of one matrix costs: rows (R,), columns (C,)."""

    rows: Tensor
    columns: Tensor

    def removed(self, threshold: float) -> tuple[Tensor, Tensor]:
        """(R,) and (C,) bool, True for rows and columns that go."""
        return self.rows <= threshold, self.columns <= threshold


def removed_weights(rows: int, columns: int, rows_gone: int, columns_gone: int) -> int:
    """How many weights of a matrix (R, C) go with so many rows and columns: R_del·C + C_del·R − R_del·C_del."""
    return rows_gone * columns + columns_gone * rows - rows_gone * columns_gone


def line_threshold(matrices: Sequence[LineScores], share: float) -> float:
    """The least score such that at least `share` of all weights lie in rows or columns of at most that score.

    Rows and columns of long and short matrices compare by what they cost, whatever the number of their weights, as
    published; scores divided by the number of weights compare by what a weight costs.

    Raises:
        NumericalError: a score is not a number.
    """
    scores, gains = zip(*(_gains(matrix) for matrix in matrices), strict=True)
    every, order = torch.cat(scores).sort(stable=True)
    if every.isnan().any():
        raise NumericalError("Costs of rows and columns: expected numbers, got NaN. Check the curvature.")
    gone = torch.cat(gains)[order].cumsum(0)
    total = sum(len(matrix.rows) * len(matrix.columns) for matrix in matrices)
    place = int(torch.searchsorted(gone, least_count(share, total)))
    return float(every[place])


def _gains(matrix: LineScores) -> tuple[Tensor, Tensor]:
    """Scores (R + C,) float64 in ascending order, and how many weights go with each beyond those gone before it."""
    rows, columns = len(matrix.rows), len(matrix.columns)
    scores, order = torch.cat([matrix.rows, matrix.columns]).double().cpu().sort(stable=True)
    is_row = order < rows
    # A row takes what earlier columns have left of it, a column what earlier rows have.
    return scores, torch.where(is_row, columns - (~is_row).cumsum(0), rows - is_row.cumsum(0))


@dataclass
class CostHistogram:
    """How many weights cost how much: a sum of counts, so matrices, chunks and ranks add up, and no cost is kept.

    A bin holds the costs that agree in their first 20 bits, so that a threshold is off by at most 1 part in 4096.

    Attributes:
        counts: (BINS,) int64.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))

    def update_(self, costs: Tensor) -> None:
        """Add costs of any shape, at least 0.

        Raises:
            NumericalError: a cost is negative or not finite.
        """
        for chunk in costs.float().contiguous().view(-1).split(1 << 22):
            if not bool(((chunk >= 0) & chunk.isfinite()).all()):
                raise NumericalError(
                    "Costs of weights: expected finite values, at least 0, got others. Check the curvature."
                )
            # Positive floats are ordered as their bits are; adding 0 makes −0 a 0.
            keys = (chunk + 0.0).view(torch.int32) >> DROPPED_BITS
            self.counts += torch.bincount(keys, minlength=BINS).to(self.counts.device)

    def sum_over_(self, ranks: Ranks) -> None:
        """Add up the records of all processes."""
        ranks.sum_(self.counts)

    def threshold(self, share: float) -> float:
        """The largest cost of the first bin up to which at least `share` of all weights lie; compare float32 costs."""
        gone = self.counts.cumsum(0)
        place = int(torch.searchsorted(gone, least_count(share, int(gone[-1]))))
        highest = torch.tensor([((place + 1) << DROPPED_BITS) - 1], dtype=torch.int32)
        return float(highest.view(torch.float32))
