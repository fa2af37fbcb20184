"""Refitting what is left: the kept columns of the down projection. Knows neither files nor models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from minisp import ops
from minisp.config import MinifyConfig
from minisp.errors import NumericalError
from minisp.methods.damping import Curve, choose_damping
from minisp.methods.statistics import LayerStatistics
from minisp.ops.ridge import RidgeProblem, ridge_fit


@dataclass(frozen=True)
class Reconstruction:
    """One layer after selection.

    Attributes:
        layer: index of the layer.
        kept: (n,) int64 sorted.
        down: (d, n), the new down projection in the dtype of the old one; None where nothing changed.
        residual: ‖X Wᵀ − X_S W'ᵀ‖ / ‖X Wᵀ‖ on the calibration tokens, of the refit: before drift is corrected.
        residual_sliced: the same without refitting, W' = W_S.
        damping: the ridge λ that was used, relative to the mean diagonal of G; 0 where nothing was refitted.
        damping_curve: what was tried to find it, see `damping.Curve`; empty where it was given.
        backward_error, shift: of the refit's solve, see `cholesky.Solved`.
        drift_explained: share of ‖H_dense − H_pruned‖² behind the layer that its correction took away on the
            calibration tokens; 0 where nothing was corrected.
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
    drift_explained: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, as plain values; `from_facts` takes them back."""
        return {key: value for key, value in asdict(self).items() if key not in ("kept", "down")}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], kept: Tensor, down: Tensor | None) -> "Reconstruction":
        """The record with these tensors and what `facts` gave."""
        curve = tuple((damping, error) for damping, error in facts["damping_curve"])
        return cls(**{**facts, "damping_curve": curve}, kept=kept, down=down)


def reconstruct(
    layer: int,
    statistics: LayerStatistics,
    kept: Tensor,
    weight: Tensor,
    config: MinifyConfig,
    *,
    residuals: bool = True,
) -> Reconstruction:
    """Refit one layer's down projection to what the whole layer computed.

    Args:
        layer: index, for messages.
        statistics: of the tokens to fit, with the Gram matrix (m, m) unless nothing was cut.
        kept: (n,) int64 sorted.
        weight: (d, m) the down projection.
        config: damping, shrink_to, reconstruct.
        residuals: whether both residuals are wanted: they take about d m² FLOPs, and are NaN without.

    Raises:
        NumericalError: the ridge system cannot be solved; the message names the layer.
    """
    if len(kept) == weight.shape[1]:
        return Reconstruction(layer, kept, None, 0.0, 0.0)
    gram = statistics.gram
    assert gram is not None
    on_device = kept.to(gram.device)
    total = ops.output_energy(gram, weight) if residuals else float("nan")
    # The choice of a damping goes by what is lost.
    problem = RidgeProblem(gram, on_device, weight, energies=residuals or config.damping == "auto")
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


def correct(
    result: Reconstruction, gram: Tensor, cross: Tensor, drift_energy: float, config: MinifyConfig
) -> Reconstruction:
    """Let a refitted down projection take over what it can of the drift that the layers below it have left.

    With E = H_dense − H_pruned the drift behind the layer, and X_S its kept activations in the pruned model,

        Δ = argmin Σ_t ‖e_t − Δ x_t‖² + μ‖Δ‖² = EᵀX_S (X_SᵀX_S + μI)⁻¹,    W'' = W' + Δ.

    Little of the drift is a linear function of one layer's activations, but what is adds up from layer to layer. It
    takes far more damping than the refit does: with little, the fit is to chance, and the result is worse than none.

    Args:
        result: the reconstruction on dense inputs, with its down projection (d, n).
        gram: X_SᵀX_S (n, n) float32; overwritten.
        cross: EᵀX_S (d, n) float32.
        drift_energy: ‖E‖².
        config: correction_damping.

    Raises:
        NumericalError: the system cannot be solved; the message names the layer.
    """
    assert result.down is not None
    if drift_energy <= 0:
        return result
    mu = config.correction_damping * float(gram.diagonal().mean())
    try:
        delta = ridge_fit(gram, cross, config.correction_damping)
    except NumericalError as error:
        raise NumericalError(f"Layer {result.layer}, correction: {error}") from error
    # Δ G = C − μΔ, so that ‖E‖² − ‖E − X Δᵀ‖² = 2 tr ΔCᵀ − tr ΔGΔᵀ = tr ΔCᵀ + μ‖Δ‖².
    explained = float((delta * cross).sum() + mu * delta.square().sum()) / drift_energy
    down = (result.down.to(delta) + delta).to(result.down.dtype)
    return replace(result, down=down, drift_explained=explained)


def _relative(energy: float, total: float) -> float:
    return 0.0 if total <= 0 else float((energy / total) ** 0.5)
