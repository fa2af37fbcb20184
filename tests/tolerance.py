"""How exact a result must be: as exact as eager torch in the same type, up to rounding."""

import torch
from torch import Tensor


def error(value: Tensor, exact: Tensor, least: float = 1e-30) -> float:
    """The largest difference relative to the largest value, or to `least` where that is more; `exact` is float64."""
    return float((value.double().cpu() - exact).abs().max() / exact.abs().max().clamp_min(least))


def check(value: Tensor, eager: Tensor, exact: Tensor, terms: int = 1, least: float = 1e-30) -> None:
    """`value` is finite and about as exact as `eager`.

    Args:
        terms: how many rounded values it sums, whose errors are independent.
        least: of the scale that errors are measured by, where larger numbers cancel.
    """
    assert torch.isfinite(value).all()
    assert error(value, exact, least) <= error(eager, exact, least) + torch.finfo(value.dtype).eps * terms**0.5
