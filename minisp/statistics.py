"""What one layer's calibration leaves behind: saliency sums and the Gram matrix. Sums only, so chunks and ranks add up.

Life of a record: `LayerStatistics.empty` → `update_` per chunk of tokens → `finalize_` → `score`, `gram`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minisp import ops
from minisp.config import SaliencyScore
from minisp.errors import NumericalError

SCORES: tuple[SaliencyScore, ...] = ("taylor", "fisher", "signed")


@dataclass
class LayerStatistics:
    """Sums over calibration tokens for the m units of one layer.

    Attributes:
        num_tokens: tokens seen.
        saliency: (3, m) float64: Σ|p|, Σp², Σp of p = x ⊙ g, g the gradient of the summed negative log likelihood.
        gram: (m, m) float32 G = XᵀX, or None where only saliency is wanted.
    """

    num_tokens: int
    saliency: Tensor
    gram: Tensor | None

    @classmethod
    def empty(cls, width: int, *, gram: bool, device: torch.device | str = "cpu") -> "LayerStatistics":
        """All sums zero for a layer of `width` units."""
        matrix = torch.zeros(width, width, dtype=torch.float32, device=device) if gram else None
        return cls(0, torch.zeros(3, width, dtype=torch.float64, device=device), matrix)

    def update_(self, x: Tensor, sums: Tensor | None) -> None:
        """Add one chunk: activations x (T, m), and the saliency sums (3, m) of the same tokens where known."""
        self.num_tokens += x.shape[0]
        if sums is not None:
            self.saliency += sums
        if self.gram is not None:
            ops.gram_update_(self.gram, x)

    def finalize_(self, layer: int) -> "LayerStatistics":
        """Complete the Gram matrix and check the sums.

        Raises:
            NumericalError: a sum is not finite; the message names the layer and counts the units.
        """
        if self.gram is not None:
            ops.mirror_(self.gram)
        finite = torch.isfinite(self.saliency).all(0)
        if self.gram is not None:
            finite &= torch.isfinite(self.gram).all(0)
        if not finite.all():
            raise NumericalError(
                f"Statistics of layer {layer}: expected finite sums, got {int((~finite).sum())} of {len(finite)} units "
                "with NaN or infinity. Check the weights, or compute in float32 (dtype='float32')."
            )
        return self

    def score(self, kind: SaliencyScore) -> Tensor:
        """Saliency (m,) float64, non-negative, a mean over tokens: `taylor` Σ|p|/T, `fisher` Σp²/T, `signed` |Σp|/T.

        First-order Taylor: removing unit j changes the loss by about −x_j g_j per token (Khasia, 2026; Molchanov et
        al., 2017); `fisher` is the diagonal empirical Fisher of a gate on the unit (Theis et al., 2018).
        """
        return self.saliency[SCORES.index(kind)].abs() / max(self.num_tokens, 1)
