"""Refitting what is left: the kept columns of the down projection. Knows neither files nor models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from minisp import ops
from minisp.config import MinifyConfig
from minisp.damping import Curve, choose_damping
from minisp.errors import NumericalError
from minisp.ridge import RidgeProblem
from minisp.statistics import LayerStatistics


@dataclass(frozen=True)
class Reconstruction:
    """One layer after selection.

    Attributes:
        layer: index of the layer.
        kept: (n,) int64 sorted.
        down: (d, n), the new down projection in the dtype of the old one; None where nothing changed.
        residual: ‖X Wᵀ − X_S W'ᵀ‖ / ‖X Wᵀ‖ on the calibration tokens.
        residual_sliced: the same without refitting, W' = W_S.
        damping: the ridge λ that was used, relative to the mean diagonal of G; 0 where nothing was refitted.
        damping_curve: what was tried to find it, see `damping.Curve`; empty where it was given.
        backward_error, shift: of the solve, see `cholesky.Solved`.
    """

    layer: int
    kept: Tensor
    down: Tensor | None
    residual: float
    residual_sliced: float
    damping: float = 0.0
    damping_curve: Curve = ()
    backward_error: float = 0.0
    shift: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, as plain values; `from_facts` takes them back."""
        return {key: value for key, value in asdict(self).items() if key not in ("kept", "down")}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], kept: Tensor, down: Tensor | None) -> "Reconstruction":
        """The record with these tensors and what `facts` gave."""
        curve = tuple((damping, error) for damping, error in facts["damping_curve"])
        return cls(**{**facts, "damping_curve": curve}, kept=kept, down=down)


def reconstruct(
    layer: int, statistics: LayerStatistics, kept: Tensor, weight: Tensor, config: MinifyConfig
) -> Reconstruction:
    """Refit one layer's down projection to what the whole layer computed.

    Args:
        layer: index, for messages.
        statistics: of the tokens to fit, with the Gram matrix (m, m) unless nothing was cut.
        kept: (n,) int64 sorted.
        weight: (d, m) the down projection.
        config: damping, shrink_to, reconstruct.

    Raises:
        NumericalError: the ridge system cannot be solved; the message names the layer.
    """
    gram = statistics.gram
    if len(kept) == weight.shape[1] or gram is None:
        return Reconstruction(layer, kept, None, 0.0, 0.0)
    on_device = kept.to(gram.device)
    total = ops.output_energy(gram, weight)
    problem = RidgeProblem(gram, on_device, weight)
    if not config.reconstruct:
        residual = _relative(problem.energy_sliced, total)
        return Reconstruction(layer, kept, problem.original.to(weight.dtype), residual, residual)
    to_zero = config.shrink_to == "zero"
    curve: Curve = ()
    try:
        if config.damping == "auto":
            solution, curve = choose_damping(problem, statistics.num_tokens, to_zero=to_zero)
        else:
            solution = problem.solve(config.damping, to_zero=to_zero)
    except NumericalError as error:
        raise NumericalError(f"Layer {layer}: {error}") from error
    return Reconstruction(
        layer=layer,
        kept=kept,
        down=solution.down.to(weight.dtype),
        residual=_relative(solution.energy, total),
        residual_sliced=_relative(solution.energy_sliced, total),
        damping=solution.damping,
        damping_curve=curve,
        backward_error=solution.backward_error,
        shift=solution.shift,
    )


def _relative(energy: float, total: float) -> float:
    return float((energy / total) ** 0.5) if total > 0 else 0.0
