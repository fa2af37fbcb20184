"""A structure's consumer, watched: what enters it, and the gradient there, without storing either for long.

The generic tap is any linear map y = x Wᵀ + b. Its forward keeps x; its backward has g = ∂L/∂y W, which is the gradient
of x, and so both sides of the product p = x ⊙ g. An MLP whose activation the engine knows goes a faster way: with
W_gate, W_up (m, d) and W_down (d, m),

    gate = h W_gateᵀ,  up = h W_upᵀ,  x = act(gate) ⊙ up,  y = x W_downᵀ,  ∂L/∂h = ∂L/∂gate W_gate + ∂L/∂up W_up.

Its backward makes x again from gate and up in the pass that makes their gradients, in place: neither x nor h is kept.
Weights are frozen in both: their gradients are never formed.

Shapes: T tokens, d hidden size, m units of an MLP, u units of c columns, R outputs of a linear map.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minisp import ops
from minisp.models.families import Mlp, activation_kind, family_of
from minisp.models.structures import MlpWeights, Structure, mlp_weights, weight_view


class Watcher(Protocol):
    """Whoever is told what passes.

    That is x (T, u·c), and after a backward the saliency sums (3, u) of the same tokens and the gradients (T, d) at the
    consumer's output.
    """

    def update_(self, x: Tensor, sums: Tensor | None, grad_y: Tensor | None = None) -> None: ...


@contextmanager
def watch(
    layer: nn.Module,
    structure: Structure,
    config: Any,
    watcher: Watcher,
    *,
    contributes: bool = True,
    fused: bool = True,
) -> Iterator[None]:
    """Within the block, what enters a structure's consumer is told to `watcher`; the parameters must be frozen.

    With gradients on, the backward tells it, with saliency sums; without, the forward does.

    Args:
        config: of the model, which says which activation its MLPs have.
        contributes: whether the consumer's output is formed; else, without gradients, it is zero, its bias included.
        fused: let an MLP go the faster way where it can.
    """
    mlp = family_of(config).mlp
    kind = activation_kind(config, family_of(config))
    if structure.name == "mlp" and fused and kind is not None:
        replaced = _mlp_forwards(layer, mlp, WatchedMlp(mlp_weights(layer, mlp), kind, watcher, contributes))
    else:
        module = layer.get_submodule(structure.consumer)
        replaced = {module: WatchedLinear(module, structure.columns, watcher, contributes).forward}
    with replaced_forwards(replaced):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the block, modules have other forwards."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _mlp_forwards(layer: nn.Module, mlp: Mlp, watched: "WatchedMlp") -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    if mlp.module is not None:
        return {layer.get_submodule(mlp.module): watched.forward}
    # The layer itself calls up, activation and down in turn: the first does it all, the others pass through.
    assert mlp.inline_activation is not None
    return {
        layer.get_submodule(mlp.up.module): watched.forward,
        layer.get_submodule(mlp.inline_activation): nn.Identity().forward,
        layer.get_submodule(mlp.down): nn.Identity().forward,
    }


@dataclass(frozen=True)
class WatchedLinear:
    """A watched linear map: the module, the columns c of a unit, who is told, and whether its output is wanted."""

    module: nn.Module
    columns: int
    watcher: Watcher
    contributes: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """y (…, R) for x (…, u·c)."""
        if torch.is_grad_enabled():
            leaving: Tensor = _LinearFunction.apply(x, self)
            return leaving
        self.watcher.update_(x.reshape(-1, x.shape[-1]), None)
        if not self.contributes:
            return x.new_zeros(()).expand(*x.shape[:-1], len(weight_view(self.module)))
        return product(self.module, x)

    def passed(self, x: Tensor, grad_y: Tensor, grad_x: Tensor) -> None:
        """Told of x and its gradient (T, u·c), and of the gradient (T, R) at the output."""
        self.watcher.update_(x, ops.saliency_sums(x, grad_x, self.columns), grad_y)


@dataclass(frozen=True)
class TappedLinear:
    """A linear map both of whose sides are told: x (T, C), and ∂L/∂y (T, R), or None in a forward without gradients."""

    module: nn.Module
    told: Callable[[Tensor, Tensor | None], None]

    def forward(self, x: Tensor) -> Tensor:
        """y (…, R) for x (…, C)."""
        if torch.is_grad_enabled():
            leaving: Tensor = _LinearFunction.apply(x, self)
            return leaving
        self.told(x.reshape(-1, x.shape[-1]), None)
        return product(self.module, x)

    def passed(self, x: Tensor, grad_y: Tensor, grad_x: Tensor) -> None:
        """As `WatchedLinear.passed`."""
        self.told(x, grad_y)


def product(module: nn.Module, x: Tensor) -> Tensor:
    """x Wᵀ + b of a linear map."""
    return functional.linear(x, weight_view(module), getattr(module, "bias", None))


class _LinearFunction(torch.autograd.Function):
    """See the module's docstring for the formulas."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: WatchedLinear | TappedLinear) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(x)
        return product(linear.module, x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_y,), (x,) = grad_outputs, ctx.saved_tensors
        linear: WatchedLinear | TappedLinear = ctx.linear
        grad_x = grad_y @ weight_view(linear.module)
        linear.passed(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, grad_y, grad_x)))
        return grad_x, None


@dataclass(frozen=True)
class WatchedMlp:
    """A watched MLP: its weights, its activation kind, who is told, and whether its output is wanted."""

    weights: MlpWeights
    kind: str
    watcher: Watcher
    contributes: bool = True

    def forward(self, hidden: Tensor) -> Tensor:
        """y (…, d) for h (…, d)."""
        if torch.is_grad_enabled():
            leaving: Tensor = _MlpFunction.apply(hidden, self)
            return leaving
        flat = hidden.reshape(-1, hidden.shape[-1])
        gate, up = self.project(flat)
        # Nothing else needs the gate: x takes its place.
        x = ops.activation(gate, up, self.kind, out=gate)
        self.watcher.update_(x, None)
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


class _MlpFunction(torch.autograd.Function):
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
        flat = grad_y.reshape(-1, grad_y.shape[-1])
        x, sums = ops.activation_backward_(gate, up, flat @ mlp.weights.down, mlp.kind)
        mlp.watcher.update_(x, sums, flat)
        grad_hidden = gate @ (mlp.weights.up if up is None else mlp.weights.gate)
        if up is not None:
            grad_hidden = torch.addmm(grad_hidden, up, mlp.weights.up)
        return grad_hidden.view_as(grad_y), None
