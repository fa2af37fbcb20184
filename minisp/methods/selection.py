"""Which units stay: scores in, kept indices out. Knows neither files nor models.

Scores are means over the same tokens of the same loss, so they compare across structures. Keeping the most saliency in
a budget of parameters is a knapsack: of all steps that are still possible, the one of most saliency per parameter is
taken, until none fits.

Shapes: u units of a structure, n kept ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import floor, lcm

import torch
from torch import Tensor

from minisp.errors import ConfigError


@dataclass(frozen=True)
class Candidate:
    """A structure that competes for the budget.

    Attributes:
        scores: (u,) saliency, non-negative.
        parameters: of one unit.
        step: units are kept in multiples of it, or all of them; a multiple of `groups`.
        tie: structures of one tie keep equally many.
        groups: the units are so many equal runs, which keep equally many.
    """

    scores: Tensor
    parameters: int
    step: int
    tie: str
    groups: int = 1


def default_alignment(width: int) -> int:
    """The largest power of two that is at most a 32nd of the width, and at most 128, the tile of a GEMM.

    Coarser steps cost quality, above all in narrow layers: SmolLM2-135M (width 1536) at 80 % lost 1.226 at multiples of
    128, 1.224 at 32, 1.222 at 16 and 1.220 at 1 (perplexity over dense, held-out calibration text).
    """
    return min(128, 1 << max(0, (width // 32).bit_length() - 1))


def allocate(candidates: Sequence[Candidate], keep: float, *, min_keep: float) -> list[int]:
    """Numbers of units that keep the most saliency: at most `keep` of all parameters, none under its lower bound.

    With a structure's units sorted, its saliency as a function of their number is concave, and so it stays when read at
    multiples of the step, and summed over a tie or over groups. Taking the next most valuable step per parameter is
    therefore optimal among equal steps (Fox, 1966, "Discrete optimization via marginal analysis"). A step that no
    longer fits is passed over.

    Args:
        keep: share of the candidates' parameters, in (0, 1].
        min_keep: lower bound of a structure's units as a share of them, rounded up to the step where the budget has
            room for that, else down to at least one step; at most `keep` is used.

    Returns:
        One number for each candidate.

    Raises:
        ConfigError: the lower bounds alone exceed the budget, or structures of one tie differ in size.
    """
    curves = [_Curve.of(members) for members in _ties(candidates).values()]
    total = sum(curve.cost * curve.units for curve in curves)
    # `keep` is read as it is written: 0.7 · 10 is 7, though the float is less. A third, written out, falls short of a
    # whole unit by less than 1e-9: that is granted.
    budget = floor(Fraction(repr(float(keep))) * total + Fraction(min(curve.cost for curve in curves), 10**9))
    least = min(min_keep, keep)
    sizes = [curve.lower_bound(least, up=True) for curve in curves]
    if _cost(curves, sizes) > budget:
        # No room for bounds that are rounded up.
        sizes = [curve.lower_bound(least, up=False) for curve in curves]
    room = budget - _cost(curves, sizes)
    if room < 0:
        raise ConfigError(
            f"Budget: expected at most {budget:,} of {total:,} parameters to stay (keep={keep}), got at least "
            f"{_cost(curves, sizes):,} from the smallest size of each of {len(candidates)} structures, "
            f"{max(curve.step for curve in curves)} units. Lower the alignment or tp, or keep more."
        )
    steps = [step for place, curve in enumerate(curves) if (step := curve.next_step(sizes[place], place)) is not None]
    heapify(steps)
    while steps:
        _, place, stop = heappop(steps)
        cost = curves[place].cost * (stop - sizes[place])
        if cost > room:
            continue
        room -= cost
        sizes[place] = stop
        if (step := curves[place].next_step(stop, place)) is not None:
            heappush(steps, step)
    found = dict(zip(_ties(candidates), sizes, strict=True))
    return [found[candidate.tie] for candidate in candidates]


def select(scores: Sequence[Tensor], sizes: Sequence[int], groups: Sequence[int] | None = None) -> list[Tensor]:
    """Per structure (n,) sorted int64: the `sizes[i]` most salient units; of equal units the first ones stay.

    Args:
        groups: per structure, in how many equal runs its units are; every run keeps sizes[i] / groups[i]. None is one.
    """
    runs = groups or [1] * len(scores)
    chosen = zip(scores, sizes, runs, strict=True)
    return [ranking(score, count)[:size].sort().values.cpu() for score, size, count in chosen]


def ranking(scores: Tensor, groups: int = 1) -> Tensor:
    """The units (u,) int64 in the order in which they stay: the best one of every run, then the second ones, and so on.

    Args:
        scores: (u,); of equal ones the first stays longer.
        groups: number of equal runs of units.
    """
    runs = scores.view(groups, -1)
    order = torch.sort(runs, descending=True, stable=True).indices
    firsts = torch.arange(0, len(scores), runs.shape[1], device=scores.device)
    return (order + firsts[:, None]).T.flatten()


@dataclass(frozen=True)
class _Curve:
    """What the structures of one tie are worth as a function of the units that each of them keeps.

    Attributes:
        worth: (u + 1,) float64.
        cost: parameters of one unit of each.
    """

    worth: Tensor
    cost: int
    step: int

    @classmethod
    def of(cls, members: Sequence[Candidate]) -> "_Curve":
        sizes = {len(member.scores) for member in members}
        if len(sizes) > 1:
            raise ConfigError(
                f"Uniform widths: expected layers of one width, got widths from {min(sizes)} to {max(sizes)}. "
                "Use widths='per-layer' for this model."
            )
        zero = torch.zeros(1, dtype=torch.float64)
        ranked = [m.scores[ranking(m.scores, m.groups)].double().cpu() for m in members]
        worth = torch.stack([torch.cat([zero, worths.cumsum(0)]) for worths in ranked]).sum(0)
        return cls(worth, sum(m.parameters for m in members), lcm(*(m.step for m in members)))

    @property
    def units(self) -> int:
        return len(self.worth) - 1

    def next_step(self, start: int, place: int) -> tuple[float, int, int] | None:
        """(− saliency per parameter, place, where the step ends) of the step from `start` units; None at the end."""
        if start == self.units:
            return None
        stop = min(self.units, (start // self.step + 1) * self.step)
        gain = float(self.worth[stop] - self.worth[start]) / (stop - start)
        return -gain / self.cost, place, stop

    def lower_bound(self, share: float, *, up: bool) -> int:
        wanted = floor(share * self.units) + (self.step - 1 if up else 0)
        return min(self.units, max(1, wanted // self.step) * self.step)


def _cost(curves: Sequence[_Curve], sizes: Sequence[int]) -> int:
    return sum(curve.cost * size for curve, size in zip(curves, sizes, strict=True))


def _ties(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(candidate.tie, []).append(candidate)
    return found
