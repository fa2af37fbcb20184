"""kernels/saliency.py against the float64 reference, and what the compilers make of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minisp.kernels import saliency as kernel
from minisp.ops import reference
from tests.tolerance import check

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POISON = 7.0


def tensors(num_tokens: int, width: int, dtype: torch.dtype, device: str, padding: int = 16) -> list[Tensor]:
    """gate, up and grad as the left part of wider matrices, whose rest must stay what it is."""
    made = []
    for _ in range(3):
        room = torch.full((num_tokens, width + padding), POISON, dtype=dtype, device=device)
        room[:, :width] = torch.randn(num_tokens, width).mul(2).to(dtype)
        made.append(room[:, :width])
    return made


@pytest.mark.kernel
@pytest.mark.parametrize("has_up", [True, False])
@pytest.mark.parametrize("kind", kernel.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (7, 259), (257, 33), (9, 272)])
def test_backward_is_right(
    num_tokens: int, width: int, dtype: torch.dtype, kind: str, has_up: bool, device: str
) -> None:
    gate, up, grad = tensors(num_tokens, width, dtype, device)
    inputs = [t.cpu().double() for t in (gate, up, grad)]
    eager_inputs = [t.cpu().clone() for t in (gate, up, grad)]
    exact = reference.activation_backward(inputs[0], inputs[1] if has_up else None, inputs[2], kind)
    eager = reference.activation_backward(eager_inputs[0], eager_inputs[1] if has_up else None, eager_inputs[2], kind)
    sums = kernel.activation_backward_(gate, up if has_up else None, grad, kind)
    assert sums.dtype == torch.float32
    check(grad, eager[0], exact[0])
    check(gate, eager[1], exact[1])
    if has_up:
        assert exact[2] is not None and eager[2] is not None
        check(up, eager[2], exact[2])
    for ours, true, theirs in zip(sums, exact[3], eager[3].float(), strict=True):
        check(ours, theirs, true, terms=num_tokens)
    for tensor in (gate, up, grad):
        rest = tensor.as_strided((num_tokens, 16), (width + 16, 1), width)
        assert (rest == POISON).all(), "something was written beside the matrix"


@pytest.mark.kernel
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("has_up", [True, False])
@pytest.mark.parametrize("kind", kernel.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (11, 300)])
def test_forward_is_right(
    num_tokens: int, width: int, dtype: torch.dtype, kind: str, has_up: bool, in_place: bool, device: str
) -> None:
    gate, up, _ = tensors(num_tokens, width, dtype, device)
    factor = up if has_up else None
    exact = reference.activation(gate.cpu().double(), factor.cpu().double() if factor is not None else None, kind)
    eager = reference.activation(gate.cpu(), factor.cpu() if factor is not None else None, kind)
    before = gate.clone(), up.clone()
    # Other rows are further apart there than in the gate.
    room = torch.full((num_tokens, width + 9), torch.nan, dtype=dtype, device=device)
    out = gate if in_place else room[:, :width]
    assert kernel.activation(gate, factor, kind, out=out) is out
    check(out, eager, exact)
    assert torch.equal(up, before[1])
    assert in_place or torch.equal(gate, before[0])
    assert room[:, width:].isnan().all(), "something was written beside the matrix"
    assert (gate.as_strided((num_tokens, 16), (width + 16, 1), width) == POISON).all()


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_has_no_activation(shape: tuple[int, int], device: str) -> None:
    out = torch.empty(shape, device=device)
    assert kernel.activation(torch.empty(shape, device=device), None, "silu", out=out) is out


@pytest.mark.kernel
@pytest.mark.parametrize("out", [(2, 4), (3, 3)])
def test_an_output_of_another_shape_is_refused(out: tuple[int, int], device: str) -> None:
    with pytest.raises(ValueError, match=r"expected an output .*, got .*\. Pass"):
        kernel.activation(torch.ones(2, 3, device=device), None, "silu", out=torch.empty(out, device=device))


@pytest.mark.kernel
def test_addresses_beyond_int32(device: str) -> None:
    # The last of five tokens lies 2³¹ elements in; only the pages that hold tokens are touched.
    gate, grad = (
        torch.empty(4 * 2**29 + 3, dtype=torch.bfloat16, device=device).as_strided((5, 3), (2**29, 1)) for _ in range(2)
    )
    values = torch.randn(5, 3).to(torch.bfloat16), torch.randn(5, 3).to(torch.bfloat16)
    gate.copy_(values[0])
    grad.copy_(values[1])
    expected = reference.activation_backward(values[0].double(), None, values[1].double(), "silu")
    kernel.activation_backward_(gate, None, grad, "silu")
    torch.testing.assert_close(grad.cpu().double(), expected[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(gate.cpu().double(), expected[1], rtol=1e-2, atol=1e-3)


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_gives_zero_sums(shape: tuple[int, int], device: str) -> None:
    gate, up, grad = (torch.empty(shape, device=device) for _ in range(3))
    sums = kernel.activation_backward_(gate, up, grad, "silu")
    assert sums.shape == (3, shape[1])
    assert not sums.any()


@pytest.mark.kernel
def test_extreme_values_stay_finite(device: str) -> None:
    gate = torch.tensor([[-3e38, -200.0, -20.0, 0.0, 20.0, 200.0]], device=device)
    for kind, slope in (("silu", [0, 0, 0, 0.5, 1, 1]), ("gelu", [0, 0, 0, 0.5, 1, 1]), ("relu", [0, 0, 0, 0, 1, 1])):
        z, g = gate.clone(), torch.ones_like(gate)
        kernel.activation_backward_(z, None, g, kind)
        torch.testing.assert_close(z.cpu(), torch.tensor([slope], dtype=torch.float32), atol=1e-6, rtol=1e-6)


BAD = {
    "an unknown activation": lambda t: (t, t, t, "swish"),
    "a vector": lambda t: (t[0], t[0], t[0], "silu"),
    "whole numbers": lambda t: (t.long(), t.long(), t.long(), "silu"),
    "two dtypes": lambda t: (t, t.half(), t, "silu"),
    "two shapes": lambda t: (t, t[:1], t, "silu"),
    "units apart": lambda t: (t.T, t.T, t.T, "silu"),
}


@pytest.mark.kernel
@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(arguments: Callable[[Tensor], tuple], device: str) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got .*\. (Use|Convert)"):
        kernel.activation_backward_(*arguments(torch.ones(2, 3, device=device)))
