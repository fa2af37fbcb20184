"""A multiple-choice check that needs no data set: which of four passages continues the one before?

Questions stand at even distances in a text, a context of C tokens each, followed by its continuation of n tokens. The
wrong answers are the continuations of the next questions, so that all four have the subject and the style of the text.
The answer is the continuation with the largest Σ log p(token | context and tokens before), as multiple-choice tasks are
scored by the field's evaluation harnesses; all have the same length, so no normalisation is needed.

Shapes: Q questions, A answers to each, L = C + n tokens, B rows of tokens at once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisp.errors import CalibrationError
from minisp.text.windows import evaluating

CONTEXT = 16
CONTINUATION = 8
NUM_ANSWERS = 4
QUESTIONS_AT_ONCE = 4
# The shortest text that questions can be made from.
FEWEST_TOKENS = NUM_ANSWERS * (CONTEXT + CONTINUATION)


@dataclass(frozen=True)
class Choices:
    """How often the model picks the true continuation, and how that was measured.

    Attributes:
        accuracy: share of the questions answered rightly; chance gives 1/num_answers.
        num_questions, num_answers: how many questions, and answers to each.
        context, continuation: tokens of the question and of an answer.
    """

    accuracy: float
    num_questions: int
    num_answers: int
    context: int
    continuation: int

    @property
    def standard_error(self) -> float:
        """Of the accuracy, for independent questions: √(a(1 − a)/Q)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_questions)


def continuation_choices(model: nn.Module, tokens: Tensor, *, num_questions: int = 100) -> Choices:
    """Have a causal language model choose among continuations.

    Args:
        model: a transformers causal language model, on the device and in the type it computes in.
        tokens: (T,) integer ids of a text that nothing was calibrated on.
        num_questions: Q wanted, at least as many as there are answers; fewer are asked where the text is shorter.

    Raises:
        CalibrationError: the text is shorter than `FEWEST_TOKENS`.
    """
    length = CONTEXT + CONTINUATION
    count = min(max(num_questions, NUM_ANSWERS), len(tokens) // length)
    if len(tokens) < FEWEST_TOKENS:
        raise CalibrationError(
            f"Multiple choice: expected a text of at least {FEWEST_TOKENS} tokens, got {len(tokens)}. Pass more text."
        )
    device = next(model.parameters()).device
    spacing = len(tokens) // count
    questions = torch.stack([tokens[i * spacing : i * spacing + length] for i in range(count)]).to(device)
    right = 0
    with evaluating(model), torch.no_grad():
        for group in torch.arange(count).split(QUESTIONS_AT_ONCE):
            # Row by row the answers to one question after the other, the true one first.
            answers = (group[:, None] + torch.arange(NUM_ANSWERS)) % count
            contexts = questions[group, :CONTEXT].repeat_interleave(NUM_ANSWERS, 0)
            ids = torch.cat([contexts, questions[answers.flatten(), CONTEXT:]], 1)
            scores = _scores(model, ids).view(-1, NUM_ANSWERS)
            # A tie is no answer.
            right += int((scores[:, :1] > scores[:, 1:]).all(1).sum())
    return Choices(right / count, count, NUM_ANSWERS, CONTEXT, CONTINUATION)


def _scores(model: nn.Module, ids: Tensor) -> Tensor:
    """(B,) log-likelihood of the last n tokens of each row of ids (B, L), in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, CONTEXT - 1 : -1]
    scores: Tensor = logits.float().log_softmax(-1).gather(2, ids[:, CONTEXT:, None])[..., 0].sum(1)
    return scores
