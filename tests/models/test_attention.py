"""The engine's attention inside transformers' models: same function, own gradient, and gone afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minisp import ops
from minisp.models.attention import NAME, fast_attention
from tests.tiny import MODEL_TYPES, tiny_model

LENGTH = 60


def run(model: Any, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their sum of squares at the embeddings."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded)
    return logits.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_computes_the_same_with_it(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).to(dtype).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH))
    calls = []
    original = ops.causal_attention
    monkeypatch.setattr(ops, "causal_attention", lambda *args: calls.append(1) or original(*args))
    stock = run(model, ids)
    assert not calls
    with fast_attention(model.config):
        ours = run(model, ids)
    assert len(calls) == model.config.num_hidden_layers
    exact = run(model.double(), ids)
    for mine, theirs, true in zip(ours, stock, exact, strict=True):
        bound = 2 * (theirs.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (mine.double() - true).norm() <= bound


def test_masks_go_to_the_stock_function() -> None:
    model = tiny_model("llama").eval()
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    stock = run(model, ids, mask)
    with fast_attention(model.config):
        ours = run(model, ids, mask)
    for mine, theirs in zip(ours, stock, strict=True):
        assert torch.equal(mine, theirs)


def test_the_models_own_choice_comes_back_even_after_an_error() -> None:
    config = tiny_model("llama").config
    with pytest.raises(RuntimeError, match="boom"), fast_attention(config):
        assert config._attn_implementation == NAME
        raise RuntimeError("boom")
    assert config._attn_implementation == "sdpa"
    config._attn_implementation = "eager"
    with fast_attention(config):
        assert config._attn_implementation == "eager", "a choice of the user's own is left alone"
