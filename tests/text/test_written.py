"""What the model writes itself: how windows start, and how they go on."""

from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minisp.errors import ConfigError, NumericalError
from minisp.text import written
from minisp.text.prompts import KINDS
from minisp.text.written import FREE, RANDOM_EVERY, TEMPERATURES, continue_texts, describe, write_windows
from tests.tiny import VOCABULARY, char_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}{% if add_generation_prompt %}={% endif %}"
SPECIAL = 3


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return char_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def starts(tokenizer: Any, num_texts: int, length: int) -> tuple[Tensor, Tensor]:
    """The forced tokens (M, K) and the temperatures (M,) of texts."""
    generator = torch.Generator().manual_seed(0)
    return written._starts(tokenizer, VOCABULARY, (num_texts, length), generator)


def forced_tokens(forced: Tensor) -> list[list[int]]:
    """Those of each row, which have to come first."""
    rows = []
    for row in forced.tolist():
        count = row.index(FREE)
        assert set(row[count:]) == {FREE}
        rows.append(row[:count])
    return rows


def tokens(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_the_result_depends_on_the_seed_alone(model: Any, tokenizer: Any) -> None:
    def result(seed: int, **options: Any) -> Tensor:
        return write_windows(model, tokenizer, num_windows=5, window=12, seed=seed, **options)

    torch.manual_seed(1)
    first = result(3)
    untouched = torch.rand(4)
    torch.manual_seed(1)
    assert torch.equal(untouched, torch.rand(4))
    assert first.shape == (5, 12) and first.dtype == torch.int64
    assert not first.requires_grad and not first.is_inference()
    assert torch.equal(first, result(3))
    assert not torch.equal(first, result(4))
    assert torch.equal(first, result(3, batch=2))


def test_instructions_go_through_the_chat_template_by_turns(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    count = RANDOM_EVERY * len(KINDS)
    forced, _ = starts(tokenizer, count, 256)
    rows = [row for i, row in enumerate(forced_tokens(forced)) if (i + 1) % RANDOM_EVERY]
    expected = [tokens(tokenizer, f"[{instruction}]={opening}") for instruction, opening in KINDS]
    assert rows == (expected * RANDOM_EVERY)[: len(rows)]
    shares = Counter(map(tuple, rows))
    assert len(shares) == len(KINDS) and max(shares.values()) - min(shares.values()) <= 1


def test_every_fourth_text_starts_with_a_random_ordinary_token(tokenizer: Any) -> None:
    forced, _ = starts(tokenizer, 4 * 400, 8)
    first = forced_tokens(forced)[RANDOM_EVERY - 1 :: RANDOM_EVERY]
    assert len(first) == 400 and set(map(len, first)) == {1}
    found = {row[0] for row in first}
    assert found <= set(range(SPECIAL, len(tokenizer))) and len(found) > 50


def test_kinds_and_random_starts_are_written_at_every_temperature(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    forced, temperatures = starts(tokenizer, 2 * RANDOM_EVERY * len(KINDS), 256)
    seen: dict[tuple[int, ...], set[float]] = {}
    for row, temperature in zip(forced_tokens(forced), temperatures.tolist(), strict=True):
        seen.setdefault(tuple(row) if len(row) > 1 else (), set()).add(round(temperature, 6))
    assert len(seen) == len(KINDS) + 1
    assert all(found == set(TEMPERATURES) for found in seen.values())
    shares = Counter(temperatures.tolist())
    assert max(shares.values()) - min(shares.values()) <= 2


def test_a_prompt_takes_at_most_half_of_a_text(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    forced, _ = starts(tokenizer, 3, 16)
    assert forced_tokens(forced) == [tokens(tokenizer, opening)[-8:] for _, opening in KINDS[:3]]
    single, _ = starts(tokenizer, 2, 1)
    assert single.shape == (2, 1) and FREE not in single


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ raise_exception('user turns are not for me') }}",
        "{% if %}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content.upper() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}{{ messages[0].content }}",
        "the same for everyone",
        {"tools": TEMPLATE},
    ],
)
def test_without_a_template_that_works_texts_are_opened(tokenizer: Any, template: Any) -> None:
    tokenizer.chat_template = template
    forced, _ = starts(tokenizer, 3, 512)
    assert forced_tokens(forced) == [tokens(tokenizer, opening) for _, opening in KINDS[:3]]
    assert "openings" in describe(tokenizer, VOCABULARY)


def test_openings_keep_what_the_tokenizer_puts_before_a_text_and_not_its_end(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    forced, _ = starts(tokenizer, 3, 512)
    assert forced_tokens(forced) == [[1, *tokens(tokenizer, opening)] for _, opening in KINDS[:3]]


def test_prompts_with_tokens_that_the_model_lacks_are_left_out(tokenizer: Any) -> None:
    """Chat tokens that a tokenizer got and the model's embedding did not."""
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<chat{i}>" for i in range(VOCABULARY)]})
    tokenizer.chat_template = f"<chat{VOCABULARY - 1}>{TEMPLATE}"
    forced, _ = starts(tokenizer, 3, 512)
    assert forced_tokens(forced) == [tokens(tokenizer, opening) for _, opening in KINDS[:3]]


def test_without_a_tokenizer_all_texts_start_at_random() -> None:
    forced, temperatures = starts(None, 600, 4)
    assert set(map(len, forced_tokens(forced))) == {1}
    assert len(set(forced[:, 0].tolist())) == VOCABULARY
    assert Counter(temperatures.tolist()) == Counter(torch.tensor(TEMPERATURES * 300).tolist())


def test_the_description_says_how_the_text_was_written(tokenizer: Any) -> None:
    assert describe(None, VOCABULARY) == "from random tokens, temperatures 0.7 and 1.0"
    opened = "by 32 openings of texts, every fourth text from a random token, temperatures 0.7 and 1.0"
    assert describe(tokenizer, VOCABULARY) == opened
    tokenizer.chat_template = TEMPLATE
    asked = "instructions in its chat template, each with the opening of its answer,"
    assert describe(tokenizer, VOCABULARY) == opened.replace("openings of texts,", asked)


@pytest.mark.parametrize("window", [40, 41])
def test_a_window_holds_two_texts_that_start_with_their_prompts(model: Any, tokenizer: Any, window: int) -> None:
    result = write_windows(model, tokenizer, num_windows=3, window=window, seed=0)
    assert result.shape == (3, window) and result.min() >= 0
    prompts = [tokens(tokenizer, opening)[-((window + 1) // 4) :] for _, opening in KINDS[:5]]
    for text, prompt in zip((0, 1, 2, 4, 5), prompts, strict=True):
        row, second = divmod(text, 2)
        start = second * ((window + 1) // 2)
        assert result[row, start : start + len(prompt)].tolist() == prompt


def test_sampling_follows_the_model_s_distribution(model: Any) -> None:
    """Second tokens after one common first token: every frequency within five standard deviations of its due."""
    count, temperature = 4000, torch.tensor([1.5, 0.5]).repeat_interleave(4000)
    forced = torch.full((2 * count, 2), FREE)
    forced[:, 0] = 41
    result = continue_texts(model, forced, temperature, torch.Generator().manual_seed(0), batch=2 * count)
    with torch.no_grad():
        logits = model(torch.tensor([[41]])).logits[0, -1].double()
    for part, divisor in zip(result.split(count), (1.5, 0.5), strict=True):
        assert part[:, 0].eq(41).all()
        expected = torch.softmax(logits / divisor, dim=0)
        observed = torch.bincount(part[:, 1], minlength=VOCABULARY) / count
        assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_every_step_sees_all_that_stands_before(family: str) -> None:
    """Positions, sliding windows and the cache: the logits of the steps are those of one forward over the result."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
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
    forced = torch.full((3, 14), FREE)
    forced[0, :7], forced[1, :2], forced[2, 0] = torch.arange(7), 5, 9
    result = continue_texts(other, forced, torch.tensor([1.0, 0.7, 1.0]), torch.Generator().manual_seed(0))
    handle.remove()
    with torch.no_grad():
        logits = other(result, use_cache=False).logits[:, :-1]
    torch.testing.assert_close(torch.stack(steps, dim=1), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(result[forced != FREE], forced[forced != FREE])
    assert len(set(result[:, 7:].flatten().tolist())) > 8


def test_products_are_transposed_while_writing_and_only_then(model: Any) -> None:
    ids = torch.arange(12).view(3, 4)
    biased = nn.Linear(8, 3)
    model.extra = nn.Sequential(biased, nn.Linear(3, 2, dtype=torch.bfloat16))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected, expected_biased = model(input_ids=ids).logits, biased(x)
        with written._transposed_products(model):
            assert "forward" in vars(biased) and "forward" not in vars(model.extra[1])
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
            torch.testing.assert_close(biased(x), expected_biased)
    assert not any("forward" in vars(module) for module in model.modules())
    del model.extra


def test_an_end_of_text_token_ends_nothing(model: Any) -> None:
    free = write_windows(model, None, num_windows=4, window=12, seed=2)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    try:
        assert torch.equal(free, write_windows(model, None, num_windows=4, window=12, seed=2))
    finally:
        model.generation_config.eos_token_id = before


def test_progress_counts_steps_and_modes_are_restored() -> None:
    model = tiny_model("llama")
    seen: list[tuple[int, int]] = []
    model.train()
    model.lm_head.eval()
    options = {"num_windows": 5, "window": 8, "seed": 0, "batch": 2}
    write_windows(model, None, **options, on_progress=lambda done, total: seen.append((done, total)))
    # Three batches; each text's first token takes no step.
    assert seen == [(done, 9) for done in range(1, 10)]
    assert model.training and model.model.training and not model.lm_head.training


@pytest.mark.parametrize("options", [{"num_windows": 0}, {"window": 0}, {"batch": 0}])
def test_writing_refuses_bad_options(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        write_windows(model, None, **{"num_windows": 1, "window": 4, "seed": 0, **options})


def test_writing_refuses_a_model_that_is_not_finite() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NumericalError, match="finite logits"):
        write_windows(model, None, num_windows=1, window=4, seed=0)
