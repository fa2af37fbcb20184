"""What the saliency sweep differentiates."""

from dataclasses import dataclass

from torch import Tensor

from minisp.ops.sampling import draw_labels, label_numbers


@dataclass(frozen=True)
class Objective:
    """The summed negative log likelihood (nats) of a label for every token but the last of each window.

    With the text's own next tokens as labels, mean (x·g)² is the empirical Fisher information; with labels drawn from
    the model, it is the true one, which a second-order expansion of KL(before ‖ after) has (Kunstner et al., 2019,
    "Limitations of the Empirical Fisher Approximation for Natural Gradient Descent", equations 2 and 3).

    Attributes:
        label_seed: seeds the labels that the model draws itself; None takes the text's next tokens.
    """

    label_seed: int | None = None

    def numbers(self, ids: Tensor) -> Tensor | None:
        """Numbers (B, L) in [0, 1) that decide the drawn labels of windows (B, L); None where none are drawn."""
        return None if self.label_seed is None else label_numbers(ids, self.label_seed).to(ids.device)

    def labels(self, logits: Tensor, following: Tensor, numbers: Tensor | None) -> Tensor:
        """Labels (B, L): the tokens that follow, or those that `numbers` draw from logits (B, L, V)."""
        return following if numbers is None else draw_labels(logits, numbers)
