"""The CPU kernels of the extension `minisp._C`, behind checks: what they serve, and calls that cannot go wrong.

They take CPU tensors in bfloat16 or float32 and sum in float32. Each op of `minisp.ops` that has a "native"
implementation asks `serves…` first. The extension holds its kernels once for each processor level (csrc/level.h). It
uses the highest that the machine offers and the environment variable MINISP_MAX_CPU_ISA allows.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from minisp.errors import BackendError

KINDS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3}
"""The activations, numbered as in csrc/elementwise.h; exact GELU has no native version."""


# Below AVX2, the library's products are faster than the extension's.
NO_PRODUCTS = ("portable",)


def level() -> str:
    """The processor level that the kernels use: portable, avx2, avx512, avx512_bf16 or amx. Needs the extension."""
    return str(extension().active_level())


def serves(*tensors: Tensor | None, kind: str | None = None) -> bool:
    """Whether the extension is built and these tensors (None: absent) and this activation are within its reach."""
    return (
        find_spec("minisp._C") is not None
        and (kind is None or kind in KINDS)
        and all(
            t.device.type == "cpu" and t.is_contiguous() and t.dtype in (torch.bfloat16, torch.float32)
            for t in tensors
            if t is not None
        )
        and len({t.dtype for t in tensors if t is not None}) == 1
    )


def serves_gram(x: Tensor) -> bool:
    """Whether `gram_update_` can be used: bfloat16 or float32, at a level from AVX2 on."""
    return serves(x) and level() not in NO_PRODUCTS


def activation_backward_(gate: Tensor, up: Tensor | None, grad_x: Tensor, kind: str) -> Tensor:
    """In place; the sums (3, m) float32 are returned. See `minisp.ops.activation_backward_`."""
    sums = torch.zeros(3, gate.shape[1], dtype=torch.float32)
    extension().activation_backward(
        gate.data_ptr(),
        _address(up),
        grad_x.data_ptr(),
        sums.data_ptr(),
        *_shape(gate),
        KINDS[kind],
        torch.get_num_threads(),
    )
    return sums


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Logits (T, V), targets (T,) int64: see `minisp.ops.cross_entropy_gradient`."""
    gradient = torch.empty_like(logits)
    targets = targets.contiguous()
    loss = extension().cross_entropy(
        logits.data_ptr(), targets.data_ptr(), gradient.data_ptr(), *_shape(logits), torch.get_num_threads()
    )
    return loss, gradient


def serves_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` can be used: heads of at most 512 dimensions in bfloat16 or float32, from AVX2 on."""
    tensors = (query, key, value)
    return (
        find_spec("minisp._C") is not None
        and all(t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype == value.dtype
        and query.shape[1] % key.shape[1] == 0
        and key.shape == value.shape
        and 0 < query.shape[-1] == key.shape[-1] <= 512
        and level() not in NO_PRODUCTS
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Differentiable; see `minisp.ops.causal_attention`."""
    result: Tensor = _CausalAttention.apply(query, key, value, scale)
    return result


class _CausalAttention(torch.autograd.Function):
    """See csrc/attention.h. Results and gradients lie in memory as (B, L, H, D), as the projections want them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = _empty_heads(query)
        logsumexp = torch.empty(query.shape[:3], dtype=torch.float32)
        shape = (*query.shape[:2], key.shape[1], *query.shape[2:], scale, query.dtype == torch.bfloat16)
        addresses = (_strided(t) for t in (query, key, value, out))
        extension().attention_forward(*addresses, logsumexp.data_ptr(), shape, torch.get_num_threads())
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        grad_out = grad_outputs[0] if grad_outputs[0].stride(-1) == 1 else grad_outputs[0].contiguous()
        gradients = (_empty_heads(query), _empty_heads(key), _empty_heads(value))
        read = [_strided(t) for t in (query, key, value, out, grad_out)]
        written = [_strided(t) for t in gradients]
        extension().attention_backward(read, logsumexp.data_ptr(), written, ctx.shape, torch.get_num_threads())
        return *gradients, None


def _empty_heads(like: Tensor) -> Tensor:
    batch, heads, tokens, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _strided(tensor: Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *tensor.stride()[:3]


def gram_update_(gram: Tensor, x: Tensor) -> None:
    """gram (m, m) float32 contiguous += XᵀX for x (T, m), on and below the diagonal blocks."""
    extension().gram_update(gram.data_ptr(), x.data_ptr(), *_shape(x), torch.get_num_threads())


@cache
def extension() -> Any:
    """The module minisp._C.

    Raises:
        BackendError: the environment variable MINISP_MAX_CPU_ISA names no processor level.
    """
    module = import_module("minisp._C")
    try:
        module.active_level()
    except ValueError as error:
        raise BackendError(str(error)) from None
    return module


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shape(tensor: Tensor) -> tuple[int, int, bool]:
    return tensor.shape[0], tensor.shape[1], tensor.dtype == torch.bfloat16
