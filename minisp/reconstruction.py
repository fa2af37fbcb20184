"""Refitting what is left: the kept columns of the down projection. Knows neither files nor models."""

from dataclasses import dataclass

from torch import Tensor

from minisp import ops
from minisp.config import MinifyConfig
from minisp.errors import NumericalError


@dataclass(frozen=True)
class Reconstruction:
    """One layer after selection.

    Attributes:
        layer: index of the layer.
        kept: (n,) int64 sorted.
        down: (d, n) float32, the new down projection; None where nothing changed.
        residual: ‖X Wᵀ − X_S W'ᵀ‖ / ‖X Wᵀ‖ on the calibration tokens.
        residual_sliced: the same without refitting, W' = W_S.
    """

    layer: int
    kept: Tensor
    down: Tensor | None
    residual: float
    residual_sliced: float


def reconstruct(layer: int, gram: Tensor | None, kept: Tensor, weight: Tensor, config: MinifyConfig) -> Reconstruction:
    """Refit one layer's down projection to what the whole layer computed.

    Args:
        layer: index, for messages.
        gram: (m, m) G on the tokens to fit; None only when nothing was cut.
        kept: (n,) int64 sorted.
        weight: (d, m) the down projection.
        config: damping, shrink_to, reconstruct.

    Raises:
        NumericalError: the ridge system cannot be solved; the message names the layer.
    """
    if len(kept) == weight.shape[1] or gram is None:
        return Reconstruction(layer, kept, None, 0.0, 0.0)
    kept_on_device = kept.to(gram.device)
    sliced = weight[:, kept_on_device].to(gram.dtype)
    residual_sliced = ops.residual(gram, kept_on_device, weight, sliced)
    if not config.reconstruct:
        return Reconstruction(layer, kept, sliced, residual_sliced, residual_sliced)
    try:
        to_zero = config.shrink_to == "zero"
        down = ops.ridge_solve(gram, kept_on_device, weight, config.damping, to_zero=to_zero)
    except NumericalError as error:
        raise NumericalError(f"Layer {layer}: {error}") from error
    return Reconstruction(layer, kept, down, ops.residual(gram, kept_on_device, weight, down), residual_sliced)
