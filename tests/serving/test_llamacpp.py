"""llama.cpp's own server, in an environment of its own, against transformers on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from minisp.export.targets import export
from tests.export.checkpoints import ROWS, WIDTHS, byte_tokenizer, piece_tokenizer, split_by, write_checkpoint
from tests.tiny import WIDTH

pytestmark = [pytest.mark.server, pytest.mark.slow]

NUM_TOKENS = 16
# All but printable ASCII characters, which come first in both tokenizers. llama.cpp gives no probability for
# a token that ends within a character.
BANNED = [0, 1, 2, *range(94, ROWS)]
TEXT = "the 12345 end's,  They'll see 123 \n\n x\tœuvre – 日本 🙂 THE'S"
SAME = (WIDTH,) * 3
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
PIECES = "pieces"
# What is served: family, widths, how text is split, and what else the config says.
CASES: dict[str, tuple[str, tuple[int, ...], Any, dict[str, Any]]] = {
    "llama": ("llama", SAME, None, {}),
    "llama, widths per layer": ("llama", WIDTHS, DIGITS, {}),
    "llama, biases": ("llama", SAME, split_by(WORDS % "{1,3}"), {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", WIDTHS, split_by(WORDS % ""), {"tie_word_embeddings": True}),
    "llama, rotary of Llama 3": ("llama", SAME, None, {"rope_parameters": LLAMA3}),
    "llama, rotary of Llama 3, widths per layer": ("llama", WIDTHS, None, {"rope_parameters": LLAMA3}),
    "llama, linear rotary, widths per layer": ("llama", WIDTHS, None, {"rope_parameters": LINEAR}),
    "llama, heads wider than the model": ("llama", WIDTHS, None, {"head_dim": 16}),
    "mistral, widths per layer": ("mistral", WIDTHS, PIECES, {}),
    "qwen2": ("qwen2", SAME, None, {}),
    "qwen3": ("qwen3", SAME, None, {}),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Case → the serving benchmark, what transformers says, what llama.cpp says; in one process of llama.cpp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import serving
    if serving.interpreter("xllamacpp") is None:
        pytest.skip("no environment of llama.cpp: python benchmarks/server_environments.py xllamacpp")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 200, (2, 24), generator=generator).tolist()
    folder = tmp_path_factory.mktemp("llamacpp")
    expected, files = [], []
    for number, (model_type, widths, split, options) in enumerate(CASES.values()):
        tokenizer = piece_tokenizer() if split == PIECES else byte_tokenizer(split)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = write_checkpoint(folder / f"{number}", model_type, widths, tokenizer=tokenizer, **ends | options)
        expected.append(
            {
                "greedy": [serving.greedy(model, prompt, NUM_TOKENS, BANNED) for prompt in prompts],
                # transformers has rules of its own for some families.
                "text": AutoTokenizer.from_pretrained(folder / f"{number}")(TEXT, add_special_tokens=False).input_ids,
            }
        )
        files.append(export(folder / f"{number}", "gguf", folder / f"{number}.gguf").out)
    found = serving.ask_llamacpp(files, prompts, [TEXT], NUM_TOKENS, BANNED)["models"]
    return {case: (serving, *both) for case, *both in zip(CASES, expected, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_llamacpp_computes_what_transformers_does(case: str, answers: dict[str, tuple[Any, Any, Any]]) -> None:
    serving, expected, found = answers[case]
    for greedy, answer in zip(expected["greedy"], found["prompts"], strict=True):
        count, difference = serving.agreement(answer, greedy)
        assert count == NUM_TOKENS, (answer["tokens"], greedy.tokens)
        assert difference < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_llamacpp_splits_text_as_the_tokenizer_does(case: str, answers: dict[str, tuple[Any, Any, Any]]) -> None:
    _, expected, found = answers[case]
    assert found["texts"] == [expected["text"]]


def test_answers_come_in_pieces_and_at_once(answers: dict[str, tuple[Any, Any, Any]]) -> None:
    for _, _, found in answers.values():
        assert found["concurrent"] == [answer["tokens"] for answer in found["prompts"]]
        assert found["streamed"] == found["prompts"][0]["text"]
