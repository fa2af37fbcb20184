"""The engine's operations beside what a user would write: who computes each, and what it must cost.

T tokens, m units, n kept units, d hidden size, V vocabulary; B windows of L tokens, H heads of D dimensions, K heads of
keys. Work is the least that the operation takes: FLOPs where products bound it, bytes moved where memory does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from cases import INTERPRETED, Case, Contenders, Place, Results, Shape
from torch import Tensor
from torch.nn import functional

from minisp import ops
from minisp.ops import reference

# Widths at which torch.compile runs too: each compilation takes some ten seconds.
COMPILED = (4096, 11008, 24)
EPS, DAMPING = 1e-5, 0.05


def gram(shape: Shape, place: Place) -> Case:
    """G += XᵀX on and below the diagonal: Tm² FLOPs, half of a product's 2Tm²."""
    m, tokens = shape["m"], shape["T"]
    x, total = place.randn(tokens, m), torch.zeros(m, m, device=place.device)

    def update(impl: ops.Impl) -> Tensor:
        ops.gram_update_(total, x, impl=impl)
        return total

    def by_kernel(precision: str) -> Tensor:
        from minisp.kernels import gram as kernel

        kernel.gram_update_(total, x, input_precision=precision)
        return total

    contenders = place.ours(update) | _added_products(total, x, x)
    if place.dtype != torch.float32:
        # Without adding to anything, and rounded to 16 bits: less than what is asked.
        contenders["16-bit matmul"] = lambda: x.T @ x
    elif place.runs_triton:
        for precision in ("tf32", "tf32x3"):
            contenders[f"minisp triton {precision}"] = partial(by_kernel, precision)
    return Case(
        contenders, lambda dtype: (reference.gram(_wide(x, dtype)).tril(),), place.dtype,
        read=lambda found: (found.tril(),), before=total.zero_, flops=tokens * m * m, terms=(tokens,),
        eps={"addmm tf32": 2**-10, "minisp triton tf32": 2**-10, "minisp triton tf32x3": 2**-18},
    )  # fmt: skip


def cross(shape: Shape, place: Place) -> Case:
    """C += XᵀY: 2Tnd FLOPs. On a GPU the engine leaves 16-bit products to cuBLAS, "minisp torch" here."""
    n, d, tokens = shape["m"], shape["d"], shape["T"]
    x, y, total = place.randn(tokens, n), place.randn(tokens, d), torch.zeros(n, d, device=place.device)

    def update(impl: ops.Impl) -> Tensor:
        ops.cross_update_(total, x, y, impl=impl)
        return total

    return Case(
        place.ours(update, native=False) | _added_products(total, x, y),
        lambda dtype: (reference.cross(_wide(x, dtype), _wide(y, dtype)),), place.dtype,
        read=lambda found: (found,), before=total.zero_, flops=2 * tokens * n * d, terms=(tokens,),
        eps={"addmm tf32": 2**-10},
    )  # fmt: skip


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """At least in float32, as products are added."""
    return x.to(torch.promote_types(dtype, torch.float32))


def _added_products(total: Tensor, x: Tensor, y: Tensor) -> Contenders:
    """total += XᵀY as BLAS can: what most tools do first, float32 copies of 16-bit tensors."""

    def in_float32() -> Tensor:
        return total.addmm_(x.float().T, y.float())

    def in_tf32() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return in_float32()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    found: Contenders = {"addmm in float32": in_float32}
    if x.dtype != torch.float32 and (total.is_cuda or INTERPRETED):
        found["addmm to float32"] = lambda: torch.addmm(total, x.T, y, out_dtype=torch.float32, out=total)
    elif x.dtype == torch.float32 and total.is_cuda:
        found["addmm tf32"] = in_tf32
    return found


def mirror(shape: Shape, place: Place) -> Case:
    """The lower triangle of G copied onto the upper one: 4m² bytes, half of G read and half written."""
    matrix = torch.randn(shape["m"], shape["m"], device=place.device)
    mirrored = matrix.tril() + matrix.tril(-1).T
    contenders = place.ours(lambda impl: ops.mirror_(matrix, impl=impl), native=False)
    contenders["tril and its transpose"] = lambda: matrix.tril() + matrix.tril(-1).T
    return Case(
        contenders, lambda dtype: (mirrored.to(dtype),), torch.float32, read=lambda found: (found,),
        before=matrix.tril_, num_bytes=4 * shape["m"] ** 2,
    )  # fmt: skip


def saliency(shape: Shape, place: Place) -> Case:
    """The activation's backward with the three sums, in place: three tensors read and written."""
    sources = [place.randn(shape["T"], shape["m"]) for _ in range(3)]
    gate, up, grad = work = [source.clone() for source in sources]

    def backward(impl: ops.Impl) -> Results:
        x, sums = ops.activation_backward_(gate, up, grad, "silu", impl=impl)
        return x, gate, up, sums

    def exact(dtype: torch.dtype) -> Results:
        return reference.activation_backward(*(source.to(dtype) for source in sources), "silu")

    contenders = place.ours(backward)
    contenders |= {"autograd with a hook": lambda: autograd_saliency(*work), "op by op": lambda: eager_saliency(*work)}
    if place.runs_triton and shape["m"] in COMPILED:
        # As if it were the first: a second one would be compiled for all shapes, and count towards a limit.
        torch._dynamo.reset()
        backend = "eager" if INTERPRETED else "inductor"
        contenders["torch.compile"] = partial(torch.compile(eager_saliency, dynamic=False, backend=backend), *work)
    return Case(
        contenders, exact, place.dtype, before=lambda: _restore(work, sources), num_bytes=6 * gate.nbytes,
        terms=(1, 1, 1, shape["T"]),
        # Opponents sum products of an x that was rounded to this type.
        eps=dict.fromkeys([name for name in contenders if "minisp" not in name], torch.finfo(place.dtype).eps),
    )  # fmt: skip


def _restore(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def autograd_saliency(gate: Tensor, up: Tensor, grad: Tensor) -> Results:
    """What a user writes: the forward under autograd, a hook on x, the backward."""
    z, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
    sums = []

    def hook(g: Tensor) -> None:
        product = x.detach().float() * g.float()
        sums.append(torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)]))

    x = functional.silu(z) * u
    x.register_hook(hook)
    gradients = torch.autograd.grad(x, (z, u), grad)
    return x.detach(), *gradients, *sums


def eager_saliency(gate: Tensor, up: Tensor, grad: Tensor) -> Results:
    """What autograd and the hook compute, op by op."""
    value = gate * torch.sigmoid(gate)
    x = value * up
    product = x.float() * grad.float()
    sums = torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)])
    return x, torch.ops.aten.silu_backward(grad * up, gate), grad * value, sums


def activation(shape: Shape, place: Place) -> Case:
    """act(gate) ⊙ up: two tensors read, one written."""
    gate, up, out = (place.randn(shape["T"], shape["m"]) for _ in range(3))
    contenders = place.ours(lambda impl: ops.activation(gate, up, "silu", out=out, impl=impl), native=False)
    contenders["op by op"] = lambda: functional.silu(gate) * up
    return Case(
        contenders, lambda dtype: (reference.activation(gate.to(dtype), up.to(dtype), "silu"),), place.dtype,
        read=lambda found: (found,), num_bytes=3 * gate.nbytes,
    )  # fmt: skip


def cross_entropy(shape: Shape, place: Place) -> Case:
    """Loss and its gradient: logits read twice, the gradient written. For the loss the host waits."""
    logits = place.randn(shape["T"], shape["V"])
    targets = torch.randint(shape["V"], (shape["T"],), device=place.device)

    def by_autograd() -> Any:
        leaf = logits.detach().requires_grad_()
        loss = functional.cross_entropy(leaf.float(), targets, reduction="sum")
        return float(loss.detach()), *torch.autograd.grad(loss, leaf)

    contenders = place.ours(lambda impl: ops.cross_entropy_gradient(logits, targets, impl=impl))
    return Case(
        contenders | {"autograd": by_autograd},
        lambda dtype: reference.cross_entropy_gradient(logits.to(dtype), targets), place.dtype,
        read=lambda found: (torch.tensor(found[0], device=place.device), found[1]), num_bytes=3 * logits.nbytes,
        terms=(shape["V"], shape["V"]),
    )  # fmt: skip


def _both_ways(function: Callable[..., Any], leaves: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> Results:
    """What a function of the leaves and the rest gives, and the gradients of the leaves."""
    found = function(*leaves, *rest)
    outs = found if isinstance(found, tuple) else (found,)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)


def _differentiable(
    specified: Callable[..., Any], leaves: Sequence[Tensor], rest: Sequence[Tensor], num_outs: int
) -> tuple[list[Tensor], list[Tensor], Callable[[torch.dtype], Results]]:
    """Leaves that want gradients, gradients of the outputs, and the reference both ways in a dtype."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grads = [torch.randn_like(leaf) for leaf in leaves[:num_outs]]

    def exact(dtype: torch.dtype) -> Results:
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        return _both_ways(specified, own, [g.to(dtype) for g in grads], *(t.to(dtype) for t in rest))

    return leaves, grads, exact


def rms_norm(shape: Shape, place: Place) -> Case:
    """Both ways: x read, y written; x and the gradient read, one written."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    weight = place.randn(shape["d"])
    leaves, grads, exact = _differentiable(
        lambda x, w: reference.rms_norm(x, w, EPS), [place.randn(shape["T"], shape["d"])], [weight], 1
    )
    module = LlamaRMSNorm(shape["d"], eps=EPS).to(place.device, place.dtype).requires_grad_(False)
    module.weight.copy_(weight)
    own = (shape["d"],)
    contenders = place.ours(lambda impl: _both_ways(lambda x: ops.rms_norm(x, weight, EPS, impl=impl), leaves, grads))
    contenders["transformers"] = partial(_both_ways, module, leaves, grads)
    contenders["F.rms_norm"] = partial(_both_ways, functional.rms_norm, leaves, grads, own, weight, EPS)
    num_bytes = 5 * leaves[0].nbytes
    return Case(contenders, exact, place.dtype, num_bytes=num_bytes, terms=(shape["d"],) * 2)


def rotary(shape: Shape, place: Place) -> Case:
    """Both ways, queries and keys: everything read and written twice."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    batch, length, dim = shape["B"], shape["L"], shape["D"]
    angles = [place.randn(1, length, dim) for _ in range(2)]
    heads = [place.randn(batch, shape[name], length, dim) for name in ("H", "K")]
    leaves, grads, exact = _differentiable(reference.rotary, heads, angles, 2)
    contenders = place.ours(lambda impl: _both_ways(partial(ops.rotary, impl=impl), leaves, grads, *angles))
    contenders["transformers"] = partial(_both_ways, apply_rotary_pos_emb, leaves, grads, *angles)
    num_bytes = 4 * sum(leaf.nbytes for leaf in leaves)
    return Case(contenders, exact, place.dtype, num_bytes=num_bytes, terms=(4,) * 4)


def attention(shape: Shape, place: Place) -> Case:
    """Causal attention both ways: 2BHL²D FLOPs forward, 2.5 times as many backward; scores need no (L, L) matrix."""
    batch, length, dim = shape["B"], shape["L"], shape["D"]
    scale, group = dim**-0.5, shape["H"] // shape["K"]
    heads = [place.randn(batch, shape[name], length, dim) for name in ("H", "K", "K")]
    leaves, grads, exact = _differentiable(partial(reference.causal_attention, scale=scale), heads, [], 1)

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        wide = (side.repeat_interleave(group, 1) for side in (key, value))
        return functional.scaled_dot_product_attention(query, *wide, is_causal=True, scale=scale)

    def ours(impl: ops.Impl) -> Results:
        return _both_ways(partial(ops.causal_attention, scale=scale, impl=impl), leaves, grads)

    contenders = place.ours(ours, triton=False) | {"keys repeated": partial(_both_ways, repeated, leaves, grads)}
    flops = 7 * batch * shape["H"] * length**2 * dim
    return Case(contenders, exact, place.dtype, flops=flops, terms=(length,) * 4)


def ridge_solve(shape: Shape, place: Place) -> Case:
    """The refit of n of m units, d right-hand sides, in float32: 2(m − n)nd + n³/3 + 2n²d FLOPs. See ridge.py."""
    n, m, d = shape["n"], shape["m"], shape["d"]
    single = Place(place.device, torch.float32)
    x, weight = single.randn(2 * m, m), single.randn(d, m)
    matrix, kept = x.T @ x, torch.randperm(m, device=place.device)[:n].sort().values

    def by_linalg() -> Tensor:
        """As a competent user writes it: the system and its right-hand sides gathered, one symmetric solve."""
        rows = matrix[kept]
        system, shift = rows[:, kept], DAMPING * matrix.diagonal().mean()
        right = rows @ weight.T + shift * weight[:, kept].T
        system.diagonal().add_(shift)
        return torch.cholesky_solve(right, torch.linalg.cholesky(system)).T

    def ours(impl: ops.Impl) -> Tensor:
        return ops.ridge_solve(matrix, kept, weight, DAMPING, impl=impl).down

    # The native solver has code for GPUs too.
    contenders = {"minisp native": partial(ours, "native"), "minisp torch": partial(ours, "torch")}
    return Case(
        contenders | {"torch.linalg": by_linalg},
        lambda dtype: (reference.ridge_solve(matrix.to(dtype), kept, weight.to(dtype), DAMPING),), torch.float32,
        read=lambda found: (found,), flops=2 * (m - n) * n * d + n**3 / 3 + 2 * n * n * d, terms=(m,),
    )  # fmt: skip
