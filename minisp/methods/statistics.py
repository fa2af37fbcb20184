"""What calibration leaves of one structure: saliency sums and the Gram matrix. Sums only, so chunks and ranks add up.

Life of a record: `Statistics.empty` → `update_` per chunk of tokens → `finalize_` → `score`, `gram`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minisp import ops
from minisp.config import SaliencyScore
from minisp.errors import NumericalError
from minisp.ranks import Ranks

SCORES: tuple[SaliencyScore, ...] = ("taylor", "fisher", "signed")
# Rows of the Gram matrix that are stored together, as far as the diagonal reaches: half the bytes of the whole.
PANEL_ROWS = 512


@dataclass
class Statistics:
    """Sums over calibration tokens for the u units, of c columns each, of one structure.

    Attributes:
        num_tokens: tokens seen; num_scored: those of them that saliency was computed on.
        saliency: (3, u) float64: Σ|p|, Σp², Σp, where p is x ⊙ g summed over the columns of a unit, and g the gradient
            of the summed negative log likelihood.
        gram: (u·c, u·c) float32 G = XᵀX, or None where only saliency is wanted.
        gradients: (d, d) float32 Σ g gᵀ of the gradients g (d,) at the consumer's output, of scored tokens; or None
            where they are not wanted.
    """

    num_tokens: int
    saliency: Tensor
    gram: Tensor | None
    num_scored: int = 0
    gradients: Tensor | None = None

    @classmethod
    def empty(
        cls,
        num_units: int,
        columns: int = 1,
        *,
        gram: bool,
        outputs: int = 0,
        device: torch.device | str = "cpu",
    ) -> "Statistics":
        """All sums zero for `num_units` units of `columns` columns each.

        Args:
            outputs: d where sums of output gradients are wanted, else 0.
        """
        width = num_units * columns
        gram_, gradients = (
            torch.zeros(size, size, dtype=torch.float32, device=device) if wanted else None
            for size, wanted in ((width, gram), (outputs, outputs > 0))
        )
        return cls(0, torch.zeros(3, num_units, dtype=torch.float64, device=device), gram_, gradients=gradients)

    def update_(self, x: Tensor, sums: Tensor | None, grad_y: Tensor | None = None) -> None:
        """Add one chunk of tokens.

        Args:
            x: (T, u·c) activations.
            sums: (3, u) saliency sums, where known.
            grad_y: (T, d) gradients at the consumer's output, where known.
        """
        self.num_tokens += x.shape[0]
        if sums is not None:
            self.num_scored += x.shape[0]
            self.saliency += sums
        if self.gradients is not None and grad_y is not None:
            ops.gram_update_(self.gradients, grad_y)
        if self.gram is not None:
            ops.gram_update_(self.gram, x)

    def sum_over_(self, ranks: Ranks) -> None:
        """Add up the records of all processes; before `finalize_`."""
        ranks.sum_(self.saliency, *(matrix for matrix in (self.gram, self.gradients) if matrix is not None))
        self.num_tokens, self.num_scored = ranks.total(self.num_tokens), ranks.total(self.num_scored)

    def finalize_(self, whose: object) -> "Statistics":
        """Complete the Gram matrix and check the sums.

        Args:
            whose: what a message calls the structure.

        Raises:
            NumericalError: a sum is not finite; the message names the structure and counts the units.
        """
        for matrix in (self.gram, self.gradients):
            if matrix is not None:
                ops.mirror_(matrix)
        finite = torch.isfinite(self.saliency).all(0)
        if self.gram is not None:
            # A finite diagonal bounds the rest: |G_ij| ≤ √(G_ii G_jj).
            finite &= torch.isfinite(self.gram.diagonal()).view(len(finite), -1).all(1)
        if not finite.all():
            raise NumericalError(
                f"{whose}: expected finite statistics, got {int((~finite).sum())} of {len(finite)} units "
                "with NaN or infinity. Check the weights, or compute in float32 (dtype='float32')."
            )
        return self

    def score(self, kind: SaliencyScore) -> Tensor:
        """Saliency (u,) float64, non-negative, over T scored tokens: `taylor` Σ|p|/T, `fisher` Σp²/T, `signed` |Σp|/T.

        First-order Taylor: removing unit j changes the loss by about −x_j g_j per token (Khasia, 2026; Molchanov et
        al., 2017). `fisher` is the diagonal of the empirical Fisher information of gates on the unit, one for every
        token (Theis et al., 2018, have one for all); half of it is the second-order estimate of what removal costs.
        """
        return self.saliency[SCORES.index(kind)].abs() / max(self.num_scored, 1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) to store: of the finalized Gram matrix, row panels up to the diagonal's blocks."""
        yield "saliency", self.saliency
        yield "num_tokens", torch.tensor([self.num_tokens, self.num_scored])
        if self.gram is not None:
            yield from panels(self.gram, "gram")
        if self.gradients is not None:
            yield from panels(self.gradients, "gradients")

    @classmethod
    def from_tensors(
        cls, read: Callable[[str], Tensor], columns: int = 1, *, gram: bool, outputs: int = 0, device: torch.device
    ) -> "Statistics":
        """The record of which `tensors` were stored; `read` gives the tensor of a key.

        Args:
            gram: with its Gram matrix.
            outputs: d, with its sums of output gradients; 0, without.
        """
        saliency = read("saliency").to(device)
        record = cls.empty(saliency.shape[1], columns, gram=gram, outputs=outputs, device=device)
        record.saliency = saliency
        record.num_tokens, record.num_scored = read("num_tokens").tolist()
        if record.gram is not None:
            fill_(record.gram, "gram", read)
        if record.gradients is not None:
            fill_(record.gradients, "gradients", read)
        return record


def panels(matrix: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """(key, row panel up to the diagonal's block) of a symmetric matrix (n, n), to store."""
    for start in range(0, len(matrix), PANEL_ROWS):
        panel = matrix[start : start + PANEL_ROWS]
        yield f"{name}_{start}", panel[:, : start + len(panel)]


def fill_(matrix: Tensor, name: str, read: Callable[[str], Tensor]) -> None:
    """Fill a matrix (n, n) with the symmetric one of which `panels` were stored; `read` gives the tensor of a key."""
    for start in range(0, len(matrix), PANEL_ROWS):
        panel = read(f"{name}_{start}")
        matrix[start : start + len(panel), : panel.shape[1]].copy_(panel, non_blocking=True)
    ops.mirror_(matrix)
