"""What others do to an MLP without training anything, as functions of one set of statistics.

Shapes: T tokens, m width, d hidden size. x (T, m) is the input of the down projection W (d, m), G = XᵀX,
p = x·g with g the gradient of x. Each function returns, per layer, the kept units and, where the method changes them,
the kept columns of W and a bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import naive
import torch
from torch import Tensor, nn

from minisp.methods.selection import select
from minisp.methods.statistics import Statistics
from minisp.models.edits import cut_
from minisp.models.families import decoder_layers, family_of
from minisp.models.structures import mlp_weights, structures_of
from minisp.ops.ridge import ridge_solve
from minisp.phases.run import Run


@dataclass(frozen=True)
class Layer:
    """What a method may look at: weights (float32), statistics, and the mean activation (m,)."""

    gate: Tensor
    up: Tensor
    down: Tensor
    statistics: Statistics
    mean: Tensor

    @property
    def gram(self) -> Tensor:
        gram = self.statistics.gram
        assert gram is not None
        return gram


@dataclass(frozen=True)
class Cut:
    """One layer's result: kept (n,) sorted int64, down (d, n) or None where only sliced, bias (d,) or None."""

    kept: Tensor
    down: Tensor | None = None
    bias: Tensor | None = None


OSSCAR_DAMPING = 0.01

Method = Callable[[Sequence[Layer], float], list[Cut]]


def look_at(model: Any, run: Run, means: Sequence[Tensor]) -> list[Layer]:
    """The layers of a dense model, for the methods, with the statistics that are recorded of them."""
    family, found = family_of(model.config), []
    layers = decoder_layers(model, family)
    for structure, mean in zip(structures_of(model, family), means, strict=True):
        w = mlp_weights(layers[structure.layer], family.mlp)
        assert w.gate is not None
        record = run.statistics(structure, gram=True)
        found.append(Layer(w.gate.float(), w.up.float(), w.down.float(), record, mean))
    return found


@torch.no_grad()
def cut_model_(model: Any, cuts: Sequence[Cut], names: Sequence[str] = ("mlp",)) -> None:
    """Cut the structures of these names of a dense model in place."""
    family = family_of(model.config)
    layers = decoder_layers(model, family)
    for structure, cut in zip(structures_of(model, family, names), cuts, strict=True):
        layer = layers[structure.layer]
        cut_(layer, structure, cut.kept, cut.down)
        if cut.bias is not None:
            consumer = layer.get_submodule(structure.consumer)
            consumer.bias = nn.Parameter(cut.bias.to(consumer.weight.dtype), requires_grad=False)


def magnitude(layers: Sequence[Layer], keep: float) -> list[Cut]:
    """Squared norm of all weights of a unit, the same share of every layer: the baseline of most papers on pruning."""
    return _uniform([x.gate.square().sum(1) + x.up.square().sum(1) + x.down.square().sum(0) for x in layers], keep)


def wanda_sp(layers: Sequence[Layer], keep: float) -> list[Cut]:
    """Wanda-sp-like: mean_i |W_ij|·‖x_j‖, the same share of every layer, no refit.

    Source: An et al., 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (its baseline,
    after Sun et al., 2024, "A Simple and Effective Pruning Approach for Large Language Models"). It differs in that x
    is the dense model's; there, it comes from the layers below as they are already cut.
    """
    return _uniform([x.down.abs().mean(0) * x.gram.diagonal().sqrt() for x in layers], keep)


def flap(layers: Sequence[Layer], keep: float) -> list[Cut]:
    """FLAP: Var(x_j)·‖W_j‖², standardised per layer, one ranking, and the mean of what goes as a bias.

    Source: An et al., 2024, as above, equations 4 to 8; MLP units alone, as everywhere in this table.
    """
    scores = []
    for x in layers:
        variance = x.gram.diagonal() / x.statistics.num_tokens - x.mean.square()
        score = variance * x.down.square().sum(0)
        scores.append((score - score.mean()) / score.std())
    cuts = []
    for x, kept in zip(layers, naive.rank(scores, keep), strict=True):
        removed = others(kept, len(x.mean))
        cuts.append(Cut(kept, bias=x.down[:, removed] @ x.mean[removed]))
    return cuts


def llm_pruner(layers: Sequence[Layer], keep: float) -> list[Cut]:
    """LLM-Pruner-like: |Σ_i W_ij ∂L/∂W_ij| = |Σ_t p_tj| (its vector-wise first-order Taylor), no refit.

    Source: Ma et al., 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models". It differs in that all
    layers are cut by the same share (there, the first and the last ones are spared) and heads are left alone; in that
    the sum is that of the up and down projections (twice Σ_t p_tj), without the gate's own; and in that it runs over
    all of the calibration text, where the published scripts take ten short samples and sum |W ∂L/∂W| weight by weight.
    """
    return _uniform([x.statistics.score("signed") for x in layers], keep)


def osscar(layers: Sequence[Layer], keep: float) -> list[Cut]:
    """OSSCAR-like: backward elimination of the units that the others replace best, then least squares.

    Source: Meng et al., 2024, "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
    Optimization": min ‖X Wᵀ − X_S W'ᵀ‖² over S, the same share of every layer, damped by 0.01 of the
    mean diagonal towards the old weights, as in its published code. It differs in that units go eight at a time, and
    that X is the dense model's; there, it comes from the layers below as they are already cut.
    """
    cuts = []
    for x in layers:
        kept = eliminate(x.gram, x.down, round(keep * len(x.gram)), damping=OSSCAR_DAMPING)
        cuts.append(Cut(kept, ridge_solve(x.gram, kept, x.down, OSSCAR_DAMPING).down))
    return cuts


def paper(layers: Sequence[Layer], keep: float) -> list[Cut]:
    """The paper's recipe, with the best damping found for it; see `naive`."""
    kept = naive.rank([x.statistics.score("taylor") for x in layers], keep)
    return [
        Cut(k) if len(k) == len(x.gram) else Cut(k, naive.ridge(x.gram, x.down, k, naive.DAMPING))
        for x, k in zip(layers, kept, strict=True)
    ]


def eliminate(gram: Tensor, down: Tensor, keep: int, *, damping: float, at_once: int = 8) -> Tensor:
    """The units (keep,) left when those go, a few at a time, whose loss the others make up for best.

    With B = (G + μI)⁻¹ of the units left and W their refitted columns, unit j costs ‖W_j‖²/B_jj; after removing Q,
    W −= W_Q B_QQ⁻¹ B_Q and B −= B_:Q B_QQ⁻¹ B_Q: (Hassibi & Stork, 1993, "Second order derivatives for network
    pruning: Optimal Brain Surgeon", for columns).
    """
    system = gram.double()
    system.diagonal().add_(damping * float(gram.diagonal().mean()))
    inverse, columns = torch.linalg.inv(system).float(), down.clone()
    left = torch.arange(len(gram))
    while len(left) > keep:
        cost = columns.square().sum(0) / inverse.diagonal()
        gone = cost.topk(min(at_once, len(left) - keep), largest=False).indices
        step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        stay = others(gone, len(left))
        columns = columns[:, stay] - columns[:, gone] @ step[:, stay]
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ step[:, stay]
        left = left[stay]
    return left


def _uniform(scores: Sequence[Tensor], keep: float) -> list[Cut]:
    return [Cut(kept) for kept in select(scores, [round(keep * len(score)) for score in scores])]


def others(chosen: Tensor, count: int) -> Tensor:
    """The indices below `count` that were not chosen, sorted."""
    mask = torch.ones(count, dtype=torch.bool)
    mask[chosen] = False
    return mask.nonzero().flatten()


OPPONENTS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda-sp-like": wanda_sp,
    "FLAP": flap,
    "LLM-Pruner-like": llm_pruner,
    "OSSCAR-like": osscar,
    "paper's recipe": paper,
}
