"""Every option value in a whole run on a tiny model, against what the option says, computed in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minisp import fast
from minisp.config import MinifyConfig
from minisp.methods.damping import DECADES
from minisp.methods.selection import Candidate, allocate
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.ops import portable
from minisp.phases.batches import Batches
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep
from minisp.phases.trials import measure_ratios
from minisp.report.report import MinifyReport
from tests.tiny import HIDDEN, LAYERS, WIDTH, tiny_model
from tests.toys import Passed, down_of, layers_of, least_squares, observed, score, units_of, windows

pytestmark = pytest.mark.usefixtures("one_thread")
KEEP = 0.6
# 16 windows of 32 tokens: all of them run through the trial cuts, and through the correction.
IDS = windows()


def run(model: Any = None, **options: Any) -> tuple[Any, MinifyReport]:
    """A tiny Llama, minified in memory, and the report."""
    model = tiny_model("llama") if model is None else model
    return model, fast.minify(model, **{"keep": KEEP, "calibration": IDS, "alignment": 4, **options})


def widths_of(report: MinifyReport) -> list[int]:
    return [len(kept) for kept in report.kept]


def kept_by(scores: list[Tensor], widths: list[int]) -> list[list[int]]:
    """The most salient units of every layer."""
    return [sorted(s.argsort(descending=True)[:w].tolist()) for s, w in zip(scores, widths, strict=True)]


def refit(x: Tensor, kept: Tensor, weight: Tensor, damping: float, *, to_zero: bool = False) -> Tensor:
    """The columns (d, n) that the refit on the activations x (T, m) should leave."""
    origin = torch.zeros_like(weight[:, kept]) if to_zero else weight[:, kept]
    return least_squares(x[:, kept], x @ weight.T, damping * float(x.square().sum(0).mean()), origin)


@pytest.fixture(scope="module")
def dense() -> list[Passed]:
    """What passes the layers of the dense model."""
    return observed(tiny_model("llama"), IDS)


@pytest.fixture(scope="module")
def default() -> tuple[Any, MinifyReport]:
    return run()


def allocate_widths(scores: list[Tensor], alignment: int) -> list[int]:
    return allocate([Candidate(s, 1, alignment, str(i)) for i, s in enumerate(scores)], KEEP, min_keep=0.1)


@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
@pytest.mark.parametrize("saliency", ["taylor", "fisher", "signed"])
def test_saliency_and_widths(saliency: str, widths: str, dense: list[Passed]) -> None:
    _, report = run(saliency=saliency, widths=widths, labels="text", correct_drift=False)
    scores = [score(saliency, layer.x, layer.gradient) for layer in dense]
    wanted = [28] * LAYERS if widths == "uniform" else allocate_widths(scores, 4)
    assert widths_of(report) == wanted
    assert [kept.tolist() for kept in report.kept] == kept_by(scores, wanted)
    # The option matters: other scores would keep other units.
    for other in {"taylor", "fisher", "signed"} - {saliency}:
        others = [score(other, layer.x, layer.gradient) for layer in dense]
        assert kept_by(others, wanted) != kept_by(scores, wanted)
    assert widths == "uniform" or len(set(wanted)) > 1


@pytest.mark.parametrize("seed", [0, 5])
def test_labels_that_the_model_draws(seed: int, dense: list[Passed]) -> None:
    _, report = run(labels="sampled", seed=seed, widths="uniform", correct_drift=False)
    drawn = observed(tiny_model("llama"), IDS, label_seed=seed)
    wanted = kept_by([score("fisher", layer.x, layer.gradient) for layer in drawn], [28] * LAYERS)
    assert [kept.tolist() for kept in report.kept] == wanted
    text = kept_by([score("fisher", layer.x, layer.gradient) for layer in dense], [28] * LAYERS)
    other = observed(tiny_model("llama"), IDS, label_seed=seed + 1)
    assert wanted != text
    assert wanted != kept_by([score("fisher", layer.x, layer.gradient) for layer in other], [28] * LAYERS)


def test_labels_of_both_kinds_lie_between_them(dense: list[Passed]) -> None:
    scores = {}
    for labels in ("text", "sampled", "both"):
        stream, run_ = Stream.from_module(tiny_model("llama")), Run.in_memory()
        with frozen(stream.model):
            objective = Objective(labels)  # type: ignore[arg-type]
            saliency_sweep(
                stream, Batches.scoring(IDS.split(4)), [range(LAYERS)], run_, objective=objective, gram=False
            )
        scores[labels] = torch.cat([run_.statistics(x, gram=False).score("fisher") for x in stream.structures])
    wanted = scores["text"] + scores["sampled"]
    # The cross term's mean over few windows is not yet zero.
    assert float((scores["both"] - wanted).norm() / wanted.norm()) < 0.35
    assert float(torch.corrcoef(torch.stack([scores["both"], wanted]))[0, 1]) > 0.95


def trial(dense: list[Passed], layer: int) -> tuple[float, float]:
    """KL(dense ‖ layer cut) at every second token, in nats per token, and the saliency of the third that is cut."""
    found = dense[layer]
    scores = score("fisher", found.x, found.gradient)
    gone = scores.argsort()[: WIDTH // 3]
    kept = torch.tensor(sorted(set(range(WIDTH)) - set(gone.tolist())))
    model, cut = tiny_model("llama").double(), tiny_model("llama").double()
    down = torch.zeros(HIDDEN, WIDTH, dtype=torch.float64)
    down[:, kept] = refit(found.x, kept, down_of(model, layer), MinifyConfig().damping)
    down_of(cut, layer).copy_(down)
    with torch.no_grad():
        p, q = (m(IDS).logits[:, ::2].log_softmax(-1) for m in (model, cut))
    return float((p.exp() * (p - q)).sum(-1).mean()), float(scores[gone].sum())


def test_measured_widths_follow_trial_cuts(dense: list[Passed]) -> None:
    scores = [score("fisher", layer.x, layer.gradient) for layer in dense]
    wanted = [kl / removed for kl, removed in (trial(dense, layer) for layer in range(LAYERS))]
    model, work = tiny_model("llama"), Run.in_memory()
    stream = Stream.from_module(model)
    with frozen(model):
        saliency_sweep(stream, Batches.scoring(IDS.split(4)), [range(LAYERS)], work, gram=True)
        found = measure_ratios(stream, IDS, [s.clone() for s in scores], MinifyConfig(), work)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert max(wanted) > 1.1 * min(wanted)
    # A run takes them, and allocation by score alone does not.
    measured, by_score = (run(allocation=name, alignment=1, labels="text")[1] for name in ("measured", "score"))
    scaled = [s * ratio for s, ratio in zip(scores, wanted, strict=True)]
    assert widths_of(measured) == allocate_widths(scaled, 1)
    assert widths_of(by_score) == allocate_widths(scores, 1)
    assert widths_of(by_score) != widths_of(measured)


@pytest.mark.parametrize("shrink_to", ["original", "zero"])
@pytest.mark.parametrize("damping", [0.05, 0.5])
def test_refit_on_dense_inputs(damping: float, shrink_to: str, dense: list[Passed]) -> None:
    model, report = run(correct_drift=False, damping=damping, shrink_to=shrink_to)
    weights = tiny_model("llama").double()
    for layer, (found, kept) in enumerate(zip(dense, report.kept, strict=True)):
        weight = down_of(weights, layer)
        wanted = refit(found.x, kept, weight, damping, to_zero=shrink_to == "zero")
        torch.testing.assert_close(down_of(model, layer).double(), wanted, rtol=1e-3, atol=1e-4)
        lost = (found.x @ weight.T - found.x[:, kept] @ wanted.T).norm() / (found.x @ weight.T).norm()
        assert report.layers[layer].residual == pytest.approx(float(lost), rel=1e-3)
        # The option matters, far beyond that tolerance.
        other = refit(found.x, kept, weight, damping, to_zero=shrink_to != "zero")
        assert float((other - wanted).abs().max()) > 0.01
        other = refit(found.x, kept, weight, 0.16, to_zero=shrink_to == "zero")
        assert float((other - wanted).abs().max()) > 0.01


def test_refit_on_pruned_inputs(dense: list[Passed]) -> None:
    model, report = run(refit_on="pruned", widths="uniform")
    weights = tiny_model("llama").double()
    passed = observed(model, IDS)
    differs = []
    for layer, kept in enumerate(report.kept):
        gate, up = (view for view in units_of(weights, layer)[:2])
        entering = passed[layer].entering
        # The whole layer, on what the cut layers below it produce.
        x = nn.functional.silu(entering @ gate.T) * (entering @ up.T)
        wanted = refit(x, kept, down_of(weights, layer), MinifyConfig().damping)
        torch.testing.assert_close(down_of(model, layer), wanted, rtol=1e-3, atol=1e-4)
        on_dense = refit(dense[layer].x, kept, down_of(weights, layer), MinifyConfig().damping)
        differs.append(float((wanted - on_dense).abs().max()) > 1e-3)
        assert report.layers[layer].drift_explained == 0
    # What enters the first layer is the same in both models.
    assert differs == [False, True, True]


@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_correction_of_drift(damping: float, dense: list[Passed], monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles as wide as the layer would hide that only the lower triangle is summed.
    monkeypatch.setattr(portable, "GRAM_TILE", 8)
    model, report = run(correct_drift=True, widths="uniform", correction_damping=damping)
    weights = tiny_model("llama").double()
    for layer, (found, kept) in enumerate(zip(observed(model, IDS), report.kept, strict=True)):
        refitted = refit(dense[layer].x, kept, down_of(weights, layer), MinifyConfig().damping)
        final, seen = down_of(model, layer), found.x
        drift = dense[layer].leaving - (found.leaving - seen @ (final - refitted).T)
        mu = damping * float(seen.square().sum(0).mean())
        delta = least_squares(seen, drift, mu, torch.zeros_like(refitted))
        torch.testing.assert_close(final, refitted + delta, rtol=1e-3, atol=1e-4)
        assert float(delta.abs().max()) > 1e-3
        left = float((drift - seen @ delta.T).square().sum() / drift.square().sum())
        assert report.layers[layer].drift_explained == pytest.approx(1 - left, rel=1e-2)


def test_damping_chosen_per_layer() -> None:
    model, report = run(correct_drift=False, widths="uniform", damping="auto")
    for layer in report.layers:
        curve = dict(layer.damping_curve)
        assert set(DECADES) < set(curve)
        assert layer.damping == min(curve, key=lambda damping: curve[damping])
        fixed, again = run(correct_drift=False, widths="uniform", damping=layer.damping)
        assert again.layers[layer.layer].residual == pytest.approx(layer.residual, rel=1e-3)
        torch.testing.assert_close(down_of(fixed, layer.layer), down_of(model, layer.layer), rtol=1e-3, atol=1e-4)
    assert {layer.damping for layer in report.layers} != {MinifyConfig().damping}


@pytest.mark.parametrize("refit_on", ["dense", "pruned"])
def test_without_reconstruction_columns_are_sliced(refit_on: str) -> None:
    model, report = run(reconstruct=False, refit_on=refit_on)
    before = tiny_model("llama")
    for layer, kept in enumerate(report.kept):
        assert torch.equal(down_of(model, layer), down_of(before, layer)[:, kept])
        assert report.layers[layer].residual == report.layers[layer].residual_sliced > 0
        assert report.layers[layer].drift_explained == 0
    assert not torch.equal(down_of(run(refit_on=refit_on)[0], 0), down_of(model, 0))


@pytest.mark.parametrize(("min_keep", "lowest"), [(0.0, 4), (0.15, 8), (0.4, 20), (1.0, 28)])
def test_no_layer_keeps_less_than_the_bound(min_keep: float, lowest: int) -> None:
    model = tiny_model("llama")
    # A layer that hardly matters.
    units_of(model, 1)[-1].mul_(1e-3)
    _, report = run(model, min_keep=min_keep, allocation="score", correct_drift=False)
    # All bounds at `keep`, rounded up to 32, do not fit: rounded down they do.
    assert widths_of(report)[1] == lowest
    assert min(widths_of(report)) == lowest and sum(widths_of(report)) <= KEEP * WIDTH * LAYERS


@pytest.mark.parametrize("alignment", [1, 4, 8, 16, None])
@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
def test_alignment(alignment: int | None, widths: str) -> None:
    _, report = run(alignment=alignment, widths=widths, correct_drift=False)
    step = alignment or 1
    assert report.plan.alignment == step
    assert all(len(kept) % step == 0 for kept in report.kept)
    budget = int(KEEP * WIDTH * LAYERS)
    if widths == "uniform":
        assert widths_of(report) == [int(KEEP * WIDTH) // step * step] * LAYERS
    else:
        # Not one step more would fit.
        assert budget - step < sum(widths_of(report)) <= budget


@pytest.mark.parametrize("keep", [0.3, 0.75, 1.0])
def test_keep(keep: float) -> None:
    model, report = run(keep=keep, correct_drift=False, alignment=1)
    assert sum(widths_of(report)) == int(keep * WIDTH * LAYERS)
    assert [down_of(model, layer).shape[1] for layer in range(LAYERS)] == widths_of(report)
    if keep == 1:
        before = tiny_model("llama")
        assert all(
            torch.equal(a, b)
            for layer in range(LAYERS)
            for a, b in zip(layers_of(model)[layer].parameters(), layers_of(before)[layer].parameters(), strict=True)
        )


def test_micro_batches_change_rounding_alone(default: tuple[Any, MinifyReport]) -> None:
    for batch in (1, 5, 16):
        model, report = run(batch=batch)
        assert report.plan.batch == batch
        assert [kept.tolist() for kept in report.kept] == [kept.tolist() for kept in default[1].kept]
        for layer in range(LAYERS):
            torch.testing.assert_close(down_of(model, layer), down_of(default[0], layer), rtol=1e-3, atol=1e-4)
