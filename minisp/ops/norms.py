"""RMSNorm and the rotary embedding as steps that autograd knows, whoever computes them.

A body is a module with the functions of `Norm` or `Rotary`: `portable`, `native_norms`, or a kernel's. The steps decide
what is kept for the backward and hand over plain tensors.

Shapes: T rows, d columns; B windows of L tokens, H heads of D dimensions.
"""

from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Function

# The widest row that one program of kernels/norm.py holds in registers.
WIDEST_ON_TRITON = 16384


class Norm(Protocol):
    """Both directions of RMSNorm on contiguous rows (T, d); see `reference.rms_norm`."""

    def rms_norm(self, hidden: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]: ...

    def rms_norm_backward(
        self, grad: Tensor, hidden: Tensor, weight: Tensor, inverse: Tensor, offset: float
    ) -> Tensor: ...


class Rotary(Protocol):
    """Both directions of the rotary embedding; the dimensions of a head are contiguous. See `reference.rotary`."""

    def rotate(
        self, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False
    ) -> tuple[Tensor, Tensor]: ...


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, offset: float, body: Norm) -> Tensor:
    """See `minisp.ops.rms_norm`."""
    result: Tensor = _RmsNorm.apply(hidden, weight, eps, offset, body)
    return result


def rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, body: Rotary) -> tuple[Tensor, Tensor]:
    """See `minisp.ops.rotary`."""
    result: tuple[Tensor, Tensor] = _Rotary.apply(query, key, cosine, sine, body)
    return result


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, offset: float, body: Norm) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        out, inverse = body.rms_norm(rows, weight, eps, offset)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.offset, ctx.body = offset, body
        return out.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, weight, inverse = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_rows = grad.reshape(rows.shape).contiguous()
        grad_hidden = ctx.body.rms_norm_backward(grad_rows, rows, weight, inverse, ctx.offset)
        return grad_hidden.view(grad.shape), None, None, None, None


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, body: Rotary
    ) -> tuple[Tensor, Tensor]:
        query, key, cosine, sine = map(_along_heads, (query, key, cosine, sine))
        ctx.save_for_backward(cosine, sine)
        ctx.body = body
        return body.rotate(query, key, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, key = map(_along_heads, grad_outputs)
        return *ctx.body.rotate(query, key, *ctx.saved_tensors, backward=True), None, None, None


def _along_heads(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
