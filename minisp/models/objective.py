"""What the saliency sweep differentiates.

The loss is the summed negative log likelihood (nats) of a label for every token but the last of each window. With the
text's own next tokens as labels, mean (x·g)² is the empirical Fisher information. With labels that the model draws, it
is the true one, which a second-order expansion of KL(before ‖ after) has (Kunstner et al., 2019, "Limitations of the
Empirical Fisher Approximation for Natural Gradient Descent", equations 2 and 3).

"both" adds the two up at the price of one backward pass. With g and h the gradients for the labels of either kind, and
a sign ε = ±1 that each window draws, one pass gives g + εh, and

    E (x·(g + εh))² = (x·g)² + (x·h)²,

because ε has mean 0 (Rademacher variables, as in Hutchinson's estimator, 1990).

Shapes: B windows, L tokens per window, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minisp import ops
from minisp.config import Labels
from minisp.ops.sampling import draw_labels, label_numbers


@dataclass(frozen=True)
class Objective:
    """Which labels the loss has.

    Attributes:
        labels: "text", the tokens that follow; "sampled", tokens that the model draws; "both", see above.
        seed: of what is drawn.
    """

    labels: Labels = "text"
    seed: int = 0

    def numbers(self, ids: Tensor) -> Tensor | None:
        """Numbers (B, L) in [0, 1) that decide what is drawn for windows (B, L); None where nothing is."""
        return None if self.labels == "text" else label_numbers(ids, self.seed).to(ids.device)

    def gradient(
        self, logits: Tensor, following: Tensor, numbers: Tensor | None, signs: Tensor | None
    ) -> tuple[float, Tensor]:
        """The loss, and its gradient in the shape and dtype of the logits (B, L, V).

        Args:
            following: (B, L) the text's next tokens.
            numbers: (B, L) of these tokens, see `numbers`.
            signs: (B,) see `signs`.

        Raises:
            NumericalError: logits that are not finite, where labels are drawn.
        """
        if numbers is None:
            return ops.cross_entropy_gradient(logits, following)
        drawn = draw_labels(logits, numbers)
        loss, gradient = ops.cross_entropy_gradient(logits, drawn)
        if signs is None:
            return loss, gradient
        loss, of_text = ops.cross_entropy_gradient(logits, following)
        return loss, of_text.addcmul_(gradient, signs.to(gradient)[:, None, None])

    def signs(self, numbers: Tensor | None) -> Tensor | None:
        """ε (B,) of every window, ±1; None but for "both". The last token has no label: its number is free for it."""
        if numbers is None or self.labels != "both":
            return None
        return torch.where(numbers[:, -1] < 0.5, -1.0, 1.0)
