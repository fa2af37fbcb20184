"""Ideas that lost, or are not the default, as functions of one set of statistics; `ablation.py` measures them.

Shapes: m units, n kept units, d hidden size. G = XᵀX (m, m), W (d, m) the down projection, s (m,) a saliency.
"""

from collections.abc import Callable, Sequence

import torch
from opponents import others
from torch import Tensor


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(G + μI)⁻¹ in float64, μ relative to the mean diagonal."""
    system = gram.double()
    system.diagonal().add_(damping * float(gram.diagonal().mean()))
    return torch.cholesky_inverse(torch.linalg.cholesky(system))


def unexplained(gram: Tensor, damping: float) -> Tensor:
    """Share of each unit's energy that the others cannot explain: 1 / ((G + μI)_jj [(G + μI)⁻¹]_jj), (m,) in (0, 1]."""
    diagonal = gram.diagonal().double()
    return 1 / ((diagonal + damping * diagonal.mean()) * damped_inverse(gram, damping).diagonal())


def eliminate_salient(gram: Tensor, score: Tensor, keep: int, *, damping: float, at_once: int = 8) -> Tensor:
    """The units (keep,) left when those go whose saliency the units still there explain best: s_j / ((G + μI)_jj B_jj).

    B = (G + μI)⁻¹ of the units left, downdated as in `opponents.eliminate`. The share unexplained, unlike that of the
    whole layer, rises for a unit whose twin has gone.
    """
    inverse, left = damped_inverse(gram, damping), torch.arange(len(gram))
    diagonal = gram.diagonal().double()
    cost = score / (diagonal + damping * diagonal.mean())
    while len(left) > keep:
        gone = (cost[left] / inverse.diagonal()).topk(min(at_once, len(left) - keep), largest=False).indices
        stay = others(gone, len(left))
        step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ step
        left = left[stay]
    return left


def swap(gram: Tensor, down: Tensor, kept: Tensor, *, damping: float, at_once: int = 32, rounds: int = 10) -> Tensor:
    """Kept units (n,) sorted after a local search for less ‖(W − W')Xᵀ‖² + μ‖W − W'‖², W' zero outside of S.

    The best few pairs are exchanged at once, half as many where that was too greedy. Source of the search: Meng et al.,
    2024, "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization".
    """
    system, weight = gram.double(), down.double()
    system.diagonal().add_(damping * float(gram.diagonal().mean()))
    loss, going, coming = _exchanges(system, weight, kept)
    for _ in range(rounds):
        count = min(at_once, len(going))
        if count == 0:
            break
        trial = torch.cat([kept[others(going[:count], len(kept))], coming[:count]]).sort().values
        found = _exchanges(system, weight, trial)
        if found[0] < loss:
            kept, (loss, going, coming) = trial, found
        else:
            at_once //= 2
    return kept


def _exchanges(system: Tensor, weight: Tensor, kept: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss, places in `kept` that might go, and units that might come, as pairs from the best one that pays.

    With H the system, A = H_SS, M = H_PP − H_PS A⁻¹ H_SP and W' = W_S + W_P H_PS A⁻¹, the loss is tr W_P M W_Pᵀ; unit j
    of S alone costs ‖W'_j‖²/[A⁻¹]_jj when it goes, unit q of P gains ‖[W_P M]_q‖²/M_qq when it comes.
    """
    removed = others(kept, len(system))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system[kept][:, kept]))
    crossing, lost = system[kept][:, removed], weight[:, removed]
    schur = system[removed][:, removed] - crossing.T @ inverse @ crossing
    pulled = lost @ schur
    refitted = weight[:, kept] + lost @ crossing.T @ inverse
    cost = refitted.square().sum(0) / inverse.diagonal()
    gain = pulled.square().sum(0) / schur.diagonal()
    count = min(len(kept), len(removed))
    going, coming = cost.topk(count, largest=False), gain.topk(count)
    pays = coming.values > going.values
    return float((pulled * lost).sum()), going.indices[pays], removed[coming.indices[pays]]


def _shares(domains: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Every domain's scores as shares of its own total, so that no domain counts more for being harder."""
    totals = [sum(float(score.sum()) for score in scores) for scores in domains]
    return [[score / total for score in scores] for scores, total in zip(domains, totals, strict=True)]


def _over(combine: Callable[[Tensor], Tensor], domains: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [combine(torch.stack(list(layer))) for layer in zip(*domains, strict=True)]


# Scores of several domains, each a list of (m,) per layer, combined into one list.
DOMAINS: dict[str, Callable[[Sequence[Sequence[Tensor]]], list[Tensor]]] = {
    "sum": lambda domains: _over(lambda s: s.sum(0), domains),
    "mean of shares": lambda domains: _over(lambda s: s.mean(0), _shares(domains)),
    "worst share": lambda domains: _over(lambda s: s.amax(0), _shares(domains)),
    "geometric mean": lambda domains: _over(lambda s: s.log().mean(0).exp(), _shares(domains)),
}
