"""Refitting what is left: the kept columns of the consumer's weight. Knows neither files nor models.

Shapes: X (T, m) the consumer's input, W (d, m) its weight, S the n kept columns, G = XᵀX (m, m).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from minisp import ops
from minisp.config import MinifyConfig
from minisp.methods.damping import Curve, choose_damping
from minisp.ops.ridge import RidgeProblem, ridge_fit


@dataclass(frozen=True)
class Fit:
    """How a refit went.

    Attributes:
        residual: ‖X Wᵀ − X_S W'ᵀ‖ / ‖X Wᵀ‖ on the calibration tokens, of the refit: before drift is corrected.
        residual_sliced: the same without refitting, W' = W_S.
        damping: the ridge λ that was used, relative to the mean diagonal of G; 0 where nothing was refitted.
        damping_curve: what was tried to find it, see `damping.Curve`; empty where it was given.
        backward_error, shift: of the refit's solve, see `cholesky.Solved`.
        drift_explained: share of ‖H_dense − H_pruned‖² behind the layer that its correction took away on the
            calibration tokens; 0 where nothing was corrected.
    """

    residual: float = 0.0
    residual_sliced: float = 0.0
    damping: float = 0.0
    damping_curve: Curve = ()
    backward_error: float = 0.0
    shift: float = 0.0
    drift_explained: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Plain values, which `from_facts` takes back."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Fit":
        """The record of which `facts` came."""
        curve = tuple((damping, error) for damping, error in facts["damping_curve"])
        return cls(**{**facts, "damping_curve": curve})


def refit(
    gram: Tensor, kept: Tensor, weight: Tensor, num_tokens: int, config: MinifyConfig, *, residuals: bool = True
) -> tuple[Tensor, Fit]:
    """Refit the kept columns of a weight to what all of them computed.

    Args:
        gram: G (m, m) float32 of the tokens to fit.
        kept: the kept columns (n,) int64 sorted, fewer than m.
        weight: W (d, m).
        num_tokens: T.
        config: damping, shrink_to, reconstruct.
        residuals: whether both residuals are wanted: they take about d m² FLOPs, and are NaN without.

    Returns:
        W' (d, n) in the dtype of the weight, and how the fit went.

    Raises:
        NumericalError: the ridge system cannot be solved.
    """
    total = ops.output_energy(gram, weight) if residuals else float("nan")
    # The choice of a damping goes by what is lost.
    problem = RidgeProblem(gram, kept.to(gram.device), weight, energies=residuals or config.damping == "auto")
    if not config.reconstruct:
        residual = _relative(problem.energy_sliced, total)
        return problem.original.to(weight.dtype), Fit(residual, residual)
    to_zero = config.shrink_to == "zero"
    curve: Curve = ()
    if config.damping == "auto":
        solution, curve = choose_damping(problem, num_tokens, to_zero=to_zero)
    else:
        solution = problem.solve(config.damping, to_zero=to_zero)
    return solution.down.to(weight.dtype), Fit(
        residual=_relative(solution.energy, total),
        residual_sliced=_relative(solution.energy_sliced, total),
        damping=solution.damping,
        damping_curve=curve,
        backward_error=solution.backward_error,
        shift=solution.shift,
    )


def correct(
    weight: Tensor, fit: Fit, gram: Tensor, cross: Tensor, drift_energy: float, damping: float
) -> tuple[Tensor, Fit]:
    """Let a refitted weight take over what it can of the drift that the pruned layers below it have left.

    With E = H_dense − H_pruned the drift behind the layer, and X_S its kept activations in the pruned model,

        Δ = argmin Σ_t ‖e_t − Δ x_t‖² + μ‖Δ‖² = EᵀX_S (X_SᵀX_S + μI)⁻¹,    W'' = W' + Δ.

    Little of the drift is a linear function of one layer's activations, but what is adds up from layer to layer. It
    takes far more damping than the refit does: with little, the fit is to chance, and the result is worse than none.

    Args:
        weight: W' (d, n).
        fit: how its refit went.
        gram: X_SᵀX_S (n, n) float32; overwritten.
        cross: EᵀX_S (d, n) float32.
        drift_energy: ‖E‖².
        damping: μ relative to the mean diagonal of the Gram matrix, above 0.

    Returns:
        W'' (d, n) in the dtype of the weight, and `fit` with the share of the drift that was explained.

    Raises:
        NumericalError: the system cannot be solved.
    """
    if drift_energy <= 0:
        return weight, fit
    mu = damping * float(gram.diagonal().mean())
    delta = ridge_fit(gram, cross, damping)
    # Δ G = C − μΔ, so that ‖E‖² − ‖E − X Δᵀ‖² = 2 tr ΔCᵀ − tr ΔGΔᵀ = tr ΔCᵀ + μ‖Δ‖².
    explained = float((delta * cross).sum() + mu * delta.square().sum()) / drift_energy
    return (weight.to(delta) + delta).to(weight.dtype), replace(fit, drift_explained=explained)


def _relative(energy: float, total: float) -> float:
    return 0.0 if total <= 0 else float((energy / total) ** 0.5)
