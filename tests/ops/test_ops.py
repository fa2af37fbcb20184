"""Every implementation of every operation against the reference in float64, by one rule.

The rule: |ours − fp64| ≤ |eager in the same dtype − fp64| + eps·√terms, in the largest element and relative to it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minisp import ops
from minisp.errors import BackendError
from minisp.ops import native, portable, reference
from tests.tolerance import check

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
HAS_EXTENSION = native.serves(torch.zeros(1, 1))
IMPLS = ("torch", pytest.param("native", marks=pytest.mark.skipif(not HAS_EXTENSION, reason="extension not built")))


def skip_unless_served(impl: ops.Impl, served: bool) -> None:
    if impl == "native" and not served:
        pytest.skip(f"at the level {native.level()} the extension has no products")


def inputs(dtype: torch.dtype, plain: bool, tokens: int = 133, width: int = 67) -> tuple[Tensor, Tensor | None, Tensor]:
    gate, up, grad = (torch.randn(tokens, width).mul_(3).to(dtype) for _ in range(3))
    return gate, None if plain else up, grad


def as_double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation(dtype: torch.dtype, kind: str, plain: bool) -> None:
    gate, up, _ = inputs(dtype, plain)
    exact = reference.activation(*as_double(gate, up), kind)
    check(ops.activation(gate, up, kind), reference.activation(gate, up, kind), exact)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_goes_where_it_is_told(kind: str, in_place: bool) -> None:
    gate, up, _ = inputs(torch.bfloat16, False)
    expected, before = ops.activation(gate, up, kind), gate.clone()
    out = gate if in_place else torch.full_like(gate, torch.nan)
    assert ops.activation(gate, up, kind, out=out) is out
    assert torch.equal(out, expected)
    assert in_place or torch.equal(gate, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_backward(dtype: torch.dtype, kind: str, plain: bool, impl: ops.Impl) -> None:
    if impl == "native" and kind == "gelu":
        pytest.skip("exact GELU has no native version")
    gate, up, grad = inputs(dtype, plain)
    exact = reference.activation_backward(*as_double(gate, up, grad), kind)
    eager = reference.activation_backward(gate, up, grad, kind)
    x, sums = ops.activation_backward_(gate, up, grad, kind, impl=impl)
    assert x is grad, "x is stored in place of its gradient"
    check(x, eager[0], exact[0])
    check(gate, eager[1], exact[1])
    if up is not None:
        check(up, eager[2], exact[2])
    for ours, theirs, true in zip(sums, eager[3].float(), exact[3], strict=True):
        check(ours, theirs, true, terms=gate.shape[0])


def test_native_gradients_are_those_of_autograd_at_the_extremes() -> None:
    gate = torch.tensor([[-200.0, -88.5, -20.0, 0.0, 20.0, 88.5, 200.0]])
    up, grad = torch.ones_like(gate), torch.ones_like(gate)
    for impl in ("torch", "native") if HAS_EXTENSION else ("torch",):
        z, u, g = gate.clone(), up.clone(), grad.clone()
        ops.activation_backward_(z, u, g, "silu", impl=impl)
        torch.testing.assert_close(z, torch.tensor([[0.0, 0, 0, 0.5, 1, 1, 1]]), atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(not HAS_EXTENSION, reason="extension not built")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            gate, up, grad = inputs(torch.bfloat16, False, tokens=97, width=600)
            _, sums = ops.activation_backward_(gate, up, grad, "silu", impl="native")
            gram = torch.zeros(600, 600)
            ops.gram_update_(gram, grad)
            results.append((gate, up, grad, sums, gram.tril()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (31, 33), (64, 64), (100, 130), (257, 70), (40, 1100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram(dtype: torch.dtype, shape: tuple[int, int], impl: ops.Impl) -> None:
    x = torch.randn(shape).to(dtype)
    skip_unless_served(impl, native.serves_gram(x))
    gram = torch.zeros(shape[1], shape[1])
    # What lies above the diagonal tiles before `mirror_` must not matter: of the widest matrix, something does.
    gram[: portable.GRAM_TILE, portable.GRAM_TILE :] = float("nan")
    for part in x.split(50) if shape[0] else [x]:
        ops.gram_update_(gram, part.contiguous(), impl=impl)
    ops.mirror_(gram)
    exact = reference.gram(x.double())
    assert torch.equal(gram, gram.T)
    if shape[0]:
        check(gram, x.float().T @ x.float(), exact, terms=shape[0])
    else:
        assert not gram.any()


@pytest.mark.parametrize("shape", [(0, 5, 3), (1, 1, 1), (33, 130, 64), (257, 7, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tokens, width, hidden = shape
    x, y = torch.randn(tokens, width).to(dtype), torch.randn(tokens, hidden).to(dtype)
    cross = torch.ones(width, hidden)
    ops.cross_update_(cross, x, y)
    exact = 1 + reference.cross(x.double(), y.double())
    check(cross, 1 + x.float().T @ y.float(), exact, terms=tokens + 1)


def test_products_of_sixteen_bits_are_summed_in_float32_by_the_blas_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would be asked for, answered by a CPU: no float32 copy, and nothing above the diagonal tiles."""
    asked = []

    def addmm(
        before: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype, out: Any
    ) -> None:
        asked.append((left.dtype, right.dtype, out_dtype))
        assert out.data_ptr() == before.data_ptr()
        out.copy_(before + left.float() @ right.float())

    monkeypatch.setattr(portable, "sums_in_float32", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(portable, "GRAM_TILE", 64)
    monkeypatch.setattr(torch, "addmm", addmm)
    x, y = torch.randn(40, 100).to(torch.bfloat16), torch.randn(40, 30).to(torch.bfloat16)
    gram, cross = torch.zeros(100, 100), torch.ones(100, 30)
    ops.gram_update_(gram, x, impl="torch")
    ops.cross_update_(cross, x, y)
    assert asked == 3 * [(torch.bfloat16, torch.bfloat16, torch.float32)]
    check(ops.mirror_(gram), x.float().T @ x.float(), reference.gram(x.double()), terms=40)
    check(cross, 1 + x.float().T @ y.float(), 1 + reference.cross(x.double(), y.double()), terms=41)
    assert ops.implementations(torch.device("cpu"), torch.bfloat16, "silu")["cross_update_"] == "torch"


def test_implementations_are_those_that_auto_takes() -> None:
    cpu = torch.device("cpu")
    for dtype in DTYPES:
        who = ops.implementations(cpu, dtype, "silu")
        assert who["activation_backward_"] == ("native" if HAS_EXTENSION else "torch")
        assert who["cross_update_"] == who["activation"] == "torch"
        assert who["gram_update_"] == ("native" if native.serves_gram(torch.zeros(1, 1, dtype=dtype)) else "torch")
        assert set(who) <= set(ops.__all__)
    assert ops.implementations(cpu, torch.float32, "gelu")["activation_backward_"] == "torch"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocabulary", [1, 5, 16, 5003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_gradient(dtype: torch.dtype, vocabulary: int, impl: ops.Impl) -> None:
    logits = (torch.randn(3, 7, vocabulary) * 8).to(dtype)
    targets = torch.randint(vocabulary, (3, 7))
    untouched = logits.clone()
    exact_loss, exact = reference.cross_entropy_gradient(logits.double(), targets)
    _, eager = reference.cross_entropy_gradient(logits, targets)
    loss, gradient = ops.cross_entropy_gradient(logits, targets, impl=impl)
    assert torch.equal(logits, untouched)
    assert loss == pytest.approx(float(exact_loss), rel=1e-5, abs=1e-4)
    if vocabulary > 1:
        check(gradient, eager, exact, terms=vocabulary)
    else:
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.gram_update_(torch.zeros(4, 4), torch.zeros(2, 4), impl="triton"),
        lambda: ops.gram_update_(torch.zeros(4, 4), torch.zeros(2, 4).half(), impl="native"),
        lambda: ops.cross_update_(torch.zeros(4, 4), torch.zeros(2, 4), torch.zeros(2, 4), impl="triton"),
        lambda: ops.cross_entropy_gradient(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), impl="triton"),
        lambda: ops.activation(torch.zeros(2, 4), None, "silu", impl="triton"),
        lambda: ops.activation_backward_(*(torch.zeros(2, 4) for _ in range(3)), "silu", impl="triton"),
        lambda: ops.ridge_solve(torch.eye(4), torch.arange(2), torch.ones(1, 4), 0.1, impl="triton"),
    ],
)
def test_an_explicit_impl_is_obeyed_or_refused(call: Callable[[], object]) -> None:
    with pytest.raises(BackendError, match="expected an implementation that serves these tensors"):
        call()


HEADS = {  # batch, query heads, key heads, tokens, dimensions
    "one block": (1, 1, 1, 64, 64),
    "short": (1, 2, 1, 5, 32),
    "one token": (2, 2, 2, 1, 64),
    "ragged": (2, 6, 2, 67, 40),
    "odd dimensions": (1, 2, 1, 130, 25),
    "long": (1, 3, 3, 300, 128),
    "wide": (1, 2, 1, 70, 512),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention(dtype: torch.dtype, shape: tuple[int, ...], impl: ops.Impl) -> None:
    batch, heads, kv_heads, tokens, dim = shape
    # As the projections leave them: tokens before heads in memory; scores that vary enough to matter.
    query, key, value, grad = (
        torch.randn(batch, tokens, n, dim).mul(1.5).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    skip_unless_served(impl, native.serves_attention(query, key, value))
    scale = dim**-0.5

    def run(function: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        inputs = [t.to(to).detach().requires_grad_() for t in (query, key, value)]
        out = function(*inputs, scale)
        return [out, *torch.autograd.grad(out, inputs, grad.to(to))]

    ours = run(lambda *args: ops.causal_attention(*args, impl=impl), dtype)
    eager = run(reference.causal_attention, dtype)
    for mine, theirs, exact in zip(ours, eager, run(reference.causal_attention, torch.float64), strict=True):
        if exact.any():
            # In bfloat16 the sums, in float32, are exact beside the rounding of what is stored.
            check(mine.detach(), theirs.detach(), exact.detach(), terms=4 if dtype == torch.bfloat16 else dim + tokens)
        else:
            assert mine.abs().max() <= dim * torch.finfo(dtype).eps, (
                "a single token has nothing to attend to but itself"
            )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_passes_on_what_is_not_a_number(dtype: torch.dtype, bad: float, impl: ops.Impl) -> None:
    query = torch.randn(1, 2, 70, 32).to(dtype)
    skip_unless_served(impl, native.serves_attention(query, query, query))
    query[0, 1, 66, 3] = bad
    out = ops.causal_attention(query, query, query, 1.0, impl=impl)
    assert not out[0, 1, 66:].isfinite().all(-1).any()
    assert out[0, 0].isfinite().all()
    assert out[0, 1, :66].isfinite().all()
    clean = query.masked_fill(~query.isfinite(), 0)
    expected = ops.causal_attention(clean, clean, clean, 1.0, impl=impl)
    torch.testing.assert_close(out[0, :, :66], expected[0, :, :66])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_attention_passes_on_from_where_it_is_read(which: str, impl: ops.Impl) -> None:
    tensors = {name: torch.randn(1, n, 70, 8) for name, n in (("query", 4), ("key", 2), ("value", 2))}
    skip_unless_served(impl, native.serves_attention(*tensors.values()))
    tensors[which][0, 1, 40, 3] = float("nan")
    spoilt = ~ops.causal_attention(*tensors.values(), 1.0, impl=impl).isfinite()
    rows = spoilt.any(-1)[0]
    # A query spoils its own row; a key or value, the rows of both heads of its group from its token on.
    expected = torch.zeros(4, 70, dtype=torch.bool)
    expected[(1, slice(40, 41)) if which == "query" else (slice(2, 4), slice(40, None))] = True
    assert torch.equal(rows, expected)
    if which == "value":
        assert torch.equal(spoilt.any(2)[0, 2], torch.arange(8) == 3)
