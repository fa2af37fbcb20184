"""The multiple-choice check against models whose answers are known."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from minisp.errors import CalibrationError
from minisp.evaluate.choices import CONTEXT, CONTINUATION, NUM_ANSWERS, continuation_choices

VOCAB = 1024
LENGTH = CONTEXT + CONTINUATION


class Knows(nn.Module):
    """A model that expects `shift` more than the last token, every time."""

    def __init__(self, shift: int):
        super().__init__()
        self.shift = shift
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=20.0 * nn.functional.one_hot((input_ids + self.shift) % VOCAB, VOCAB))


def test_a_model_that_knows_the_text_answers_everything_rightly() -> None:
    found = continuation_choices(Knows(1), torch.arange(VOCAB), num_questions=20)
    assert (found.accuracy, found.num_questions, found.standard_error) == (1.0, 20, 0.0)


def test_a_model_without_an_opinion_answers_nothing() -> None:
    class Blank(Knows):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB))

    assert continuation_choices(Blank(0), torch.arange(VOCAB), num_questions=20).accuracy == 0


def test_likelihood_of_every_token_counts_against_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (40 * LENGTH,), generator=generator)
    table = torch.randn(VOCAB, VOCAB, generator=generator)

    class Bigram(Knows):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=table[input_ids])

    right, log_p = 0, table.log_softmax(-1)
    for question in range(30):
        spacing = len(tokens) // 30
        scores = []
        for offset in range(NUM_ANSWERS):
            begin = (question + offset) % 30 * spacing + CONTEXT
            before = int(tokens[question * spacing + CONTEXT - 1])
            score = 0.0
            for token in tokens[begin : begin + CONTINUATION].tolist():
                score, before = score + float(log_p[before, token]), token
            scores.append(score)
        right += scores[0] == max(scores)
    assert 0 < right < 30
    assert continuation_choices(Bigram(0), tokens, num_questions=30).accuracy == right / 30


def test_short_texts_are_asked_less_and_too_short_ones_refused() -> None:
    assert continuation_choices(Knows(1), torch.arange(5 * LENGTH + 3)).num_questions == 5
    with pytest.raises(CalibrationError, match=rf"at least {NUM_ANSWERS * LENGTH} tokens, got {LENGTH}"):
        continuation_choices(Knows(1), torch.arange(LENGTH))
