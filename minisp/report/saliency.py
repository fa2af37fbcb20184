"""How saliency is distributed over the units of a structure, in a few numbers. Shapes: u units, n kept ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""The quantiles that are taken: least, two below, median, two above, largest."""


@dataclass(frozen=True)
class Saliency:
    """The distribution of a structure's scores.

    Attributes:
        quantiles: of the scores of all units, at `LEVELS`.
        lost: share of the sum of all scores that belonged to the units that went.
        highest_cut: the largest score among the units that went; None where none did.
    """

    quantiles: tuple[float, ...]
    lost: float
    highest_cut: float | None


def saliency_of(score: Tensor, kept: Tensor) -> Saliency:
    """The distribution of scores (u,) float64, non-negative, where the units kept (n,) int64 stay."""
    levels = torch.tensor(LEVELS, dtype=score.dtype, device=score.device)
    gone = torch.ones_like(score, dtype=torch.bool)
    gone[kept.to(score.device)] = False
    total = float(score.sum())
    return Saliency(
        quantiles=tuple(torch.quantile(score, levels).tolist()),
        lost=float(score[gone].sum()) / total if total else 0.0,
        highest_cut=float(score[gone].max()) if gone.any() else None,
    )
