"""RMSNorm and the rotary embedding: every implementation against the reference in float64, and what is kept for it.

The rule: |ours − fp64| ≤ |eager in the same dtype − fp64| + eps·√terms, in the largest element and relative to it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from minisp import ops
from minisp.errors import BackendError
from minisp.ops import native, portable, reference
from tests.tolerance import check

DTYPES = (torch.float32, torch.bfloat16)
HAS_EXTENSION = native.serves(torch.zeros(1, 1))
IMPLS = ("torch", pytest.param("native", marks=pytest.mark.skipif(not HAS_EXTENSION, reason="extension not built")))
EPS = 1e-5


def with_gradients(function: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor], to: Any) -> list[Tensor]:
    """Results of `function` in a dtype, and their gradients in `inputs`."""
    leaves = [t.to(to).detach().requires_grad_() for t in inputs]
    result = function(*leaves)
    results = list(result) if isinstance(result, tuple) else [result]
    gradients = torch.autograd.grad(results, leaves, [g.to(to) for g in grads])
    return [t.detach() for t in (*results, *gradients)]


def stock_norm(hidden: Tensor, weight: Tensor, offset: float) -> Tensor:
    """RMSNorm with the rounding of transformers' modelling files: Llama's without, Gemma's with an offset."""
    x = hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return (x * (offset + weight.float())).to(hidden.dtype) if offset else weight * x.to(hidden.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (300, 33), (2, 70, 3, 16), (5, 577)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], offset: float, impl: ops.Impl) -> None:
    # Rows of very different sizes, small ones where eps counts.
    hidden = (torch.randn(shape) * torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    weight, grad = torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    ours = with_gradients(lambda x: ops.rms_norm(x, weight, EPS, offset=offset, impl=impl), [hidden], [grad], dtype)
    eager = with_gradients(lambda x: stock_norm(x, weight, offset), [hidden], [grad], dtype)
    exact = with_gradients(
        lambda x: reference.rms_norm(x, weight.double(), EPS, offset), [hidden], [grad], torch.float64
    )
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.shape == hidden.shape and mine.dtype == dtype
        for row in range(shape[0]):
            check(mine[row], theirs[row], true[row], terms=4 if dtype == torch.bfloat16 else shape[-1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_hidden_state_that_is_not_contiguous(impl: ops.Impl) -> None:
    hidden, weight = torch.randn(6, 5, 32).transpose(0, 1), torch.randn(32)
    grad = torch.randn(32, 6, 5).permute(2, 1, 0)
    ours = with_gradients(lambda x: ops.rms_norm(x, weight, EPS, impl=impl), [hidden], [grad], torch.float32)
    exact = with_gradients(lambda x: reference.rms_norm(x, weight, EPS), [hidden], [grad], torch.float32)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_norm_of_nothing(impl: ops.Impl) -> None:
    hidden = torch.empty(0, 8, requires_grad=True)
    out = ops.rms_norm(hidden, torch.ones(8), EPS, impl=impl)
    assert torch.autograd.grad(out.sum(), hidden)[0].shape == out.shape == (0, 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_norm_keeps_its_input_and_one_number_a_row(impl: ops.Impl) -> None:
    hidden, weight = torch.randn(4, 8, 32).to(torch.bfloat16).requires_grad_(), torch.ones(32, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.rms_norm(hidden, weight, EPS, impl=impl)
    foreign = [t for t in kept if t.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert [(t.numel(), t.dtype) for t in foreign] == [(32, torch.float32)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_row(value: float, impl: ops.Impl) -> None:
    hidden = torch.randn(5, 40)
    hidden[2, 7] = value
    out = ops.rms_norm(hidden, torch.ones(40), EPS, impl=impl)
    assert not out[2, 7].isfinite()
    assert out[[0, 1, 3, 4]].isfinite().all()


HEADS = {  # batch, query heads, key heads, tokens, dimensions
    "one of each": (1, 1, 1, 1, 2),
    "grouped": (2, 6, 2, 9, 64),
    "ragged": (2, 3, 3, 67, 34),
    "long": (1, 2, 1, 300, 128),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["projected", "contiguous", "fused", "crooked"])
@pytest.mark.parametrize("per_window", [False, True])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype: torch.dtype, shape: tuple[int, ...], per_window: bool, layout: str, impl: ops.Impl) -> None:
    batch, heads, kv_heads, tokens, dim = shape

    def states(count: int) -> Tensor:
        if layout == "contiguous":
            return torch.randn(batch, count, tokens, dim).to(dtype)
        if layout == "crooked":
            return torch.randn(batch, count, dim, tokens).to(dtype).transpose(2, 3)
        # As a projection leaves them, or a part of what a fused one leaves.
        room = torch.randn(batch, tokens, count, dim + 6 * (layout == "fused")).to(dtype)
        return room[..., :dim].transpose(1, 2)

    inputs, grads = [states(heads), states(kv_heads)], [states(heads), states(kv_heads)]
    # Halves with angles of their own: the gradient is the transpose then, and no rotation back.
    cosine, sine = (torch.randn(batch if per_window else 1, tokens, dim).to(dtype) for _ in range(2))
    ours = with_gradients(lambda q, k: ops.rotary(q, k, cosine, sine, impl=impl), inputs, grads, dtype)
    eager = with_gradients(lambda q, k: reference.rotary(q, k, cosine, sine), inputs, grads, dtype)
    exact = with_gradients(
        lambda q, k: reference.rotary(q, k, cosine.double(), sine.double()), inputs, grads, torch.float64
    )
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        assert mine.dtype == dtype
        check(mine, theirs, true)


@pytest.mark.parametrize("impl", IMPLS)
def test_turning_forth_and_back_is_nothing(impl: ops.Impl) -> None:
    query, key = torch.randn(2, 4, 50, 16).requires_grad_(), torch.randn(2, 2, 50, 16)
    angles = torch.outer(torch.arange(50.0), torch.rand(8)).repeat(1, 2)[None]
    turned, _ = ops.rotary(query, key, angles.cos(), angles.sin(), impl=impl)
    (back,) = torch.autograd.grad(turned, query, turned.detach())
    torch.testing.assert_close(back, query.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rotary_leaves_its_arguments_and_keeps_only_the_angles(impl: ops.Impl) -> None:
    query, key = torch.randn(1, 4, 9, 16).requires_grad_(), torch.randn(1, 2, 9, 16).requires_grad_()
    before = query.detach().clone(), key.detach().clone()
    cosine, sine = torch.randn(1, 9, 16), torch.randn(1, 9, 16)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.rotary(query, key, cosine, sine, impl=impl)
    assert {t.data_ptr() for t in kept} == {cosine.data_ptr(), sine.data_ptr()}
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


@pytest.mark.skipif(not HAS_EXTENSION, reason="extension not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    hidden, grad, weight = torch.randn(301, 100).to(dtype), torch.randn(301, 100).to(dtype), torch.randn(100).to(dtype)
    heads, cosine, sine = (torch.randn(*s, 301, 16).to(dtype) for s in ((1, 3), (1,), (1,)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            normed = with_gradients(lambda x: ops.rms_norm(x, weight, EPS, impl="native"), [hidden], [grad], dtype)
            results.append([*normed, *ops.rotary(heads, heads, cosine, sine, impl="native")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.rms_norm(torch.zeros(2, 4), torch.ones(4), EPS, impl="triton"),
        lambda: ops.rms_norm(torch.zeros(2, 4).double(), torch.ones(4).double(), EPS, impl="native"),
        lambda: ops.rms_norm(torch.zeros(2, 4), torch.ones(4).to(torch.bfloat16), EPS, impl="native"),
        lambda: ops.rotary(*(torch.zeros(1, 1, 2, 4),) * 2, *(torch.zeros(1, 2, 4),) * 2, impl="triton"),
        lambda: ops.rotary(*(torch.zeros(1, 1, 2, 3),) * 2, *(torch.zeros(1, 2, 3),) * 2, impl="native"),
        lambda: ops.rotary(*(torch.zeros(1, 1, 2, 4),) * 2, *(torch.zeros(1, 2, 2),) * 2, impl="native"),
    ],
)
def test_an_explicit_impl_is_obeyed_or_refused(call: Callable[[], object]) -> None:
    with pytest.raises(BackendError, match="expected an implementation that serves these tensors"):
        call()


def test_grouped_queries_repeat_their_keys_where_torch_would_keep_all_scores() -> None:
    hopper, turing = (9, 0), (7, 5)
    for dtype, capability, expected in (
        (torch.float32, hopper, True),
        (torch.float32, turing, True),
        (torch.bfloat16, hopper, False),
        (torch.float16, (8, 0), False),
        (torch.float16, turing, True),
        (torch.float32, None, False),
        (torch.bfloat16, None, False),
    ):
        assert portable.repeats_keys(dtype, capability) == expected, (dtype, capability)
    assert portable.capability_of(torch.device("cpu")) is None


@pytest.mark.parametrize("group", [1, 3])
def test_repeated_keys_get_the_gradients_of_grouped_ones(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [torch.randn(2, 6, 40, 16)]
    inputs = [torch.randn(2, heads, 40, 16) for heads in (6, 6 // group, 6 // group)]
    groups: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, enable_gqa: bool, **kwargs: Any) -> Tensor:
        groups.append(enable_gqa)
        return attention(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(portable.functional, "scaled_dot_product_attention", watched)
    grouped = with_gradients(lambda *t: portable.causal_attention(*t, 0.25), inputs, grads, torch.float32)
    # As on a GPU.
    monkeypatch.setattr(portable, "capability_of", lambda device: (9, 0))
    repeated = with_gradients(lambda *t: portable.causal_attention(*t, 0.25), inputs, grads, torch.float32)
    assert groups == [group > 1, False]
    exact = with_gradients(lambda *t: reference.causal_attention(*t, 0.25), inputs, grads, torch.float64)
    for ours, theirs, true in zip(repeated, grouped, exact, strict=True):
        check(ours, theirs, true, terms=56)
