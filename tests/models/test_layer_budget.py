"""What a layer's forward and backward move beside its matrix products and attention, counted on the meta device.

The counts are in bytes per token and element of the hidden size, and in launches. A fused operation counts as one
launch that reads every tensor it is given once and writes every one it returns once. That is what kernels/norm.py and
kernels/rotary.py do, and all they do: stand-ins with the same arguments and results take their place here, so that what
is converted, copied or kept around them is counted for what it is.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minisp import ops
from minisp.models.layers import fast_layers
from minisp.models.skeleton import frozen
from minisp.ops import portable
from tests.counting import Counted

# Llama 7B, 2048 tokens.
HIDDEN, HEADS, TOKENS = 4096, 32, 2048
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
# bfloat16, derived. Two norms: 4 bytes forward, 6 backward. Rotary of queries and keys: 8 and 8. Two residual sums and
# the two sums of their gradients: 6 each. Projections of one hidden state sum three gradients: 12. Beside it, the
# results of attention, whose gradients lie as the projections want them: nothing.
FLOOR = 2 * (4 + 6) + (8 + 8) + 2 * (6 + 6) + 12
LAUNCHES = 2 * 2 + 2 + 2 * 2 + 2


@pytest.fixture(scope="module")
def stand_ins() -> Iterator[Any]:
    """Operations that do nothing, with the arguments and results of the kernels."""
    library = torch.library.Library("minisp_budget", "DEF")
    library.define("rms_norm(Tensor hidden, Tensor weight) -> (Tensor, Tensor)")
    library.define("rms_norm_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor inverse) -> Tensor")
    library.define("rotate(Tensor query, Tensor key, Tensor cosine, Tensor sine) -> (Tensor, Tensor)")
    library.impl("rms_norm", lambda x, w: (torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)), "Meta")
    library.impl("rms_norm_backward", lambda g, x, w, r: torch.empty_like(x), "Meta")
    library.impl("rotate", lambda q, k, c, s: (torch.empty_like(q), torch.empty_like(k)), "Meta")
    yield torch.ops.minisp_budget
    library._destroy()


class _FreeAttention(torch.autograd.Function):
    """Attention that is not counted: results and gradients lie in memory as those of the real one."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(grads[0]), torch.empty_like(grads[0]), torch.empty_like(grads[0])


def counted(patch: pytest.MonkeyPatch, stand_ins: Any = None) -> Counted:
    """One decoder layer, forward and backward, its MLP taken out: with stand-ins within `fast_layers`, or as it is."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=8, num_attention_heads=HEADS, num_hidden_layers=1, vocab_size=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        hidden = torch.empty(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(1, TOKENS, HIDDEN // HEADS, dtype=torch.bfloat16)
        gradient = torch.empty_like(hidden, requires_grad=False)
    layer = model.model.layers[0]
    layer.mlp.forward = lambda passing: passing.view_as(passing)
    # Attention by `ops.causal_attention`, within `fast_layers` and without.
    model.config._attn_implementation = "minisp"
    patch.setattr(ops, "causal_attention", lambda query, key, value, scale: _FreeAttention.apply(query, key, value))
    with frozen(model), fast_layers(model) if stand_ins else nullcontext():
        if stand_ins:
            # Only now: `fast_layers` has probed the model with the real ones.
            patch.setattr(portable, "rms_norm", lambda x, w, eps, offset: stand_ins.rms_norm(x, w))
            backward = stand_ins.rms_norm_backward
            patch.setattr(portable, "rms_norm_backward", lambda g, x, w, r, offset: backward(g, x, w, r))
            patch.setattr(portable, "rotate", lambda q, k, c, s, backward=False: stand_ins.rotate(q, k, c, s))
        with Counted() as count:
            torch.autograd.grad(layer(hidden, position_embeddings=(angles, angles)), hidden, gradient)
    return count


def beside_products(count: Counted) -> tuple[float, int]:
    """Bytes per token and hidden element, and launches."""
    products = sum(count.launches.get(name, 0) for name in PRODUCTS)
    # Every product here is of the hidden state with a square weight.
    moved = count.bytes - products * 2 * (2 * TOKENS * HIDDEN + HIDDEN**2)
    return moved / (TOKENS * HIDDEN), count.num_launches - products


def test_a_layer_with_the_engines_operations(stand_ins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch, stand_ins)
    bytes_moved, launches = beside_products(count)
    assert count.syncs == 0
    assert launches <= LAUNCHES, count.launches
    assert FLOOR <= bytes_moved <= 1.02 * FLOOR


def test_a_layer_in_eager_transformers_takes_several_times_that(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)
    bytes_moved, launches = beside_products(count)
    # 380 bytes and 76 launches with transformers 5.17.
    assert bytes_moved > 4 * FLOOR
    assert launches > 4 * LAUNCHES, count.launches
