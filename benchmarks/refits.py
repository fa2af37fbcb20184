"""Refits beyond the down projections of a cut model, in place; `ablation.py` measures them.

For Llama-shaped models in memory. Shapes: B windows of L tokens, T = B·L, d hidden size, n kept units.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from minisp import ops
from minisp.models.families import activation_kind, mlp_weights
from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.ops.ridge import ridge_fit

ATTENTION, MLP = "self_attn.o_proj", "mlp.down_proj"
"""The two projections of a layer onto the hidden states."""


@torch.no_grad()
def correct_drift_(dense: Any, cut: Any, windows: Tensor, names: Sequence[str], damping: float) -> None:
    """Let projections take over what they can of the drift that the layers below them have left.

    Layer by layer, and there for each of `names` in turn: with Z (T, ·) its input in the cut model and E (T, d) the
    drift of the hidden states behind it, its weight gains Δ = EᵀZ (ZᵀZ + μI)⁻¹, see `reconstruction.correct`.

    Args:
        dense, cut: the model before and after.
        windows: (N, L) int64.
        names: of ATTENTION and MLP.
        damping: μ relative to the mean diagonal of ZᵀZ.
    """
    streams = Stream.from_module(dense), Stream.from_module(cut)
    batches = windows.split(1)
    # Both models with the same attention, whose rounding would else count as drift.
    with fast_layers(dense), fast_layers(cut):
        wanted, states = ([stream.embed(ids) for ids in batches] for stream in streams)
        for index, layer in enumerate(streams[1].layers):
            targets = [_pass(streams[0], index, *pair) for pair in zip(wanted, batches, strict=True)]
            for name in names:
                weight = layer.get_submodule(name).weight
                passes = (_pass(streams[1], index, *pair)[name] for pair in zip(states, batches, strict=True))
                drifts = (
                    (x, (target[name][1] - behind).flatten(0, 1))
                    for (x, behind), target in zip(passes, targets, strict=True)
                )
                _take_over_(weight, drifts, damping)
            wanted = [target[MLP][1] for target in targets]
            states = [_pass(streams[1], index, *pair)[MLP][1] for pair in zip(states, batches, strict=True)]


def _take_over_(weight: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], damping: float) -> None:
    """Add to a weight (d, n) the ridge regression of e (T, d) on its inputs x (T, n), for pairs of them."""
    d, n = weight.shape
    gram, cross = torch.zeros(n, n), torch.zeros(n, d)
    for x, e in pairs:
        ops.gram_update_(gram, x)
        ops.cross_update_(cross, x, e)
    weight += ridge_fit(ops.mirror_(gram), cross.T.contiguous(), damping).to(weight)


def _pass(stream: Stream, index: int, hidden: Tensor, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of both projections of a layer that is run: the input (T, ·), and the hidden states (B, L, d) behind it."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, inputs: tuple[Tensor, ...], leaving: Tensor) -> None:
        seen[name] = inputs[0].flatten(0, 1), leaving

    handles = [
        stream.layers[index].get_submodule(name).register_forward_hook(lambda _, x, y, name=name: note(name, x, y))
        for name in (ATTENTION, MLP)
    ]
    leaving = stream.run_layer(index, hidden, stream.calls(ids))
    for handle in handles:
        handle.remove()
    x, attended = seen[ATTENTION]
    return {ATTENTION: (x, hidden + attended), MLP: (seen[MLP][0], leaving)}


Pairs = Sequence[tuple[Tensor, Tensor]]
"""Inputs h (T, d) of a dense MLP, and its outputs y (T, d)."""


@torch.no_grad()
def refit_inside_(dense: Any, cut: Any, windows: Tensor, damping: float) -> None:
    """One Gauss–Newton step on gate and up projections of every cut layer towards the dense layer's output.

    The down projection is refitted after it, to the same target, from the weights that it has.

    Args:
        dense, cut: the model before and after.
        windows: (N, L) int64.
        damping: of all systems, relative to their mean diagonals.
    """
    stream, row = Stream.from_module(dense), Stream.from_module(cut).row
    kind = activation_kind(dense.config, row)
    batches = windows.split(1)
    states = [stream.embed(ids) for ids in batches]
    for index, (whole, layer) in enumerate(zip(stream.layers, Stream.from_module(cut).layers, strict=True)):
        pairs: list[tuple[Tensor, Tensor]] = []
        handle = whole.mlp.register_forward_hook(
            lambda _, x, y, pairs=pairs: pairs.append((x[0].flatten(0, 1), y.flatten(0, 1)))
        )
        with fast_layers(dense):
            states = [stream.run_layer(index, h, stream.calls(ids)) for h, ids in zip(states, batches, strict=True)]
        handle.remove()
        weights = mlp_weights(layer, row)
        assert weights.gate is not None
        n = len(weights.up)
        if n < len(mlp_weights(whole, row).up):
            step, length = gauss_newton(weights.gate, weights.up, weights.down, kind, pairs, damping)
            weights.gate.add_((length * step[:n]).to(weights.gate))
            weights.up.add_((length * step[n:]).to(weights.up))
            inputs = (ops.activation(h @ weights.gate.T, h @ weights.up.T, kind) for h, _ in pairs)
            missing = ((x, y - x @ weights.down.T) for x, (_, y) in zip(inputs, pairs, strict=True))
            _take_over_(weights.down, missing, damping)


def gauss_newton(
    gate: Tensor, up: Tensor, down: Tensor, kind: str, pairs: Pairs, damping: float
) -> tuple[Tensor, float]:
    """Step (2n, d) for gate and up, and its best length on the linear model of the layer.

    With r = y − W_d x the residual, s = act'(g)⊙u and a = act(g) the slopes of x, Z = [s a] (T, 2n), the Jacobian of
    x W_dᵀ towards row j of [W_g; W_u] is W_d[:, j] z_tj h_tᵀ. Its normal equations, (JᵀJ) δ = Jᵀr, are taken for a
    Kronecker product as Martens & Grosse do, 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature": JᵀJ ≈ B ⊗ A / T, A = HᵀH, B = [W_dᵀW_d ×4] ⊙ ZᵀZ, thus δ = T (B + μI)⁻¹ C (A + νI)⁻¹ with
    C_j = Σ_t (r_t W_d)_j z_tj h_t.

    Args:
        gate, up: (n, d); down: (d, n).
        damping: of A and B, relative to their mean diagonals.
    """
    n, d = gate.shape
    inner, outer, cross = torch.zeros(d, d), torch.zeros(2 * n, 2 * n), torch.zeros(2 * n, d)
    for h, y in pairs:
        x, z = _slopes(h @ gate.T, h @ up.T, kind)
        pulled = (y - x @ down.T) @ down
        ops.gram_update_(inner, h)
        ops.gram_update_(outer, z)
        ops.cross_update_(cross, pulled.repeat(1, 2) * z, h)
    curvature = ops.mirror_(outer) * (down.T.float() @ down.float()).repeat(2, 2)
    tokens = sum(len(h) for h, _ in pairs)
    left = ridge_fit(curvature, cross.T.contiguous(), damping)
    step = tokens * ridge_fit(ops.mirror_(inner), left.T.contiguous(), damping)
    return step, _best_length(step, _moves(step, gate, up, down, kind, pairs))


def _best_length(step: Tensor, moves: Iterable[tuple[Tensor, Tensor]]) -> float:
    """argmin_α Σ‖r − αΔy‖², for the residuals and first-order moves of every micro-batch."""
    along = across = 0.0
    for residual, move in moves:
        along += float((residual.double() * move).sum())
        across += float(move.double().square().sum())
    return along / across if across > 0 else 0.0


def _moves(
    step: Tensor, gate: Tensor, up: Tensor, down: Tensor, kind: str, pairs: Pairs
) -> Iterable[tuple[Tensor, Tensor]]:
    for h, y in pairs:
        x, z = _slopes(h @ gate.T, h @ up.T, kind)
        moved = (h @ step.T.to(h)) * z
        yield y - x @ down.T, (moved[:, : len(gate)] + moved[:, len(gate) :]) @ down.T


def _slopes(gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x (T, n), and its slopes [∂x/∂gate, ∂x/∂up] (T, 2n)."""
    x, _ = ops.activation_backward_(gate, up, torch.ones_like(gate), kind)
    return x, torch.cat([gate, up], 1)
