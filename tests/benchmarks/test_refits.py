"""The refits of benchmarks/refits.py: against the engine, autograd, and a case with a closed form."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisp import fast
from minisp.ops import reference
from tests.models import VOCABULARY, tiny_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import refits

OPTIONS = {"keep": 0.6, "alignment": 4, "allocation": "score"}


def windows() -> Tensor:
    return torch.randint(3, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(3))


def minified(inputs: str) -> tuple[Any, Any]:
    """The dense model, and one cut on these inputs."""
    dense = tiny_model("llama")
    cut = copy.deepcopy(dense)
    fast.minify(cut, calibration=windows(), inputs=inputs, batch=1, **OPTIONS)
    return dense, cut


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(windows()).logits


def test_correcting_the_down_projections_is_what_the_engine_does() -> None:
    dense, cut = minified("dense")
    _, wanted = minified("both")
    before = logits(cut)
    refits.correct_drift_(dense, cut, windows(), [refits.MLP], 1.0)
    torch.testing.assert_close(logits(cut), logits(wanted), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, logits(cut), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("names", [[refits.ATTENTION], [refits.ATTENTION, refits.MLP]])
def test_corrections_bring_the_output_nearer(names: list[str]) -> None:
    dense, cut = minified("dense")
    wanted, before = logits(dense), logits(cut)
    others = {name: p.clone() for name, p in cut.named_parameters() if not name[:-7].endswith(tuple(names))}
    refits.correct_drift_(dense, cut, windows(), names, 0.1)
    assert (logits(cut) - wanted).norm() < 0.97 * (before - wanted).norm()
    parameters = dict(cut.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in others.items())


def test_a_gauss_newton_step_is_exact_where_its_kronecker_product_is() -> None:
    # One unit, one constant input: JᵀJ is a 2×2 matrix times h².
    generator = torch.Generator().manual_seed(0)
    h, y = torch.full((50, 1), 0.7), torch.randn(50, 1, generator=generator)
    gate, up, down = (torch.tensor([[value]]) for value in (0.3, -0.8, 1.7))
    inner = torch.tensor([0.7 * 0.3, 0.7 * -0.8], dtype=torch.float64, requires_grad=True)
    x = reference.activation(inner[:1], inner[1:], "silu")
    row = 1.7 * 0.7 * torch.autograd.grad(x.sum(), inner)[0]
    residual = float(y.double().mean()) - 1.7 * float(x.detach())
    # Rank one: the least-norm solution, which damping only shortens; the length makes up for that.
    wanted = row * residual / float(row @ row)
    step, length = refits.gauss_newton(gate, up, down, "silu", [(h, y)], 0.01)
    torch.testing.assert_close((length * step[:, 0]).double(), wanted, rtol=1e-3, atol=0)
    assert 1 < length < 1.1


def test_a_gauss_newton_step_leads_downhill_and_no_further_than_it_pays() -> None:
    generator = torch.Generator().manual_seed(1)
    h, y, gate, up, down = (
        torch.randn(shape, generator=generator) for shape in ((60, 5), (60, 4), (3, 5), (3, 5), (4, 3))
    )
    weights = torch.stack([gate, up]).double().requires_grad_()

    def error(gate: Tensor, up: Tensor) -> Tensor:
        x = reference.activation(h.double() @ gate.T, h.double() @ up.T, "silu")
        return (y.double() - x @ down.double().T).square().sum()

    slope = torch.autograd.grad(error(*weights), weights)[0].flatten(0, 1)
    # Two micro-batches are one.
    step, length = refits.gauss_newton(gate, up, down, "silu", [(h[:20], y[:20]), (h[20:], y[20:])], 0.05)
    assert length > 0 and float((slope * step).sum()) < 0
    taken = [float(error(*(weights.detach() + t * length * step.view(2, 3, 5)))) for t in (0, 0.25, 1)]
    assert taken[1] < taken[0]
    # On the linear model the best length takes away half of what the slope promises.
    residuals = list(refits._moves(step, gate, up, down, "silu", [(h, y)]))
    linear = [sum(float((r - t * length * m).square().sum()) for r, m in residuals) for t in (0.9, 1, 1.1)]
    assert linear[1] < min(linear[0], linear[2])


def test_refitting_inside_brings_cut_layers_nearer_and_leaves_whole_ones_alone() -> None:
    dense, cut = minified("dense")
    widths = [layer.mlp.up_proj.weight.shape[0] for layer in cut.model.layers]
    assert min(widths) < 48
    first = min(index for index, width in enumerate(widths) if width < 48)
    seen: list[list[Tensor]] = []
    before = copy.deepcopy(cut)
    refits.refit_inside_(dense, cut, windows(), 0.05)
    for model in (dense, before, cut):
        kept: list[Tensor] = []
        handle = dense.model.layers[first].mlp.register_forward_hook(lambda _, x, __, kept=kept: kept.append(x[0]))
        logits(dense)
        handle.remove()
        with torch.no_grad():
            seen.append([model.model.layers[first].mlp(h) for h in kept])
    wanted, old, new = (torch.cat(outputs) for outputs in seen)
    assert (new - wanted).norm() < 0.97 * (old - wanted).norm()
    for layer, other, width in zip(cut.model.layers, before.model.layers, widths, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, other.mlp.up_proj.weight) == (width == 48)
        assert torch.equal(layer.self_attn.o_proj.weight, other.self_attn.o_proj.weight)
