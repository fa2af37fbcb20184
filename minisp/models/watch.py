"""A layer's MLP, watched: the engine's own forward and backward in place of the model's, with statistics on the way.

With W_gate, W_up (m, d), W_down (d, m):  gate = h W_gateᵀ, up = h W_upᵀ, x = act(gate) ⊙ up, y = x W_downᵀ.
Backward from ∂L/∂y: g = ∂L/∂y W_down is the gradient of the activation x, so saliency needs no other pass; then
∂L/∂h = ∂L/∂gate W_gate + ∂L/∂up W_up. Weights are frozen: their gradients are never formed, and h is not kept.
x is recomputed from gate and up in the same pass that makes their gradients, in place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minisp import ops
from minisp.models.families import Architecture, MlpWeights, mlp_weights


class Watcher(Protocol):
    """Whoever is told what passes: x (T, m), and the saliency sums (3, m) of the same tokens after a backward."""

    def update_(self, x: Tensor, sums: Tensor | None) -> None: ...


@dataclass(frozen=True)
class WatchedMlp:
    """What one watched MLP needs: its weights, its activation kind, who is told, and whether its output is wanted."""

    weights: MlpWeights
    kind: str
    statistics: Watcher
    contributes: bool = True

    def forward(self, hidden: Tensor) -> Tensor:
        """y (…, d) for h (…, d). With gradients on, the statistics are fed by the backward; without, by this call."""
        if torch.is_grad_enabled():
            leaving: Tensor = _WatchedFunction.apply(hidden, self)
            return leaving
        flat = hidden.reshape(-1, hidden.shape[-1])
        gate, up = self.project(flat)
        # Nothing else needs the gate: x takes its place.
        x = ops.activation(gate, up, self.kind, out=gate)
        self.statistics.update_(x, None)
        if not self.contributes:
            return hidden.new_zeros(()).expand_as(hidden)
        return functional.linear(x, self.weights.down, self.weights.down_bias).view_as(hidden)

    def project(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """The pre-activations (T, m): gate and up, or, for a plain MLP, what the activation acts on and None."""
        weights = self.weights
        up = functional.linear(flat, weights.up, weights.up_bias)
        if weights.gate is None:
            return up, None
        return functional.linear(flat, weights.gate, weights.gate_bias), up


class _WatchedFunction(torch.autograd.Function):
    """See the module's docstring for the formulas."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mlp: WatchedMlp) -> Tensor:
        gate, up = mlp.project(hidden.reshape(-1, hidden.shape[-1]))
        ctx.mlp, ctx.gate, ctx.up = mlp, gate, up
        x = ops.activation(gate, up, mlp.kind)
        return functional.linear(x, mlp.weights.down, mlp.weights.down_bias).view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_y,) = grad_outputs
        mlp, gate, up = ctx.mlp, ctx.gate, ctx.up
        ctx.gate = ctx.up = None
        grad_x = grad_y.reshape(-1, grad_y.shape[-1]) @ mlp.weights.down
        x, sums = ops.activation_backward_(gate, up, grad_x, mlp.kind)
        mlp.statistics.update_(x, sums)
        grad_hidden = gate @ (mlp.weights.up if up is None else mlp.weights.gate)
        if up is not None:
            grad_hidden = torch.addmm(grad_hidden, up, mlp.weights.up)
        return grad_hidden.view_as(grad_y), None


@contextmanager
def watch(
    layer: nn.Module, row: Architecture, kind: str, statistics: Watcher, *, contributes: bool = True
) -> Iterator[None]:
    """Within the block, the layer's MLP feeds `statistics`; its parameters must be frozen.

    Args:
        contributes: whether the MLP's output is formed; else, without gradients, it is zero.
    """
    watched = WatchedMlp(mlp_weights(layer, row), kind, statistics, contributes)
    if row.mlp is not None:
        replaced: dict[nn.Module, Callable[[Tensor], Tensor]] = {layer.get_submodule(row.mlp): watched.forward}
    else:
        # The layer itself calls up, activation and down in turn: the first does it all, the others pass through.
        assert row.inline_activation is not None
        replaced = {
            layer.get_submodule(row.up): watched.forward,
            layer.get_submodule(row.inline_activation): nn.Identity().forward,
            layer.get_submodule(row.down): nn.Identity().forward,
        }
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
