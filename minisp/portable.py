"""The "torch" implementation of every operation of `minisp.ops`: plain tensor code, on every device.

It is tuned for its memory traffic alone. The specification is `minisp.reference`; arguments are those of `minisp.ops`,
which has chosen this implementation.

Shapes: T tokens, m units, d hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Rows of T handled at once by the element-wise passes: their float32 copies of (rows, m) stay in a core's cache.
ELEMENTWISE_ROWS = 128
# Edge of the square tiles of the Gram matrix: large enough for full GEMM speed, small enough that the part computed
# above the diagonal is a small share.
GRAM_TILE = 512
# Float32 logits handled at once by the cross entropy: 8 MB, which stays in a shared cache.
CROSS_ENTROPY_ELEMENTS = 2**21


def activation(gate: Tensor, up: Tensor | None, kind: str, out: Tensor) -> Tensor:
    """x = act(gate) ⊙ up, or act(gate), into `out` (T, m)."""
    _activate(gate, kind, out)
    return out if up is None else out.mul_(up)


def activation_backward_(gate: Tensor, up: Tensor | None, grad_x: Tensor, kind: str) -> Tensor:
    """In place; the sums (3, m) float32 are returned."""
    sums = torch.zeros(3, gate.shape[1], dtype=torch.float32, device=gate.device)
    for start in range(0, gate.shape[0], ELEMENTWISE_ROWS):
        rows = slice(start, start + ELEMENTWISE_ROWS)
        z, g = gate[rows].float(), grad_x[rows].float()
        value = _activate(z, kind)
        if up is None:
            x, grad_value = value, g
        else:
            u = up[rows].float()
            x, grad_value = value * u, g * u
            up[rows] = value.mul_(g)
        product = x * g
        sums[0] += product.abs().sum(0)
        sums[1] += product.square().sum(0)
        sums[2] += product.sum(0)
        gate[rows] = _activation_grad(z, grad_value, kind)
        grad_x[rows] = x
    return sums


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ) V over the tokens so far, differentiable."""
    if query.device.type == "cpu" and not all(bool(t.detach().sum().isfinite()) for t in (query, key, value)):
        return _attention_of_what_is_not_finite(query, key, value, scale)
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def _attention_of_what_is_not_finite(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same where torch's own, which works on blocks of tokens, would spread a NaN to earlier tokens of its block.

    Scores of later keys are replaced, not added to, and values that are not finite, which a weight of 0 would not
    silence, are carried forward by a sum over the tokens.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (query.float() @ key.float().mT * scale).masked_fill(later, float("-inf"))
    finite = torch.where(value.isfinite(), value, 0).float()
    out = scores.softmax(-1) @ finite + (value.float() - finite).cumsum(2)
    return out.to(query.dtype)


def gram_update_(gram: Tensor, x: Tensor, weights: Tensor | None) -> None:
    """G += Xᵀ diag(w) X on and below the diagonal tiles."""
    with _sixteen_bit_products(x.dtype):
        left, right = _weighted(x, weights), x.float()
        for start in range(0, x.shape[1], GRAM_TILE):
            stop = min(start + GRAM_TILE, x.shape[1])
            gram[start:stop, :stop] += left[:, start:stop].T @ right[:, :stop]


def cross_update_(cross: Tensor, x: Tensor, y: Tensor, weights: Tensor | None) -> None:
    """C += Xᵀ diag(w) Y."""
    with _sixteen_bit_products(x.dtype):
        cross.addmm_(_weighted(x, weights).T, y.float())


def mirror_(gram: Tensor) -> Tensor:
    """Copy the lower triangle onto the upper one, in place."""
    for start in range(0, gram.shape[0], GRAM_TILE):
        stop = min(start + GRAM_TILE, gram.shape[0])
        gram[:start, start:stop] = gram[start:stop, :start].T
        block = gram[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
    return gram


def cross_entropy_gradient(rows: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Summed loss, and softmax(rows) − onehot(targets) for logits (T, V) and targets (T, 1)."""
    gradient = torch.empty_like(rows)
    loss = 0.0
    step = max(1, CROSS_ENTROPY_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk, target = rows[start : start + step].to(torch.float32, copy=True), targets[start : start + step]
        chunk -= chunk.amax(-1, keepdim=True)
        score = chunk.gather(1, target)
        total = chunk.exp_().sum(-1, keepdim=True)
        loss += float((total.log() - score).sum(dtype=torch.float64))
        probability = chunk.div_(total)
        probability.scatter_add_(1, target, probability.new_full((1, 1), -1.0).expand(target.shape))
        gradient[start : start + step] = probability
    return loss, gradient


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """diag(w) X in float32, rounded once to the dtype of X."""
    return x.float() if weights is None else (x.float() * weights[:, None]).to(x.dtype).float()


def _activate(z: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """act(z), into `out` where given, which may be z."""
    out = torch.empty_like(z) if out is None else out
    if kind == "silu":
        torch.ops.aten.silu.out(z, out=out)
    elif kind in ("gelu", "gelu_tanh"):
        torch.ops.aten.gelu.out(z, approximate="tanh" if kind == "gelu_tanh" else "none", out=out)
    else:
        torch.clamp_min(z, 0, out=out)
    return out.square_() if kind == "relu2" else out


def _activation_grad(z: Tensor, grad: Tensor, kind: str) -> Tensor:
    result: Tensor
    if kind == "silu":
        result = torch.ops.aten.silu_backward(grad, z)
    elif kind in ("gelu", "gelu_tanh"):
        result = torch.ops.aten.gelu_backward(grad, z, approximate="tanh" if kind == "gelu_tanh" else "none")
    elif kind == "relu2":
        result = grad * z.clamp_min(0).mul_(2)
    else:
        result = grad * (z > 0)
    return result


@contextmanager
def _sixteen_bit_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 GEMMs on a CPU multiply in bfloat16 where the inputs are bfloat16 values anyway.

    The products are then exact and the sums stay float32: the same result as a float32 GEMM up to summation order,
    at the speed of the CPU's bfloat16 units.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
