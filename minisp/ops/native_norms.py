"""RMSNorm and the rotary embedding on CPUs, in the extension `minisp._C`: what it serves, and checked calls.

Tensors are bfloat16 or float32, arithmetic is float32; floors stand in csrc/norms.h.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from minisp.ops.native import extension


def serves_norm(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` and `rms_norm_backward` take a hidden state (…, d), made contiguous, and its weight (d,)."""
    return _serves(hidden, weight) and weight.is_contiguous() and weight.shape == hidden.shape[-1:] and len(weight) > 0


def serves_rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Whether `rotate` takes query (B, H, L, D) and key (B, H_kv, L, D), cosine and sine (B or 1, L, D), D even."""
    batch, _, tokens, dim = query.shape
    return (
        _serves(query, key, cosine, sine)
        and dim % 2 == 0
        and (key.shape[0], *key.shape[2:]) == (batch, tokens, dim)
        and all(t.shape in ((1, tokens, dim), (batch, tokens, dim)) for t in (cosine, sine))
    )


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """As `portable.rms_norm`, for contiguous rows (T, d)."""
    out, inverse = torch.empty_like(hidden), torch.empty(len(hidden), dtype=torch.float32)
    addresses = hidden.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), inverse.data_ptr()
    extension().rms_norm(*addresses, _shape(hidden, offset), torch.get_num_threads())
    return out, inverse


def rms_norm_backward(grad: Tensor, hidden: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    """As `portable.rms_norm_backward`, for contiguous rows (T, d)."""
    out = torch.empty_like(hidden)
    addresses = [t.data_ptr() for t in (grad, hidden, weight, inverse, out)]
    extension().rms_norm_backward(*addresses, _shape(hidden, offset), torch.get_num_threads())
    return out


def rotate(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """As `portable.rotate`; the last axis of every tensor is contiguous."""
    turned = torch.empty_like(query), torch.empty_like(key)
    batch, _, tokens, dim = query.shape
    extension().rotate(
        (_strided(query), _strided(turned[0])),
        (_strided(key), _strided(turned[1])),
        (query.shape[1], key.shape[1]),
        _angles(cosine),
        _angles(sine),
        (batch, tokens, dim, query.dtype == torch.bfloat16, backward),
        torch.get_num_threads(),
    )
    return turned


def _serves(*tensors: Tensor) -> bool:
    return (
        find_spec("minisp._C") is not None
        and all(t.device.type == "cpu" and t.dtype in (torch.bfloat16, torch.float32) for t in tensors)
        and len({t.dtype for t in tensors}) == 1
    )


def _shape(hidden: Tensor, offset: float) -> tuple[int, int, bool, float]:
    return *hidden.shape, hidden.dtype == torch.bfloat16, offset


def _strided(tensor: Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *tensor.stride()[:3]


def _angles(table: Tensor) -> tuple[int, int, int]:
    return table.data_ptr(), table.stride(0) if len(table) > 1 else 0, table.stride(1)
