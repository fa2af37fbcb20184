"""kernels/saliency.py against the float64 reference, and what the compilers make of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minisp import reference
from minisp.kernels import saliency as kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POISON = 7.0


def tensors(num_tokens: int, width: int, dtype: torch.dtype, device: str, padding: int = 3) -> list[Tensor]:
    """gate, up and grad as the left part of wider matrices, whose rest must stay what it is."""
    made = []
    for _ in range(3):
        room = torch.full((num_tokens, width + padding), POISON, dtype=dtype, device=device)
        room[:, :width] = torch.randn(num_tokens, width).mul(2).to(dtype)
        made.append(room[:, :width])
    return made


def assert_close(ours: Tensor, exact: Tensor, eager: Tensor, terms: int = 1) -> None:
    scale = exact.abs().max().clamp_min(1e-30)
    error = (ours.double().cpu() - exact).abs().max() / scale
    theirs = (eager.double() - exact).abs().max() / scale
    assert error <= theirs + torch.finfo(ours.dtype).eps * terms**0.5


@pytest.mark.kernel
@pytest.mark.parametrize("has_up", [True, False])
@pytest.mark.parametrize("kind", kernel.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (7, 259), (257, 33)])
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
    assert_close(grad, exact[0], eager[0])
    assert_close(gate, exact[1], eager[1])
    if has_up:
        assert exact[2] is not None and eager[2] is not None
        assert_close(up, exact[2], eager[2])
    for ours, true, theirs in zip(sums, exact[3], eager[3].float(), strict=True):
        assert_close(ours, true, theirs, terms=num_tokens)
    for tensor in (gate, up, grad):
        rest = tensor.as_strided((num_tokens, 3), (width + 3, 1), width)
        assert (rest == POISON).all(), "something was written beside the matrix"


@pytest.mark.kernel
@pytest.mark.parametrize("has_up", [True, False])
@pytest.mark.parametrize("kind", kernel.KINDS)
def test_forward_is_right(kind: str, has_up: bool, device: str) -> None:
    gate, up, _ = tensors(11, 300, torch.bfloat16, device)
    factor = up if has_up else None
    exact = reference.activation(gate.cpu().double(), factor.cpu().double() if factor is not None else None, kind)
    eager = reference.activation(gate.cpu(), factor.cpu() if factor is not None else None, kind)
    x = kernel.activation_(gate, factor, kind)
    assert x is gate
    assert_close(x, exact, eager)


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


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("has_up", [True, False])
@pytest.mark.parametrize("kind", kernel.KINDS)
def test_backward_compiles_without_spills(kind: str, has_up: bool, capability: int, compile_for: Callable) -> None:
    signature = {"p_gate": "*bf16", "p_up": "*bf16", "p_grad": "*bf16", "p_sums": "*fp32"}
    signature |= dict.fromkeys(("num_tokens", "width", "stride_token"), "i32")
    options = dict(kernel.TILE)
    warps = options.pop("num_warps")
    constants = {"KIND": kernel.KINDS[kind], "HAS_UP": int(has_up), "TOKENS": kernel.TOKENS_PER_PROGRAM, **options}
    aligned = ("p_gate", "p_up", "p_grad", "p_sums", "width", "stride_token")
    compiled = compile_for(
        capability, kernel.activation_backward_kernel, signature, constants, aligned, num_warps=warps
    )
    compiled.assert_fits(capability)
    assert "LDG.E.128" in compiled.sass, "loads are 16 bytes wide"
    assert "STG.E.128" in compiled.sass, "stores are 16 bytes wide"


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_forward_compiles_without_spills(capability: int, compile_for: Callable) -> None:
    signature = {"p_gate": "*bf16", "p_up": "*bf16"} | dict.fromkeys(("num_tokens", "width", "stride_token"), "i32")
    options = dict(kernel.TILE)
    warps = options.pop("num_warps")
    constants = {"KIND": 0, "HAS_UP": 1, **options}
    compiled = compile_for(
        capability, kernel.activation_kernel, signature, constants, ("p_gate", "p_up", "width", "stride_token"),
        num_warps=warps,
    )  # fmt: skip
    compiled.assert_fits(capability)
