"""The specification: every operation of the engine in plain torch, in whatever dtype is passed (float64 in tests).

Nothing in the optimised code imports this module; the tests compare every implementation with it.

Shapes: T tokens, m units (width), n kept units, d hidden size. X (T, m) activations, G = XᵀX (m, m) Gram matrix,
W (d, m) the down projection, S the kept units, P the removed ones.
"""

import torch
from torch import Tensor


def activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """x = act(gate) ⊙ up (T, m), or x = act(gate) where there is no `up` (a plain MLP).

    `kind`: "silu" z·σ(z) · "gelu" z·Φ(z) · "gelu_tanh" the tanh approximation of it (Hendrycks & Gimpel, 2016) ·
    "relu" max(z, 0) · "relu2" max(z, 0)² (So et al., 2021, "Primer").
    """
    z = gate
    if kind == "silu":
        value = z * torch.sigmoid(z)
    elif kind == "gelu":
        value = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    elif kind == "gelu_tanh":
        value = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    elif kind == "relu":
        value = z.clamp_min(0)
    elif kind == "relu2":
        value = z.clamp_min(0) ** 2
    else:
        raise ValueError(f"unknown activation {kind!r}")
    return value if up is None else value * up


def activation_backward(
    gate: Tensor, up: Tensor | None, grad_x: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of `activation` and the saliency sums of one pass over the tokens.

    Args:
        gate, up: (T, m) pre-activations, `up` None for a plain MLP.
        grad_x: (T, m) g = ∂L/∂x.
        kind: see `activation`.

    Returns:
        x (T, m), ∂L/∂gate (T, m), ∂L/∂up (T, m) or None, and sums (3, m): Σ_t|p|, Σ_t p², Σ_t p for p = x ⊙ g.
    """
    inputs = [t.detach().clone().requires_grad_() for t in (gate, up) if t is not None]
    x = activation(inputs[0], inputs[1] if up is not None else None, kind)
    grads = torch.autograd.grad(x, inputs, grad_x)
    product = x.detach() * grad_x
    sums = torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)])
    return x.detach(), grads[0], grads[1] if up is not None else None, sums


def saliency_sums(x: Tensor, grad: Tensor, columns: int = 1) -> Tensor:
    """Σ_t |p|, Σ_t p², Σ_t p (3, u) for units of c columns each: p_tj = Σ_i x_ti g_ti over the columns i of unit j.

    First-order Taylor: without unit j, whose columns are then zero, the loss of token t changes by about −p_tj.

    Args:
        x: (T, u·c) activations.
        grad: g = ∂L/∂x (T, u·c).
        columns: c.
    """
    product = (x * grad).unflatten(1, (-1, columns)).sum(2)
    return torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)])


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ) V, each token seeing itself and those before it (Vaswani et al., 2017).

    query (B, H, L, D), key and value (B, H_kv, L, D); H/H_kv consecutive query heads share a key head (Ainslie et al.,
    2023). Returns (B, H, L, D).
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ value


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """y = x r ⊙ (offset + w), r = (mean x² + ε)^(−1/2) over the last axis (Zhang & Sennrich, 2019).

    hidden (…, d), weight (d,); an offset of 1 is for weights that are stored as their difference from 1. Gradient,
    with h = ∂L/∂y ⊙ (offset + w):  ∂L/∂x = r (h − x r² mean(h ⊙ x)), for ∂r/∂x = −r³ x / d.
    """
    rms = (hidden.square().mean(-1, keepdim=True) + eps).rsqrt()
    return hidden * rms * (offset + weight)


def rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their position (Su et al., 2021), halves of a head being the two coordinates.

    query (B, H, L, D), key (B, H_kv, L, D), D even; cosine and sine (B or 1, L, D). For the halves (a, b) of a head:
    (a c_a − b s_a, b c_b + a s_b). Where both halves have the same angles, this is a rotation, and the gradient is
    turned by the negative angles; in general it is the transpose, (a c_a + b s_b, b c_b − a s_a).
    """

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cosine[:, None] + torch.cat((-b, a), -1) * sine[:, None]

    return turned(query), turned(key)


def gram(x: Tensor) -> Tensor:
    """G = XᵀX (m, m): an uncentred sum over tokens, not a covariance."""
    return cross(x, x)


def cross(x: Tensor, y: Tensor) -> Tensor:
    """C = XᵀY (m, d) for X (T, m) and Y (T, d)."""
    return x.T @ y


def ridge_solve(gram: Tensor, kept: Tensor, weight: Tensor, damping: float, *, to_zero: bool = False) -> Tensor:
    """The refitted columns W' (d, n) of the kept units.

    W' = argmin ‖X_S W'ᵀ − X Wᵀ‖² + μ‖W' − W₀‖², μ = damping · mean(diag G), W₀ = W_S (or 0 with `to_zero`).
    Setting the gradient to zero gives (G_SS + μI) W'ᵀ = G_S: Wᵀ + μ W₀ᵀ. A unit whose activation is always zero
    leaves a zero row and column in G; where μ = 0 the minimum-norm change is taken (pseudo-inverse).
    """
    cross = gram[kept] @ weight.T
    system = gram[kept][:, kept].clone()
    shift = damping * gram.diagonal().mean()
    system.diagonal().add_(shift)
    origin = torch.zeros_like(weight[:, kept]) if to_zero else weight[:, kept]
    delta: Tensor = torch.linalg.pinv(system, hermitian=True) @ (cross + shift * origin.T - system @ origin.T)
    return origin + delta.T


def residual(gram: Tensor, kept: Tensor, weight: Tensor, new_weight: Tensor) -> Tensor:
    """‖X Wᵀ − X_S W'ᵀ‖_F / ‖X Wᵀ‖_F from the Gram matrix: with E = W − scatter(W'), ‖X Eᵀ‖² = tr(E G Eᵀ)."""
    error = weight.clone()
    error[:, kept] -= new_weight
    total = ((weight @ gram) * weight).sum()
    ratio: Tensor = ((error @ gram) * error).sum() / total if total > 0 else torch.zeros_like(total)
    return ratio.sqrt()


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Σ −log softmax(logits)[target] over all tokens, and its gradient softmax(logits) − onehot(targets).

    logits (..., V), targets (...) int64; the loss is a scalar, the gradient has the shape of the logits.
    """
    log_probability = torch.log_softmax(logits, -1)
    onehot = torch.nn.functional.one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return -(log_probability * onehot).sum(), log_probability.exp() - onehot
