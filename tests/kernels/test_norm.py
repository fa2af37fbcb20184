"""kernels/norm.py and kernels/rotary.py against the float64 reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minisp.kernels import norm as kernel
from minisp.kernels import rotary
from minisp.ops import norms, reference
from tests.tolerance import check

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-5


def norm_of(hidden: Tensor, weight: Tensor, grad: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """RMSNorm by the reference, and its gradient by autograd."""
    leaf = hidden.clone().requires_grad_()
    out = reference.rms_norm(leaf, weight, EPS, offset)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@pytest.mark.kernel
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (300, 16), (33, 100), (5, 2049)])
def test_norm_is_right(num_rows: int, width: int, dtype: torch.dtype, offset: float, device: str) -> None:
    hidden = (torch.randn(num_rows, width) * torch.logspace(-2, 2, num_rows)[:, None]).to(dtype)
    weight, grad = torch.randn(width).to(dtype), torch.randn(num_rows, width).to(dtype)
    exact = norm_of(hidden.double(), weight.double(), grad.double(), offset)
    eager = norm_of(hidden, weight, grad, offset)
    there = [t.to(device) for t in (hidden, weight, grad)]
    out, inverse = kernel.rms_norm(there[0], there[1], EPS, offset)
    gradient = kernel.rms_norm_backward(there[2], there[0], there[1], inverse, offset)
    assert (out.dtype, gradient.dtype, inverse.dtype) == (dtype, dtype, torch.float32)
    root = (hidden.double().square().mean(-1) + EPS).rsqrt()
    # A gradient is what two terms of this size leave, nearly nothing of a row of one; roots and quotients of a GPU are
    # good to a few units in the last place.
    size = (root[:, None] * grad.double() * (offset + weight.double())).abs().amax(-1)
    for mine, theirs, true, least in zip((out, gradient), eager, exact, (0 * size, size), strict=True):
        for row in range(0, num_rows, 7):
            terms = 4 if dtype != torch.float32 else max(width, 32)
            check(mine[row], theirs[row], true[row], terms, max(float(least[row]), 1e-30))
    torch.testing.assert_close(inverse.cpu().double(), root, rtol=1e-5, atol=0)


@pytest.mark.kernel
def test_a_row_that_is_not_finite_stays_alone(device: str) -> None:
    hidden = torch.randn(40, 32, device=device)
    hidden[7, 3], hidden[9, 0] = float("nan"), float("inf")
    out, _ = kernel.rms_norm(hidden, torch.ones(32, device=device), EPS, 0.0)
    assert (~out.isfinite()).any(-1).nonzero().flatten().tolist() == [7, 9]


def test_the_seam_knows_how_wide_a_row_may_be() -> None:
    assert norms.WIDEST_ON_TRITON == kernel.WIDEST
    options = kernel.tile(kernel.WIDEST)
    elements = options["TILE_T"] * options["TILE_D"]
    assert elements // (32 * options["num_warps"]) <= kernel.ELEMENTS_PER_THREAD


@pytest.mark.kernel
def test_no_rows_have_no_norm(device: str) -> None:
    hidden, weight = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    out, inverse = kernel.rms_norm(hidden, weight, EPS, 0.0)
    assert out.shape == kernel.rms_norm_backward(hidden, hidden, weight, inverse, 0.0).shape == (0, 8)


HEADS = {"one": (1, 1, 1, 1, 2), "grouped": (2, 6, 2, 9, 64), "ragged": (2, 35, 3, 5, 34)}


@pytest.mark.kernel
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("per_window", [False, True])
@pytest.mark.parametrize("layout", ["projected", "contiguous", "fused"])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_right(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str, per_window: bool, backward: bool, device: str
) -> None:
    batch, heads, kv_heads, tokens, dim = shape

    def states(count: int) -> Tensor:
        if layout == "contiguous":
            return torch.randn(batch, count, tokens, dim).to(dtype)
        room = torch.randn(batch, tokens, count, dim + 6 * (layout == "fused")).to(dtype)
        return room[..., :dim].transpose(1, 2)

    query, key = states(heads), states(kv_heads)
    cosine, sine = (torch.randn(batch if per_window else 1, tokens, dim).to(dtype) for _ in range(2))

    def by_reference(to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(to).requires_grad_() for t in (query, key)]
        turned = reference.rotary(*leaves, cosine.to(to), sine.to(to))
        if not backward:
            return tuple(t.detach() for t in turned)
        return torch.autograd.grad(turned, leaves, [t.to(to) for t in (query, key)])

    there = [t.to(device) for t in (query, key, cosine, sine)]
    before = [t.clone() for t in there]
    ours = rotary.rotate(*there, backward=backward)
    for mine, theirs, true in zip(ours, by_reference(dtype), by_reference(torch.float64), strict=True):
        assert mine.dtype == dtype
        check(mine, theirs, true)
    assert all(torch.equal(now, then) for now, then in zip(there, before, strict=True))


@pytest.mark.kernel
def test_addresses_beyond_int32(device: str) -> None:
    # The last of five tokens lies 2³¹ elements in; only the pages that hold tokens are touched.
    query = torch.empty(4 * 2**29 + 16, dtype=torch.bfloat16, device=device).as_strided((1, 1, 5, 16), (1, 1, 2**29, 1))
    values = torch.randn(1, 1, 5, 16).to(torch.bfloat16)
    query.copy_(values)
    cosine, sine = torch.randn(1, 5, 16).to(torch.bfloat16), torch.randn(1, 5, 16).to(torch.bfloat16)
    key = values.to(device)
    expected = rotary.rotate(key, key, cosine.to(device), sine.to(device))[0]
    # Not like the query in strides: a result that lies as thinly would take 4 GB.
    out = torch.empty_like(key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotary, "torch", _Instead(out))
        ours, _ = rotary.rotate(query, key, cosine.to(device), sine.to(device))
    assert torch.equal(ours, expected)


class _Instead:
    """torch, whose next new tensor is a given one."""

    def __init__(self, first: Tensor):
        self.first: Tensor | None = first

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty_like(self, tensor: Tensor) -> Tensor:
        first, self.first = self.first, None
        return torch.empty_like(tensor) if first is None else first


BAD_NORMS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "a vector": lambda t: (t[0], t[0]),
    "whole numbers": lambda t: (t.long(), t[0].long()),
    "two dtypes": lambda t: (t, t[0].half()),
    "another width": lambda t: (t, t[0, :2]),
    "columns apart": lambda t: (t.T, t[:, 0]),
    "too wide": lambda t: (t.new_ones(1, kernel.WIDEST + 1), t.new_ones(kernel.WIDEST + 1)),
}


@pytest.mark.kernel
@pytest.mark.parametrize("arguments", BAD_NORMS.values(), ids=BAD_NORMS)
def test_bad_rows_are_refused(arguments: Callable[[Tensor], tuple[Tensor, Tensor]], device: str) -> None:
    hidden, weight = arguments(torch.ones(2, 3, device=device))
    with pytest.raises(ValueError, match=r"expected .*, got .*\. Convert"):
        kernel.rms_norm(hidden, weight, EPS, 0.0)


BAD_HEADS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "three axes": lambda q, c: (q[0], q[0], c, c),
    "an odd head": lambda q, c: (q[..., :3], q[..., :3], c[..., :3], c[..., :3]),
    "two dtypes": lambda q, c: (q, q.half(), c, c),
    "other tokens": lambda q, c: (q, q[:, :, :2], c, c),
    "other angles": lambda q, c: (q, q, c[..., :2], c),
    "dimensions apart": lambda q, c: (q.transpose(2, 3)[:, :, :, :2], q, c, c),
}


@pytest.mark.kernel
@pytest.mark.parametrize("arguments", BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_heads_are_refused(arguments: Callable[[Tensor, Tensor], tuple[Tensor, ...]], device: str) -> None:
    query, cosine = torch.ones(1, 2, 5, 4, device=device), torch.ones(1, 5, 4, device=device)
    with pytest.raises(ValueError, match=r"expected .*, got .*\. Convert"):
        rotary.rotate(*arguments(query, cosine))
