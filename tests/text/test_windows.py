"""Windows of tokens from a text."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from minisp.text.windows import text_windows

BOS = 0
VOCAB = 128


class Letters:
    """One token per character, after one BOS; remembers how much it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [BOS, *ids(text)]}


@pytest.fixture
def letters() -> Letters:
    return Letters()


def ids(text: str) -> list[int]:
    return [ord(c) % VOCAB for c in text]


def prefix_of(text: str) -> Callable[[int], tuple[str, bool]]:
    return lambda num_chars: (text[:num_chars], num_chars >= len(text))


def test_a_long_text_is_not_tokenised_whole(letters: Letters) -> None:
    text = "the quick brown fox " * 100_000
    drawn = text_windows(prefix_of(text), "", letters)(4, 16)
    assert drawn.dtype == torch.int64
    # Eight times as many tokens as are wanted, five characters each, and a few that are left out.
    assert letters.characters == (8 * 4 * 16 + 16) * 5
    tokens = [BOS, *ids(text)]
    available = (letters.characters + 1 - 16) // 16
    starts = [16 * ((2 * i + 1) * available // 8) for i in range(4)]
    assert drawn.tolist() == [tokens[start : start + 16] for start in starts]


def test_windows_of_a_short_text_are_all_of_it(letters: Letters) -> None:
    text = "the quick brown fox " * 4
    drawn = text_windows(prefix_of(text), "", letters)(9, 16)
    assert drawn.flatten().tolist() == [BOS, *ids(text)][:80]


def test_text_with_many_characters_per_token_is_read_until_it_suffices() -> None:
    """32 characters a token, the first ones worse: the first guess is 5."""

    class Sparse(Letters):
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            self.characters += len(text)
            return {"input_ids": [ord(c) % VOCAB for c in text[512::32]]}

    sparse = Sparse()
    text = "".join(chr(33 + i * 7 % 80) for i in range(100_000))
    drawn = text_windows(prefix_of(text), "", sparse)(5, 16)
    known = ids(text[512::32])
    rows = [known[start : start + 16] for start in range(0, len(known), 16)]
    assert all(row in rows for row in drawn.tolist())
    assert len(drawn) == 5
    assert sparse.characters < 6 * (512 + 32 * (80 + 16))


def test_tokens_at_a_cut_in_the_text_are_left_out() -> None:
    """A tokenizer that sees the end of its text: the windows must be those of the whole text all the same."""

    class EndAware(Letters):
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            tokens = super().__call__(text)["input_ids"]
            return {"input_ids": [*tokens[:-3], 1, 1, 1]}

    text = "abcdefghijklmnopqrstuvwxyz" * 1000
    drawn = text_windows(prefix_of(text), "", EndAware())(64, 16)
    tokens = [BOS, *ids(text)]
    rows = [tokens[start : start + 16] for start in range(0, len(tokens) - 15, 16)]
    assert len(drawn) == 64
    assert all(row in rows for row in drawn.tolist())


def test_special_tokens_are_what_the_tokenizer_adds_once() -> None:
    vocab = {"<s>": 0, "a": 1, "b": 2, "?": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="?", model_max_length=4)
    drawn = text_windows(prefix_of("a b " * 10), "", tokenizer)(4, 5)
    assert drawn.flatten().tolist() == [0, *[1, 2] * 10][:20]
