"""vLLM's server, in an environment of its own, against transformers on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minisp.export.targets import export
from tests.export.checkpoints import ROWS, WIDTHS, byte_tokenizer, write_checkpoint
from tests.tiny import WIDTH

pytestmark = [pytest.mark.server, pytest.mark.slow]

NUM_TOKENS = 16
# All but printable ASCII characters, which come first: every token is text at once.
BANNED = [*range(94, ROWS)]
# vLLM's attention on a CPU has no heads narrower than 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
# Target → widths.
CASES = {"hf": (WIDTH,) * 3, "hf-per-layer": WIDTHS}


@pytest.fixture(scope="module", params=CASES)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any], Any]:
    """The serving benchmark, what transformers says, what vLLM says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import serving
        import vllm_server
    if vllm_server.interpreter("vllm") is None:
        pytest.skip("no environment of vLLM: python benchmarks/server_environments.py vllm")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 200, (4, 24), generator=generator).tolist()
    folder, tokenizer = tmp_path_factory.mktemp("vllm"), byte_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = write_checkpoint(folder / "model", "llama", CASES[request.param], tokenizer=tokenizer, **ends | SIZES)
    expected = [serving.greedy(model, prompt, NUM_TOKENS, BANNED) for prompt in prompts]
    exported = export(folder / "model", request.param, folder / "exported").out
    with vllm_server.served(exported, context=64) as address:
        found = vllm_server.ask_vllm(address, prompts, NUM_TOKENS, BANNED)
    return serving, expected, found


def test_vllm_computes_what_transformers_does(answers: tuple[Any, list[Any], Any]) -> None:
    serving, expected, found = answers
    for greedy, answer in zip(expected, found["prompts"], strict=True):
        count, difference = serving.agreement(answer, greedy)
        assert count == NUM_TOKENS, (answer["tokens"], greedy.tokens)
        assert difference < 1e-3


def test_answers_come_in_pieces_and_at_once(answers: tuple[Any, list[Any], Any]) -> None:
    _, _, found = answers
    for alone, together in zip(found["prompts"], found["concurrent"], strict=True):
        assert together["tokens"] == alone["tokens"] and together["text"] == alone["text"]
    assert found["streamed"] == found["prompts"][0]["text"]
    assert found["pieces"] > 1
