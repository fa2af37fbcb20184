"""Refit, drift correction and the choice of damping, against least squares in float64 without normal equations."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.errors import NumericalError
from minisp.methods.damping import DECADES
from minisp.methods.reconstruction import Fit, correct, refit
from minisp.methods.statistics import Statistics
from tests.toys import least_squares, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, WIDTH, HIDDEN = 60, 12, 5
KEPT = torch.tensor([0, 2, 3, 7, 8, 11])


def layer(tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations (T, m) that share few factors, each unit of another size, and a down projection (d, m), float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, WIDTH, generator=generator)
    x = (x + 0.5 * torch.randn(tokens, WIDTH, generator=generator)) * torch.linspace(0.3, 2, WIDTH)
    return x.double(), torch.randn(HIDDEN, WIDTH, generator=generator).double()


def sums(x: Tensor) -> Statistics:
    return statistics_of(x, torch.ones_like(x))


class Refitted(NamedTuple):
    """The new weight (d, n), and how the fit went."""

    down: Tensor
    fit: Fit


def fitted(statistics: Statistics, weight: Tensor, kept: Tensor = KEPT, **options: Any) -> Refitted:
    assert statistics.gram is not None
    return Refitted(*refit(statistics.gram, kept, weight, statistics.num_tokens, MinifyConfig(**options)))


def refitted(x: Tensor, weight: Tensor, kept: Tensor = KEPT, **options: Any) -> Refitted:
    return fitted(sums(x), weight, kept, **options)


def distance(x: Tensor, weight: Tensor, down: Tensor, kept: Tensor = KEPT) -> float:
    """‖X Wᵀ − X_S W'ᵀ‖ / ‖X Wᵀ‖, from the outputs themselves."""
    return float((x @ weight.T - x[:, kept] @ down.T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("shrink_to", ["original", "zero"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.05, 1.0, 30.0])
def test_a_refit_is_the_damped_least_squares_fit(damping: float, shrink_to: str) -> None:
    x, weight = layer()
    result = refitted(x, weight, damping=damping, shrink_to=shrink_to)
    # Relative to the mean square of all units, those that go included.
    mu = damping * float(x.square().sum(0).mean())
    origin = weight[:, KEPT] if shrink_to == "original" else torch.zeros(HIDDEN, len(KEPT), dtype=torch.float64)
    wanted = least_squares(x[:, KEPT], x @ weight.T, mu, origin)
    torch.testing.assert_close(result.down, wanted)
    assert result.fit.residual == pytest.approx(distance(x, weight, wanted))
    assert result.fit.residual_sliced == pytest.approx(distance(x, weight, weight[:, KEPT]))
    assert (result.fit.damping, result.fit.damping_curve, result.fit.shift) == (damping, (), 0.0)
    assert result.fit.drift_explained == 0 and result.fit.backward_error < 1e-12


def test_a_damping_is_chosen_alike_where_no_residual_is_wanted() -> None:
    x, weight = layer()
    gram, config = x.T @ x, MinifyConfig(damping="auto")
    (down, fit), (other, without) = (
        refit(gram, KEPT, weight, TOKENS, config, residuals=wanted) for wanted in (True, False)
    )
    assert torch.equal(down, other) and without.damping == fit.damping
    assert fit.residual > 0 and without.residual != without.residual


def test_small_activations_are_refitted_and_corrected_as_large_ones_are() -> None:
    x, weight = layer()
    large, small = refitted(x, weight, damping=0.05), refitted(1e-4 * x, weight, damping=0.05)
    torch.testing.assert_close(small.down, large.down)
    assert small.fit.residual == pytest.approx(large.fit.residual) and small.fit.residual > 0
    kept, drift = x[:, KEPT], x @ weight.T
    corrected = []
    for scale in (1.0, 1e-8):
        sums_of = (scale * kept.T @ kept, scale * drift.T @ kept, scale * float(drift.square().sum()))
        corrected.append(Refitted(*correct(large.down, Fit(), *sums_of, 1.0)))
    torch.testing.assert_close(corrected[1].down, corrected[0].down)
    explained = [result.fit.drift_explained for result in corrected]
    assert explained[1] == pytest.approx(explained[0]) and explained[0] > 0


def test_more_damping_means_less_change_and_less_fit() -> None:
    x, weight = layer()
    results = [refitted(x, weight, damping=damping) for damping in (0.0, 0.05, 0.5, 5.0)]
    changes = [float((result.down - weight[:, KEPT]).norm()) for result in results]
    assert changes == sorted(changes, reverse=True) and changes[-1] < 0.5 * changes[0] and len(changes) == 4
    residuals = [result.fit.residual for result in results]
    assert residuals == sorted(residuals) and residuals[0] < 0.9 * results[0].fit.residual_sliced


def test_without_limit_damping_leaves_the_slice_or_zero() -> None:
    x, weight = layer()
    slice_, zero = (refitted(x, weight, damping=1e9, shrink_to=origin).down for origin in ("original", "zero"))
    torch.testing.assert_close(slice_, weight[:, KEPT], atol=1e-7, rtol=0)
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-7, rtol=0)


def test_slicing_alone_keeps_the_columns_bit_for_bit() -> None:
    x, weight = layer()
    result = refitted(x, weight.to(torch.bfloat16), reconstruct=False)
    assert result.down.dtype == torch.bfloat16
    assert torch.equal(result.down, weight.to(torch.bfloat16)[:, KEPT])
    wanted = distance(x, weight.to(torch.bfloat16).double(), result.down.double())
    assert result.fit.residual == result.fit.residual_sliced == pytest.approx(wanted)
    assert result.fit.damping == 0


def test_the_inputs_are_left_as_they_were() -> None:
    x, weight = layer()
    statistics, before = sums(x), (sums(x), weight.clone())
    result = fitted(statistics, weight.float())
    assert statistics.gram is not None and before[0].gram is not None
    assert torch.equal(statistics.gram, before[0].gram) and torch.equal(weight, before[1])
    assert result.down.dtype == torch.float32


def test_a_dead_unit_is_free_and_a_twin_gives_its_column() -> None:
    x, weight = layer()
    dead, twin = 1, 9
    x[:, dead], x[:, twin] = 0, x[:, 2]
    without_dead = torch.tensor([unit for unit in range(WIDTH) if unit != dead])
    result = refitted(x, weight, without_dead)
    assert torch.equal(result.down, weight[:, without_dead])
    assert result.fit.residual == result.fit.residual_sliced == 0
    without_twin = torch.tensor([unit for unit in range(WIDTH) if unit != twin])
    result = refitted(x, weight, without_twin, damping=1e-12)
    wanted = weight[:, without_twin].clone()
    wanted[:, 2] += weight[:, twin]
    torch.testing.assert_close(result.down, wanted, rtol=0, atol=1e-6)
    assert result.fit.residual < 1e-6 < 0.01 < result.fit.residual_sliced


def test_a_dead_unit_that_stays_keeps_its_column_or_shrinks_to_zero() -> None:
    x, weight = layer()
    x[:, 3] = 0
    place = KEPT.tolist().index(3)
    original, zero = (refitted(x, weight, shrink_to=origin).down for origin in ("original", "zero"))
    assert torch.equal(original[:, place], weight[:, 3])
    assert not zero[:, place].any() and zero.any()


@pytest.mark.parametrize("shrink_to", ["original", "zero"])
@pytest.mark.parametrize("tokens", [30, 400])
def test_damping_is_chosen_by_the_cross_validated_error(tokens: int, shrink_to: str) -> None:
    x, weight = layer(tokens)
    result = refitted(x, weight, damping="auto", shrink_to=shrink_to)
    sliced = x @ weight.T - x[:, KEPT] @ weight[:, KEPT].T
    curve = dict(result.fit.damping_curve)
    assert set(DECADES) < set(curve) and len(curve) == len(DECADES) + 2
    assert list(curve) == sorted(curve)
    for damping, error in curve.items():
        mu = damping * float(x.square().sum(0).mean())
        fixed = refitted(x, weight, damping=damping, shrink_to=shrink_to)
        left = (x @ weight.T - x[:, KEPT] @ fixed.down.T).norm()
        singular = torch.linalg.svdvals(x[:, KEPT]).square()
        freedom = float((singular / (singular + mu)).sum())
        # The engine estimates the degrees of freedom from a few random vectors.
        assert error == pytest.approx(float(left / sliced.norm()) / (1 - freedom / tokens), rel=0.03)
    best = min(curve, key=lambda damping: curve[damping])
    chosen = refitted(x, weight, damping=best, shrink_to=shrink_to)
    assert result.fit.damping == best
    torch.testing.assert_close(result.down, chosen.down)
    # The two half decades lie around the best decade.
    decade = min(DECADES, key=lambda damping: curve[damping])
    assert sorted(set(curve) - set(DECADES)) == pytest.approx([decade / 10**0.5, decade * 10**0.5])


def test_fewer_tokens_ask_for_more_damping() -> None:
    # Targets that the kept units know nothing of: every fit is to chance, and the fewer tokens, the more so.
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for tokens in (14, 4000):
        x = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator)
        x[:, 1] += 0.3 * x[:, 0]
        chosen.append(refitted(x, torch.ones(HIDDEN, WIDTH, dtype=torch.float64), damping="auto").fit.damping)
    assert chosen[0] > chosen[1]


def test_a_fit_with_a_parameter_for_every_token_is_never_chosen() -> None:
    x, weight = layer()
    statistics = sums(x)
    # As if five tokens had made these sums: the six kept units could fit any of them.
    statistics.num_tokens = 5
    result = fitted(statistics, weight, damping="auto")
    curve = dict(result.fit.damping_curve)
    assert curve[min(DECADES)] == float("inf") and curve[result.fit.damping] < float("inf")


def test_where_slicing_loses_nothing_no_damping_is_tried() -> None:
    x, weight = layer()
    x[:, [1, 4]] = 0
    kept = torch.tensor([unit for unit in range(WIDTH) if unit not in (1, 4)])
    result = refitted(x, weight, kept, damping="auto")
    assert result.fit.damping_curve == ()
    assert torch.equal(result.down, weight[:, kept])


@pytest.mark.parametrize("damping", [0.05, "auto"])
def test_a_failure_is_typed(damping: float | str) -> None:
    x, weight = layer()
    statistics = sums(x)
    assert statistics.gram is not None
    statistics.gram[0, 2] = statistics.gram[2, 0] = torch.nan
    with pytest.raises(NumericalError, match="finite"):
        fitted(statistics, weight, damping=damping)


def test_a_layer_without_output_has_no_residual() -> None:
    x, weight = layer()
    result = refitted(x, torch.zeros_like(weight))
    assert result.fit.residual == result.fit.residual_sliced == 0
    assert not result.down.any()


def drifted(damping: float, seed: int = 0) -> tuple[Refitted, Refitted, Tensor, Tensor]:
    """The result before and after its correction, the kept activations (T, n), and the drift (T, d)."""
    x, weight = layer(seed=seed)
    before, seen = refitted(x, weight), x[:, KEPT]
    generator = torch.Generator().manual_seed(seed + 1)
    drift = seen @ torch.randn(len(KEPT), HIDDEN, generator=generator).double()
    drift += 2 * torch.randn(TOKENS, HIDDEN, generator=generator).double()
    return before, corrected(before, seen, drift, damping), seen, drift


def corrected(before: Refitted, seen: Tensor, drift: Tensor, damping: float = 1.0) -> Refitted:
    energy = float(drift.square().sum())
    return Refitted(*correct(before.down, before.fit, seen.T @ seen, drift.T @ seen, energy, damping))


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0, 20.0])
def test_a_correction_is_the_damped_fit_of_the_drift(damping: float) -> None:
    before, after, seen, drift = drifted(damping)
    mu = damping * float(seen.square().sum(0).mean())
    delta = least_squares(seen, drift, mu, torch.zeros(HIDDEN, len(KEPT), dtype=torch.float64))
    torch.testing.assert_close(after.down, before.down + delta)
    left = float((drift - seen @ delta.T).square().sum() / drift.square().sum())
    assert after.fit.drift_explained == pytest.approx(1 - left)
    # Nothing else of the record changes.
    assert replace(after.fit, drift_explained=0.0) == before.fit


def test_a_correction_is_rounded_once_to_the_type_of_the_weights() -> None:
    x, weight = layer()
    before = refitted(x, weight.to(torch.bfloat16))
    seen, generator = x[:, KEPT].float(), torch.Generator().manual_seed(1)
    drift = torch.randn(TOKENS, HIDDEN, generator=generator)
    after = corrected(before, seen, drift)
    mu = float(seen.square().sum(0).mean())
    delta = least_squares(seen.double(), drift.double(), mu, torch.zeros(HIDDEN, len(KEPT), dtype=torch.float64))
    assert after.down.dtype == torch.bfloat16
    torch.testing.assert_close(after.down.double(), before.down.double() + delta, rtol=2**-8, atol=1e-4)


def test_without_drift_nothing_is_corrected() -> None:
    before = refitted(*layer())
    n = len(KEPT)
    assert correct(*before, torch.eye(n), torch.zeros(HIDDEN, n), 0.0, 1.0) == tuple(before)


def test_a_failed_correction_is_typed() -> None:
    before = refitted(*layer())
    n = len(KEPT)
    gram = torch.eye(n, dtype=torch.float64)
    gram[1, 0] = gram[0, 1] = torch.nan
    with pytest.raises(NumericalError, match="finite"):
        correct(*before, gram, torch.ones(HIDDEN, n, dtype=torch.float64), 1.0, 1.0)


def test_facts_come_back() -> None:
    fit = replace(refitted(*layer(), damping="auto").fit, drift_explained=0.25)
    facts = fit.facts()
    assert fit.damping_curve
    # As JSON would return them: lists for tuples.
    facts["damping_curve"] = [list(point) for point in facts["damping_curve"]]
    assert Fit.from_facts(facts) == fit
