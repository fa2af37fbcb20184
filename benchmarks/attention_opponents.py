"""What others do to MLPs and attention together without training anything, at an equal number of parameters.

Shapes: a structure has u units of c columns; x (T, u·c) is the input of its consumer W (d, u·c), G = XᵀX. The unit of
attention is a key/value group, since the published scripts cut heads of models that have a key for every query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from opponents import Cut, others
from torch import Tensor

from minisp.methods.selection import select
from minisp.methods.statistics import Statistics
from minisp.models.structures import Structure


@dataclass(frozen=True)
class Part:
    """What a method may look at of one structure: weight W (d, u·c) float32, statistics, mean input (u·c,)."""

    structure: Structure
    weight: Tensor
    statistics: Statistics
    mean: Tensor

    @property
    def squares(self) -> Tensor:
        """Σ_t x² (u·c,)."""
        assert self.statistics.gram is not None
        return self.statistics.gram.diagonal()

    def by_unit(self, columns: Tensor) -> Tensor:
        """A value for each column (u·c,) as (u, c)."""
        return columns.view(-1, self.structure.columns)


Method = Callable[[Sequence[Part], float], list[Cut]]


def flap(parts: Sequence[Part], keep: float) -> list[Cut]:
    """FLAP: Var(x_j)·‖W_j‖² standardised over the columns of a module, its mean over a unit's columns, one ranking.

    Source: An et al., 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", equations 4 to
    8, and the mean of what goes as a bias. As there, units are ranked by their scores as they are, and counted by their
    parameters. It differs in that a structure keeps one unit at least.
    """
    scores = []
    for part in parts:
        variance = part.squares / part.statistics.num_tokens - part.mean.square()
        score = variance * part.weight.square().sum(0)
        scores.append(part.by_unit((score - score.mean()) / score.std()).mean(1))
    cuts = []
    for part, kept in zip(parts, ranked(parts, scores, keep), strict=True):
        columns = part.structure.columns_of(others(kept, part.structure.num_units))
        cuts.append(Cut(kept, bias=part.weight[:, columns] @ part.mean[columns]))
    return cuts


def wanda_sp(parts: Sequence[Part], keep: float) -> list[Cut]:
    """Wanda-sp-like: Σ over a unit's columns of mean_i |W_ij|·‖x_j‖, the same share of every layer, no refit.

    Source: An et al., 2024, as above (its baseline). Attention keeps the number of groups that is nearest to the share,
    one at least; MLPs keep what the budget then leaves.
    """
    scores = [part.by_unit(part.weight.abs().mean(0) * part.squares.sqrt()).sum(1) for part in parts]
    heads = [part.structure for part in parts if part.structure.head_dim]
    mlps = [part.structure for part in parts if not part.structure.head_dim]
    budget = keep * sum(part.structure.num_units * part.structure.parameters for part in parts)
    sizes = {str(x): max(1, round(keep * x.num_units)) for x in heads}
    left = budget - sum(sizes[str(x)] * x.parameters for x in heads)
    share = left / sum(x.num_units * x.parameters for x in mlps)
    sizes |= {str(x): min(x.num_units, int(share * x.num_units)) for x in mlps}
    return [Cut(kept) for kept in select(scores, [sizes[str(part.structure)] for part in parts])]


def ranked(parts: Sequence[Part], scores: Sequence[Tensor], keep: float) -> list[Tensor]:
    """The units (n,) sorted of every structure that stay: the best ones of all until the parameters are spent."""
    costs = torch.tensor([part.structure.parameters for part in parts for _ in range(part.structure.num_units)])
    bounded = [score.clone() for score in scores]
    for score in bounded:
        score[score.argmax()] = torch.inf
    order = torch.cat(bounded).sort(descending=True, stable=True).indices
    stay = order[costs[order].cumsum(0) <= keep * int(costs.sum()) + 1e-6]
    chosen = torch.zeros(len(costs), dtype=torch.bool)
    chosen[stay] = True
    return [mask.nonzero().flatten() for mask in chosen.split([len(score) for score in scores])]


OPPONENTS: dict[str, Method] = {"FLAP": flap, "Wanda-sp-like": wanda_sp}
