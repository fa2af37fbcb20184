"""The seam: one function per mathematical operation; `impl` says who computes it.

`minisp.ops.reference` is the specification of each operation and holds the formulas. Implementations: "torch", plain
tensor code tuned for its memory traffic, on every device; "native", the C++ kernels of `minisp._C`, on CPUs; "triton",
the kernels of `minisp.kernels`, on GPUs. "auto" takes the best that serves the tensors. A name given explicitly is
obeyed or refused, never replaced.

Shapes: T tokens, m units, n kept units, d hidden size, V vocabulary; B windows of L tokens, H heads of D dimensions.
"""

import torch
from torch import Tensor

from minisp.ops import native, native_cholesky, native_norms, norms, portable
from minisp.ops.backend import Impl, choose, input_precision, serves_triton
from minisp.ops.ridge import RidgeSolution, output_energy, ridge_solve

__all__ = [
    "Impl",
    "RidgeSolution",
    "activation",
    "activation_backward_",
    "causal_attention",
    "cross_entropy_gradient",
    "cross_update_",
    "gram_update_",
    "implementations",
    "mirror_",
    "output_energy",
    "ridge_solve",
    "rms_norm",
    "rotary",
    "saliency_sums",
]


def implementations(device: torch.device, dtype: torch.dtype, kind: str | None) -> dict[str, Impl]:
    """Who serves each operation of the engine on a device, for a dtype and an activation kind: "auto", answered.

    A model whose activation the engine has no kind for (None) computes it itself.

    Asked of the same tests that the operations ask, with a tensor of one element there.
    """
    x = torch.empty(1, 1, dtype=dtype, device=device)
    heads, halves = x.view(1, 1, 1, 1), torch.empty(1, 1, 1, 2, dtype=dtype, device=device)
    on_triton = serves_triton(x)
    able = {
        "activation": {"triton": on_triton},
        "activation_backward_": {"triton": on_triton, "native": native.serves(x, kind=kind)},
        "causal_attention": {"native": native.serves_attention(heads, heads, heads)},
        "cross_entropy_gradient": {"triton": on_triton, "native": native.serves(x)},
        "cross_update_": {"triton": on_triton and not portable.sums_in_float32(x)},
        "gram_update_": {"triton": on_triton, "native": native.serves_gram(x)},
        "rms_norm": {"triton": on_triton, "native": native_norms.serves_norm(x, x[0])},
        "rotary": {"triton": on_triton, "native": native_norms.serves_rotary(halves, halves, halves[0], halves[0])},
        "ridge_solve": {"native": native_cholesky.serves_cholesky(x.device, torch.float32)},
    }
    return {name: choose(name, "auto", **who) for name, who in able.items()}


def activation(gate: Tensor, up: Tensor | None, kind: str, *, out: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """x = act(gate) ⊙ up, or act(gate): (T, m) in the dtype of `gate`; see `reference.activation`.

    Args:
        gate, up: (T, m) pre-activations; `up` None for a plain MLP. No gradients flow.
        out: where x goes, contiguous (T, m) or `gate` itself; None makes a new tensor.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    out = torch.empty_like(gate) if out is None else out
    if choose("activation", impl, triton=serves_triton(gate, up, out)) == "triton":
        from minisp.kernels import saliency as kernel

        return kernel.activation(gate, up, kind, out=out)
    return portable.activation(gate, up, kind, out)


def activation_backward_(
    gate: Tensor, up: Tensor | None, grad_x: Tensor, kind: str, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """In place: `gate` becomes ∂L/∂gate, `up` becomes ∂L/∂up; see `reference.activation_backward`.

    Arithmetic is float32 whatever the storage, one rounding at the end. `grad_x` (T, m) is overwritten with x.

    Returns:
        x (T, m), stored in `grad_x`, and sums (3, m) float32: Σ|p|, Σp², Σp over the tokens, p = x ⊙ grad_x.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    is_native, is_triton = native.serves(gate, up, grad_x, kind=kind), serves_triton(gate, up, grad_x)
    chosen = choose("activation_backward_", impl, native=is_native, triton=is_triton)
    if chosen == "native":
        return grad_x, native.activation_backward_(gate, up, grad_x, kind)
    if chosen == "triton":
        from minisp.kernels import saliency as kernel

        return grad_x, kernel.activation_backward_(gate, up, grad_x, kind)
    return grad_x, portable.activation_backward_(gate, up, grad_x, kind)


def saliency_sums(x: Tensor, grad: Tensor, columns: int = 1, *, impl: Impl = "auto") -> Tensor:
    """The saliency sums (3, u) float32 of units of `columns` columns each; see `reference.saliency_sums`.

    Args:
        x, grad: (T, u·c) activations, and the gradient of the loss there, in any floating dtype.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    choose("saliency_sums", impl)
    return portable.saliency_sums(x, grad, columns)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, *, impl: Impl = "auto") -> Tensor:
    """softmax(scale · Q Kᵀ) V over the tokens so far, differentiable; see `reference.causal_attention`.

    Args:
        query: (B, H, L, D); key, value: (B, H_kv, L, D), H a multiple of H_kv.

    Returns:
        (B, H, L, D) in the dtype of `query`. On a CPU, a query that is not finite spoils its own row alone, and a key
        or value that is not finite the rows from its token on: never an earlier token, nor a head that does not read
        it.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    if choose("causal_attention", impl, native=native.serves_attention(query, key, value)) == "native":
        return native.causal_attention(query, key, value, scale)
    return portable.causal_attention(query, key, value, scale)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, impl: Impl = "auto") -> Tensor:
    """hidden / rms(hidden) ⊙ (offset + weight), differentiable in `hidden` alone; see `reference.rms_norm`.

    Arithmetic is float32 whatever the storage, with one rounding at the end. For the backward, `hidden` and one float32
    a row are kept.

    Args:
        hidden: (..., d).
        weight: (d,) in the dtype of `hidden`. It must be frozen: no gradient reaches it.
        eps: added to the mean square.
        offset: 1 where the weight is stored as its difference from 1.

    Returns:
        Shape and dtype of `hidden`.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    on_triton = serves_triton(hidden, weight, any_strides=True) and hidden.shape[-1] <= norms.WIDEST_ON_TRITON
    chosen = choose("rms_norm", impl, native=native_norms.serves_norm(hidden, weight), triton=on_triton)
    if chosen == "native":
        return norms.rms_norm(hidden, weight, eps, offset, native_norms)
    if chosen == "triton":
        from minisp.kernels import norm as kernel

        return norms.rms_norm(hidden, weight, eps, offset, kernel)
    return norms.rms_norm(hidden, weight, eps, offset, portable)


def rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions, differentiable in both; see `reference.rotary`.

    Arithmetic is float32 whatever the storage, with one rounding at the end; cosine and sine alone are kept for the
    backward. The results are new tensors with the strides of the arguments: autograd would copy what is rotated in
    place through a view, and a read and a write of every element are needed either way.

    Args:
        query: (B, H, L, D), D even.
        key: (B, H_kv, L, D).
        cosine, sine: (B or 1, L, D), without gradients. All four of one dtype.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    is_native = native_norms.serves_rotary(query, key, cosine, sine)
    on_triton = serves_triton(query, key, cosine, sine, any_strides=True)
    chosen = choose("rotary", impl, native=is_native, triton=on_triton)
    if chosen == "native":
        return norms.rotary(query, key, cosine, sine, native_norms)
    if chosen == "triton":
        from minisp.kernels import rotary as kernel

        return norms.rotary(query, key, cosine, sine, kernel)
    return norms.rotary(query, key, cosine, sine, portable)


def gram_update_(gram: Tensor, x: Tensor, *, impl: Impl = "auto") -> None:
    """G += XᵀX on and below the diagonal tiles; `mirror_` completes the matrix once, at the end.

    Args:
        gram: (m, m) float32, contiguous. Above the diagonal its content is unspecified until `mirror_`.
        x: (T, m) bfloat16, float16 or float32. Products of 16-bit inputs are exact in float32, sums are float32. On a
            GPU, `torch.set_float32_matmul_precision` decides how float32 inputs are multiplied.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    chosen = choose("gram_update_", impl, native=native.serves_gram(x), triton=serves_triton(x, any_strides=True))
    if chosen == "triton":
        from minisp.kernels import gram as kernel

        kernel.gram_update_(gram, x, input_precision=input_precision(x.dtype))
        return
    if chosen == "native":
        native.gram_update_(gram, x)
        return
    portable.gram_update_(gram, x)


def cross_update_(cross: Tensor, x: Tensor, y: Tensor, *, impl: Impl = "auto") -> None:
    """C += XᵀY, what a target from another stream needs beside G.

    Args:
        cross: (m, d) float32, contiguous.
        x, y: (T, m) and (T, d) of one dtype: bfloat16, float16 or float32.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    on_triton = serves_triton(x, y, any_strides=True)
    # "auto" leaves 16-bit products on a GPU to its BLAS: see `portable.sums_in_float32`.
    is_better = impl == "triton" or not portable.sums_in_float32(x)
    if choose("cross_update_", impl, triton=on_triton and is_better) == "triton":
        from minisp.kernels import cross as kernel

        kernel.cross_update_(cross, x, y, input_precision=input_precision(x.dtype))
        return
    portable.cross_update_(cross, x, y)


def mirror_(gram: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Copy the lower triangle of `gram` (m, m) onto the upper one, in place; returns `gram`."""
    if choose("mirror_", impl, triton=gram.dtype == torch.float32 and serves_triton(gram)) == "triton":
        from minisp.kernels import gram as kernel

        return kernel.mirror_(gram)
    return portable.mirror_(gram)


def cross_entropy_gradient(logits: Tensor, targets: Tensor, *, impl: Impl = "auto") -> tuple[float, Tensor]:
    """Summed negative log likelihood (nats) and its gradient; see `reference.cross_entropy_gradient`.

    Rows go through float32 a few at a time: beside the result, no copy of the logits exists.

    Args:
        logits: (..., V) in any floating dtype.
        targets: (...) int64.

    Returns:
        The loss, and softmax(logits) − onehot(targets) in the shape and dtype of `logits`.

    Raises:
        BackendError: `impl` cannot serve these tensors.
    """
    rows, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
    chosen = choose("cross_entropy_gradient", impl, native=native.serves(rows), triton=serves_triton(rows))
    if chosen == "native":
        loss, gradient = native.cross_entropy_gradient(rows, wanted)
        return loss, gradient.view_as(logits)
    if chosen == "triton":
        from minisp.kernels import cross_entropy as kernel

        losses, gradient = kernel.cross_entropy_gradient(rows, wanted.flatten())
        return float(losses.sum(dtype=torch.float64)), gradient.view_as(logits)
    loss, gradient = portable.cross_entropy_gradient(rows, wanted)
    return loss, gradient.view_as(logits)
