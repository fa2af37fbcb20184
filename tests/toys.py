"""Toys for the tests that hold the core: sums from raw activations, least squares without normal equations, and where
the units of every tiny model lie. Nothing here uses the code that it is compared with.

Shapes: T tokens, m units, n kept units, d hidden size, B windows of L tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor, nn

from minisp.methods.statistics import Statistics
from minisp.ops.sampling import label_numbers
from tests.tiny import VOCABULARY

# Always the same examples, and no time limit: a slow machine is no failure.
toy_examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)

_LLAMA = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1}
# Parameter of a layer → the axis that runs over units, written down by hand; the down projection is the last.
UNIT_AXES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "opt": {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1},
    "gpt2": {"mlp.c_fc.weight": 1, "mlp.c_fc.bias": 0, "mlp.c_proj.weight": 0},
}


def windows(count: int = 16, length: int = 32, seed: int = 1) -> Tensor:
    """Tokens (count, length) to calibrate on."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers of a tiny model."""
    base = {"opt": lambda: model.model.decoder.layers, "gpt2": lambda: model.transformer.h}
    found: nn.ModuleList = base.get(model.config.model_type, lambda: model.model.layers)()
    return found


def down_of(model: Any, layer: int) -> Tensor:
    """The down projection (d, m) of a layer."""
    name, axis = list(UNIT_AXES[model.config.model_type].items())[-1]
    weight = layers_of(model)[layer].get_parameter(name).detach()
    return weight if axis == 1 else weight.T


def units_of(model: Any, layer: int) -> list[Tensor]:
    """Views of what belongs to the units of a layer, units first: gate and up, or up and its bias; last the columns."""
    axes = UNIT_AXES[model.config.model_type]
    parameters = [(layers_of(model)[layer].get_parameter(name).data, axis) for name, axis in axes.items()]
    return [parameter.movedim(axis, 0) for parameter, axis in parameters]


def statistics_of(x: Tensor, gradient: Tensor) -> Statistics:
    """The finished sums of activations x and their gradient, both (T, m), in their dtype."""
    p = (x * gradient).double()
    return Statistics(len(x), torch.stack([p.abs().sum(0), p.square().sum(0), p.sum(0)]), x.T @ x, len(x))


def least_squares(x: Tensor, target: Tensor, mu: float, origin: Tensor) -> Tensor:
    """argmin_W ‖x Wᵀ − target‖² + μ‖W − origin‖²: x (T, n), target (T, d), origin (d, n); damping as rows of data."""
    rows = torch.cat([x, mu**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    solution: Tensor = torch.linalg.lstsq(rows, torch.cat([target, mu**0.5 * origin.T]), driver="gelsd").solution.T
    return solution


@dataclass
class Passed:
    """What passed a layer of a model that computed in float64.

    Attributes:
        entering: (T, d) what enters the MLP, behind its norm.
        x, gradient: (T, m) the activations, and the gradient of the summed loss there.
        leaving: (T, d) the hidden states behind the layer.
    """

    entering: Tensor
    x: Tensor
    gradient: Tensor
    leaving: Tensor


def observed(model: Any, ids: Tensor, *, label_seed: int | None = None) -> list[Passed]:
    """What passes every layer for windows (B, L), by torch's own forward and backward in float64.

    Args:
        model: turned to float64 in place.
        label_seed: take labels that the model draws itself, by the numbers that belong to this seed.
    """
    model.double().requires_grad_(True)
    seen: list[dict[str, Tensor]] = [{} for _ in layers_of(model)]
    hooks = []
    for layer, found in zip(layers_of(model), seen, strict=True):
        first, *_, last = UNIT_AXES[model.config.model_type]
        into, down = (layer.get_submodule(name.rpartition(".")[0]) for name in (first, last))

        def enters(_: Any, args: Any, found: dict[str, Tensor] = found) -> None:
            found["entering"] = args[0]

        def activates(_: Any, args: Any, found: dict[str, Tensor] = found) -> None:
            args[0].retain_grad()
            found["x"] = args[0]

        def leaves(_: Any, args: Any, result: Any, found: dict[str, Tensor] = found) -> None:
            found["leaving"] = result[0] if isinstance(result, tuple) else result

        hooks += [into.register_forward_pre_hook(enters), down.register_forward_pre_hook(activates)]
        hooks.append(layer.register_forward_hook(leaves))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    if label_seed is not None:
        weights = logits.detach().softmax(-1).cumsum(-1)
        targets = (weights <= label_numbers(ids, label_seed)[:, :-1, None]).sum(-1)
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    passed = []
    for found in seen:
        flat = {name: t.detach().reshape(-1, t.shape[-1]) for name, t in found.items()}
        assert found["x"].grad is not None
        passed.append(Passed(gradient=found["x"].grad.reshape(-1, flat["x"].shape[1]), **flat))
    return passed


def score(kind: str, x: Tensor, gradient: Tensor) -> Tensor:
    """Saliency (m,) by its definition."""
    p = x * gradient
    return {"taylor": p.abs().mean(0), "fisher": p.square().mean(0), "signed": p.mean(0).abs()}[kind]
