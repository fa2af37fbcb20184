"""Windows of tokens from a text, and what the model writes itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minisp.errors import ConfigError, NumericalError
from minisp.windows import text_windows, write_windows

BOS = 0
VOCAB = 128


class Letters:
    """One token per character, after one BOS; remembers how much it was given."""

    all_special_ids: tuple[int, ...] = (BOS, 5)

    def __init__(self) -> None:
        self.characters = 0

    def __len__(self) -> int:
        return VOCAB - 8

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [BOS, *ids(text)]}


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    # Larger weights than at initialisation, so that the next token is far from uniform.
    for parameter in model.parameters():
        parameter.data.mul_(10)
    return model


def ids(text: str) -> list[int]:
    return [ord(c) % VOCAB for c in text]


def prefix_of(text: str) -> Callable[[int], tuple[str, bool]]:
    return lambda num_chars: (text[:num_chars], num_chars >= len(text))


def test_a_long_text_is_not_tokenised_whole(letters: Letters) -> None:
    text = "the quick brown fox " * 100_000
    drawn = text_windows(prefix_of(text), "", letters)(4, 16)
    assert drawn.dtype == torch.int64
    assert drawn.flatten().tolist() == [BOS, *ids(text[:63])]
    assert letters.characters < 2000


def test_text_with_many_characters_per_token_is_read_until_it_suffices() -> None:
    """32 characters a token, the first ones worse: the first guess is 5."""

    class Sparse(Letters):
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            self.characters += len(text)
            return {"input_ids": [ord(c) % VOCAB for c in text[512::32]]}

    sparse = Sparse()
    text = "".join(chr(33 + i * 7 % 80) for i in range(100_000))
    drawn = text_windows(prefix_of(text), "", sparse)(5, 16)
    assert drawn.flatten().tolist() == ids(text[512::32])[:80]
    assert sparse.characters < 6 * (512 + 32 * (80 + 16))


def test_tokens_at_a_cut_in_the_text_are_left_out() -> None:
    """A tokenizer that sees the end of its text: the windows must be those of the whole text all the same."""

    class EndAware(Letters):
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            tokens = super().__call__(text)["input_ids"]
            return {"input_ids": [*tokens[:-3], 1, 1, 1]}

    text = "abcdefghijklmnopqrstuvwxyz" * 1000
    drawn = text_windows(prefix_of(text), "", EndAware())(64, 16)
    assert drawn.flatten().tolist() == [BOS, *ids(text)][: 64 * 16]


def test_special_tokens_are_what_the_tokenizer_adds_once() -> None:
    vocab = {"<s>": 0, "a": 1, "b": 2, "?": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="?", model_max_length=4)
    drawn = text_windows(prefix_of("a b " * 40), "", tokenizer)(4, 5)
    assert drawn.flatten().tolist() == [0, *[1, 2] * 10][:20]


def test_what_the_model_writes_depends_on_the_seed_alone(model: LlamaForCausalLM, letters: Letters) -> None:
    def written(seed: int, **options: Any) -> Tensor:
        return write_windows(model, letters, num_windows=5, window=12, seed=seed, **options)

    torch.manual_seed(1)
    first = written(3)
    untouched = torch.rand(4)
    torch.manual_seed(1)
    assert torch.equal(untouched, torch.rand(4))
    assert first.shape == (5, 12) and first.dtype == torch.int64
    assert not first.requires_grad and not first.is_inference()
    assert torch.equal(first, written(3))
    assert not torch.equal(first, written(4))
    assert torch.equal(first, written(3, batch=2))


def test_first_tokens_are_ordinary_and_differ(model: LlamaForCausalLM, letters: Letters) -> None:
    first = write_windows(model, letters, num_windows=400, window=2, seed=0, batch=400)[:, 0]
    assert not set(first.tolist()) & {*letters.all_special_ids, *range(len(letters), VOCAB)}
    assert len(set(first.tolist())) > 80
    assert write_windows(model, None, num_windows=400, window=1, seed=0)[:, 0].max() >= len(letters)


def test_sampling_follows_the_model_s_distribution(model: LlamaForCausalLM) -> None:
    """Second tokens after one common first token: every frequency within five standard deviations of its due."""

    class OneWord(Letters):
        all_special_ids = tuple(range(41))

        def __len__(self) -> int:
            return 42

    count = 4000
    written = write_windows(model, OneWord(), num_windows=count, window=3, seed=0, batch=count, temperature=1.5)
    assert written[:, 0].eq(41).all()
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([[41]])).logits[0, -1].double() / 1.5, dim=0)
    observed = torch.bincount(written[:, 1], minlength=VOCAB) / count
    assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_every_step_sees_all_that_was_written_before(family: str) -> None:
    """Positions, sliding windows and the cache: the logits of the steps are those of one forward over the result."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    extra: dict[str, dict[str, Any]] = {
        "gemma2": {"intermediate_size": 16, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
        "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    }
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **extra.get(family, {}))).eval()
    for parameter in other.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)
    steps: list[Tensor] = []
    handle = other.register_forward_hook(lambda module, args, output: steps.append(output.logits[:, -1].clone()))
    written = write_windows(other, None, num_windows=3, window=14, seed=0)
    handle.remove()
    with torch.no_grad():
        logits = other(written, use_cache=False).logits[:, :-1]
    torch.testing.assert_close(torch.stack(steps, dim=1), logits, rtol=1e-4, atol=1e-4)
    assert len(set(written.flatten().tolist())) > 10


def test_an_end_of_text_token_ends_nothing(model: LlamaForCausalLM) -> None:
    free = write_windows(model, None, num_windows=4, window=12, seed=2)
    model.generation_config.eos_token_id = list(range(VOCAB))
    try:
        assert torch.equal(free, write_windows(model, None, num_windows=4, window=12, seed=2))
    finally:
        model.generation_config.eos_token_id = None


def test_progress_counts_steps_and_modes_are_restored(model: LlamaForCausalLM) -> None:
    seen: list[tuple[int, int]] = []
    model.train()
    model.lm_head.eval()
    write_windows(
        model,
        None,
        num_windows=5,
        window=4,
        seed=0,
        batch=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 9) for done in range(1, 10)]
    assert model.training and model.model.training and not model.lm_head.training
    model.eval()


@pytest.mark.parametrize("options", [{"num_windows": 0}, {"window": 0}, {"batch": 0}, {"temperature": 0.0}])
def test_writing_refuses_bad_options(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        write_windows(model, None, **{"num_windows": 1, "window": 4, "seed": 0, **options})


def test_writing_refuses_a_model_that_is_not_finite(model: LlamaForCausalLM) -> None:
    kept = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[3] = float("nan")
    try:
        with pytest.raises(NumericalError, match="finite logits"):
            write_windows(model, None, num_windows=1, window=4, seed=0)
    finally:
        model.lm_head.weight.data.copy_(kept)
