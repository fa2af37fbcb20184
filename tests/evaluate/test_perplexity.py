"""Perplexity against a direct computation in float64, its protocol against a double loop, and sizes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

from minisp.errors import CalibrationError, CheckpointError, ConfigError, NumericalError
from minisp.evaluate.perplexity import checkpoint_bytes, perplexity

VOCAB = 61
POSITIONS = 48
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    # Heads that are more than a matrix: a cap, a divisor, a factor; OPT's decoder is not its base model.
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=1.0, sliding_window=8),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=16),
}


def build(family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Auto.from_config(CONFIGS[family]()).to(dtype).eval()
    # Larger weights than at initialisation, so that losses are far from log V.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(7))


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """−log p of tokens 2..L of a window (L,), in float64."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return -torch.log_softmax(logits, dim=-1)[torch.arange(len(ids) - 1), ids[1:]]


def by_double_loop(model: nn.Module, tokens: Tensor, window: int, stride: int) -> tuple[float, int, int]:
    """Mean loss, tokens scored, windows: every token is scored once, by the first whole window that can predict it."""
    scored: dict[int, float] = {}
    begin = num_windows = 0
    while begin + window <= len(tokens):
        for offset, loss in enumerate(losses(model, tokens[begin : begin + window]), start=1):
            if begin + offset not in scored:
                scored[begin + offset] = float(loss)
        begin += stride
        num_windows += 1
    return sum(scored.values()) / len(scored), len(scored), num_windows


@pytest.mark.parametrize("family", CONFIGS)
def test_perplexity_is_that_of_a_direct_computation(family: str, tokens: Tensor, monkeypatch: Any) -> None:
    """With logits in chunks of five tokens, and with caps and scales of the model's own."""
    monkeypatch.setattr("minisp.evaluate.perplexity.LOGIT_BYTES", 4 * VOCAB * 5)
    model = build(family)
    result = perplexity(model, tokens, window=32)
    direct = torch.cat([losses(model, tokens[start : start + 32]) for start in range(0, 128, 32)])
    assert (result.num_windows, result.num_tokens) == (4, 124)
    assert (result.window, result.stride) == (32, 32)
    assert result.nll == pytest.approx(direct.mean().item(), rel=1e-6)
    assert result.value == math.exp(result.nll)
    assert abs(result.nll - math.log(VOCAB)) > 0.01


@pytest.mark.parametrize("family", CONFIGS)
def test_the_decoder_runs_once_per_window_and_logits_stay_small(
    family: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisp.evaluate.perplexity.LOGIT_BYTES", 4 * VOCAB * 5)
    model = build(family)
    layer_calls, head_rows = [], []
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    layer.register_forward_hook(lambda *_: layer_calls.append(1))
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: head_rows.append(output.shape[1]))
    perplexity(model, tokens, window=32, max_windows=2)
    assert len(layer_calls) == 2
    assert max(head_rows) == 5


def test_the_head_gets_what_it_multiplies_without_a_copy_of_its_weights(
    llama: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisp.evaluate.perplexity.LOGIT_BYTES", 4 * VOCAB * 5)
    entering: list[Tensor] = []
    with llama.lm_head.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0])):
        perplexity(llama, tokens, window=12, max_windows=1)
    assert [tuple(x.shape[:2]) for x in entering] == [(1, 5), (1, 5), (1, 1)]
    # Other strides torch would multiply as a batch.
    assert all(x.stride(0) == x[0].numel() for x in entering)


def test_a_model_without_a_decoder_of_its_own_is_evaluated_whole(llama: nn.Module, tokens: Tensor) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = llama, llama.config

        def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    assert perplexity(Wrapped(), tokens, window=32).nll == pytest.approx(
        perplexity(llama, tokens, window=32).nll, rel=1e-6
    )


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 31), (32, 16), (32, 5), (32, 1), (2, 1), (2, 2)])
def test_the_protocol_is_that_of_the_double_loop(llama: nn.Module, tokens: Tensor, window: int, stride: int) -> None:
    result = perplexity(llama, tokens, window=window, stride=stride)
    nll, num_tokens, num_windows = by_double_loop(llama, tokens, window, stride)
    assert (result.num_tokens, result.num_windows) == (num_tokens, num_windows)
    assert result.nll == pytest.approx(nll, rel=1e-5)


def test_losses_are_float32_in_a_bfloat16_model(tokens: Tensor) -> None:
    model = build(dtype=torch.bfloat16)
    direct = torch.cat([losses(model, tokens[start : start + 32]) for start in range(0, 128, 32)])
    assert perplexity(model, tokens, window=32).nll == pytest.approx(direct.mean().item(), rel=1e-6)


def test_max_windows_takes_the_first_and_progress_is_told(llama: nn.Module, tokens: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    result = perplexity(
        llama, tokens, window=32, max_windows=3, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.nll == perplexity(llama, tokens[:96], window=32).nll
    assert perplexity(llama, tokens, window=32, max_windows=99).num_windows == 4


def test_the_model_is_left_as_it_was(tokens: Tensor) -> None:
    model = build("gpt2")
    quiet = perplexity(model, tokens, window=32).nll
    model.train()
    # GPT-2 has dropout, which evaluation must not see.
    assert perplexity(model, tokens, window=32).nll == quiet
    assert all(module.training for module in model.modules())
    assert "forward" not in model.get_decoder().__dict__
    model.get_decoder().forward = (forward := model.get_decoder().forward)
    perplexity(model, tokens, window=32)
    assert model.get_decoder().__dict__["forward"] is forward


def test_logits_far_from_zero_neither_overflow_nor_lose_the_loss(tokens: Tensor) -> None:
    model = build()
    model.lm_head.weight.data.mul_(1e4)
    direct = torch.cat([losses(model, tokens[start : start + 32]) for start in range(0, 128, 32)])
    result = perplexity(model, tokens, window=32)
    assert result.nll == pytest.approx(direct.mean().item(), rel=1e-5)
    assert result.value == math.inf


def test_a_loss_that_is_not_finite_names_its_window(tokens: Tensor) -> None:
    model = build()
    model.get_input_embeddings().weight.data[3] = float("nan")
    tokens = tokens.where(tokens != 3, 4)
    tokens[40] = 3
    with pytest.raises(NumericalError, match=r"window 2 of 4 \(tokens 32 to 63\)"):
        perplexity(model, tokens, window=32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 64}, CalibrationError, r"2 to 48 tokens.*window=64"),
        ({"window": 1}, CalibrationError, "window=1"),
        ({"window": 32, "stride": 0}, ConfigError, r"\[1, 32\].*got 0"),
        ({"window": 32, "stride": 33}, ConfigError, "got 33"),
        ({"window": 32, "max_windows": 0}, ConfigError, "max_windows"),
        ({"window": 32, "tokens": torch.arange(31)}, CalibrationError, "got 31 tokens"),
        ({"window": 32, "tokens": torch.arange(70)}, CalibrationError, r"\[0, 61\).*69"),
        ({"window": 32, "tokens": torch.arange(50) - 1}, CalibrationError, "got -1"),
        ({"window": 32, "tokens": torch.rand(50)}, CalibrationError, "torch.float32"),
        ({"window": 32, "tokens": torch.ones(2, 50).long()}, CalibrationError, r"\(2, 50\)"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    llama: nn.Module, tokens: Tensor, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"tokens": tokens, **change}
    with pytest.raises(error, match=message):
        perplexity(llama, options.pop("tokens"), **options)


def test_bytes_are_those_of_the_weights_alone(tmp_path: Path) -> None:
    for name, size in [("model-1.safetensors", 100), ("model-2.safetensors", 11), ("tokenizer.json", 1000)]:
        (tmp_path / name).write_bytes(b"x" * size)
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(str(tmp_path)) == 111
    for folder in (tmp_path / "nowhere", tmp_path / "tokenizer.json"):
        with pytest.raises(CheckpointError, match="safetensors"):
            checkpoint_bytes(folder)
