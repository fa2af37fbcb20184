"""The "torch" implementation of every operation of `minisp.ops`: plain tensor code, on every device.

It is tuned for its memory traffic alone. `minisp.ops.reference` is its specification. Its arguments are those of
`minisp.ops`, which has chosen this implementation.

Shapes: T tokens, m units, d hidden size, V vocabulary; B windows of L tokens, H heads of D dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minisp.ops.backend import OLDEST_GPU

# Rows of T handled at once by the element-wise passes: their float32 copies of (rows, m) stay in a core's cache.
ELEMENTWISE_ROWS = 128
# Edge of the square tiles of the Gram matrix: large enough for full GEMM speed, small enough that the part computed
# above the diagonal is a small share.
GRAM_TILE = 512
# Float32 logits handled at once by the cross entropy: 8 MB, which stays in a shared cache.
CROSS_ENTROPY_ELEMENTS = 2**21
# After 2.9, torch learnt to add 16-bit products to a float32 matrix (its pull request 167931); 2.11 is the oldest that
# the tests for GPUs are meant for.
FLOAT32_SUMS = "2.11"


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


def saliency_sums(x: Tensor, grad: Tensor, columns: int) -> Tensor:
    """The sums (3, u) float32."""
    sums = torch.zeros(3, x.shape[1] // columns, dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], ELEMENTWISE_ROWS):
        rows = slice(start, start + ELEMENTWISE_ROWS)
        product = x[rows].float() * grad[rows].float()
        if columns > 1:
            product = product.unflatten(1, (-1, columns)).sum(2)
        sums[0] += product.abs().sum(0)
        sums[1] += product.square().sum(0)
        sums[2] += product.sum(0)
    return sums


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ) V over the tokens so far, differentiable."""
    if query.device.type == "cpu" and not all(bool(t.detach().sum().isfinite()) for t in (query, key, value)):
        return _attention_of_what_is_not_finite(query, key, value, scale)
    group = query.shape[1] // key.shape[1]
    if group > 1 and repeats_keys(query.dtype, capability_of(query.device)):
        key, value, group = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 1
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=group > 1)


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


def repeats_keys(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether grouped queries need their keys and values repeated, for torch to serve them in linear memory.

    On GPUs torch's flash attention takes 16-bit types alone, from sm_80 on, and its memory-efficient kernel takes no
    groups. What neither takes goes to a formula that keeps all scores: B·H·L² of them.

    Args:
        capability: of the GPU; None where the tensors are on another device.
    """
    return capability is not None and (dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0))


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for another device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x r ⊙ (offset + w) like `hidden` (T, d), and r = (mean x² + eps)^(−1/2), (T,) float32."""
    out, scale = torch.empty_like(hidden), offset + weight.float()
    inverse = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for rows in _row_blocks(hidden):
        x = hidden[rows].float()
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        inverse[rows] = r[:, 0]
        out[rows] = x * r * scale
    return out, inverse


def rms_norm_backward(grad: Tensor, hidden: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    """∂L/∂hidden (T, d) for grad = ∂L/∂out (T, d)."""
    out, scale = torch.empty_like(hidden), offset + weight.float()
    for rows in _row_blocks(hidden):
        x, h, r = hidden[rows].float(), grad[rows] * scale, inverse[rows, None]
        along = (h * x).mean(-1, keepdim=True).mul_(r * r)
        out[rows] = (h - x * along).mul_(r)
    return out


def rotate(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries (B, H, L, D) and keys (B, H_kv, L, D) turned by cosine and sine (B or 1, L, D), or by the transpose."""
    cosine, sine = cosine[:, None].float(), sine[:, None].float()
    half = query.shape[-1] // 2
    # What goes to the first half from the second, and the other way.
    first, second = (sine[..., half:], -sine[..., :half]) if backward else (-sine[..., :half], sine[..., half:])
    turned = []
    for tensor in (query, key):
        out = torch.empty_like(tensor)
        a, b = tensor[..., :half], tensor[..., half:]
        out[..., :half] = torch.addcmul(a * cosine[..., :half], b, first)
        out[..., half:] = torch.addcmul(b * cosine[..., half:], a, second)
        turned.append(out)
    return turned[0], turned[1]


def gram_update_(gram: Tensor, x: Tensor) -> None:
    """G += XᵀX on and below the diagonal tiles."""
    with _sixteen_bit_products(x.dtype):
        wide = _widened(x)
        for start in range(0, x.shape[1], GRAM_TILE):
            stop = min(start + GRAM_TILE, x.shape[1])
            _add_product_(gram[start:stop, :stop], wide[:, start:stop], wide[:, :stop])


def cross_update_(cross: Tensor, x: Tensor, y: Tensor) -> None:
    """C += XᵀY."""
    with _sixteen_bit_products(x.dtype):
        _add_product_(cross, _widened(x), _widened(y))


def sums_in_float32(x: Tensor) -> bool:
    """Whether torch adds products of these 16-bit values to a float32 matrix without a float32 copy of them.

    cuBLAS does, at the rate of an ordinary 16-bit product (derived, H100: 650 TFLOP/s; float32 copies run at 50).
    """
    return (
        x.is_cuda
        and torch.version.cuda is not None
        and torch.__version__ >= FLOAT32_SUMS
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device) >= OLDEST_GPU
    )


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


def _row_blocks(x: Tensor) -> list[slice]:
    """Rows of x handled at once: on a CPU few enough for a core's cache, elsewhere all."""
    step = ELEMENTWISE_ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _widened(x: Tensor) -> Tensor:
    """X in the type that `_add_product_` multiplies here."""
    return x if sums_in_float32(x) else x.float()


def _add_product_(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out (m, d) float32 += XᵀY, for X and Y as `_widened` leaves them."""
    if x.dtype == torch.float32:
        out.addmm_(x.T, y)
    else:
        torch.addmm(out, x.T, y, out_dtype=torch.float32, out=out)


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
