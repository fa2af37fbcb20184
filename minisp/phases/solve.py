"""One structure's refit: on the dense model's statistics, on the pruned model's activations, or corrected for drift.

Shapes: B windows, L tokens per window, T = B·L, d hidden size, n kept columns of the consumer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minisp import ops
from minisp.config import MinifyConfig
from minisp.methods.reconstruction import Fit, correct, refit
from minisp.methods.statistics import Statistics
from minisp.models.edits import cut_
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.phases.passage import Passage
from minisp.phases.run import Result, Run, naming
from minisp.store.names import Record


def refit_on_dense(
    stream: Stream, structure: Structure, kept: Tensor, config: MinifyConfig, run: Run
) -> tuple[Result, Tensor | None]:
    """Refit to what the whole structure computed in the dense model, from its statistics."""
    if len(kept) == structure.num_units:
        return Result(structure, kept, Fit()), None
    found = run.statistics(structure, gram=True, device=stream.device)
    return _solved(structure, kept, found, stream.weight(structure), config)


def refit_on_pruned(
    stream: Stream, structure: Structure, kept: Tensor, config: MinifyConfig, run: Run, passage: Passage
) -> tuple[Result, Tensor | None]:
    """Refit to what the whole structure computes from the pruned layers below it.

    Args:
        passage: the pruned model's through the layer, in which the structure is watched.
    """
    if len(kept) == structure.num_units:
        return Result(structure, kept, Fit()), None
    statistics = Statistics.empty(structure.num_units, structure.columns, gram=True, device=stream.device)
    for _, x, _ in passage.run(structure.columns_of(kept.to(stream.device))):
        statistics.update_(x, None)
    statistics.sum_over_(run.ranks)
    statistics.finalize_(structure)
    return _solved(structure, kept, statistics, stream.weight(structure), config)


def _solved(
    structure: Structure, kept: Tensor, statistics: Statistics, weight: Tensor, config: MinifyConfig
) -> tuple[Result, Tensor]:
    assert statistics.gram is not None
    with naming(structure):
        new, fit = refit(statistics.gram, structure.columns_of(kept), weight, statistics.num_tokens, config)
    return Result(structure, kept, fit), new


def refit_and_correct(
    stream: Stream, structure: Structure, kept: Tensor, config: MinifyConfig, run: Run, passage: Passage
) -> tuple[Result, Tensor | None]:
    """Refit a structure on the dense model's statistics, cut it, then correct the drift behind its layer.

    Args:
        passage: the pruned model's through the layer, in which the structure is watched.
    """
    result, weight = refit_on_dense(stream, structure, kept, config, run)
    if weight is None:
        # Memory of its own: the layer's goes when the next one is read.
        weight = stream.weight(structure).clone()
    else:
        cut_(stream.layers[structure.layer], structure, kept, weight)
    drift = _Drift.empty(structure.columns * len(kept), len(weight), stream.device)
    for number, x, passing in passage.run():
        target = run.own.read(Record.DENSE.of(structure.layer + 1), str(number), ahead=True)
        drift.add_(x, target, passage.join(x, passing))
    run.ranks.sum_(drift.gram, drift.cross, drift.energy)
    cross, energy = drift.cross.T.contiguous(), float(drift.energy)
    with naming(structure, ", drift correction"):
        weight, fit = correct(weight, result.fit, ops.mirror_(drift.gram), cross, energy, config.correction_damping)
    return Result(structure, kept, fit), weight


@dataclass
class _Drift:
    """Sums of the regression of the drift E (T, d) on the activations X_S (T, n) of a structure that is cut.

    Attributes:
        gram: X_SᵀX_S (n, n) float32.
        cross: X_SᵀE (n, d) float32.
        energy: ‖E‖², () float64.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, n: int, hidden: int, device: torch.device) -> "_Drift":
        energy = torch.zeros((), dtype=torch.float64, device=device)
        gram, cross = (torch.zeros(n, size, dtype=torch.float32, device=device) for size in (n, hidden))
        return cls(gram, cross, energy)

    def add_(self, x: Tensor, dense: Tensor, pruned: Tensor) -> None:
        """A micro-batch: x (T, n), and the states (B, L, d) behind the layer in both models.

        E is their difference in float32: in 16 bits it would be rounded before its square is taken.
        """
        drift = (dense.float() - pruned.float()).flatten(0, -2)
        self.energy += torch.linalg.vector_norm(drift).double().square()
        ops.gram_update_(self.gram, x)
        ops.cross_update_(self.cross, x, drift.to(x.dtype))
