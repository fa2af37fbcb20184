"""The CPU kernels of the extension `minisp._C`, behind checks: what they serve, and calls that cannot go wrong.

They take contiguous CPU tensors in bfloat16 or float32 and compute in float32. Each op of `minisp.ops` that has a
"native" implementation asks `serves…` first.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

KINDS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3}
"""The activations, numbered as in csrc/elementwise.h; exact GELU has no native version."""


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
    """Whether `gram_update_` can be used: bfloat16 on a CPU with matrix tiles."""
    return serves(x) and x.dtype == torch.bfloat16 and bool(_extension().gram_available())


def activation_backward_(gate: Tensor, up: Tensor | None, grad_x: Tensor, kind: str) -> Tensor:
    """In place; the sums (3, m) float32 are returned. See `minisp.ops.activation_backward_`."""
    sums = torch.zeros(3, gate.shape[1])
    _extension().activation_backward(
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
    loss = _extension().cross_entropy(
        logits.data_ptr(), targets.data_ptr(), gradient.data_ptr(), *_shape(logits), torch.get_num_threads()
    )
    return loss, gradient


def gram_update_(gram: Tensor, x: Tensor) -> None:
    """gram (m, m) float32 contiguous += XᵀX for x (T, m) bfloat16, on and below the diagonal blocks."""
    _extension().gram_update(gram.data_ptr(), x.data_ptr(), x.shape[0], x.shape[1], torch.get_num_threads())


def _extension() -> Any:
    return import_module("minisp._C")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shape(tensor: Tensor) -> tuple[int, int, bool]:
    return tensor.shape[0], tensor.shape[1], tensor.dtype == torch.bfloat16
