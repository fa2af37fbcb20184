"""Statistics and scores against their definition in float64, from raw activations and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minisp import ops
from minisp.config import SaliencyScore
from minisp.errors import NumericalError
from minisp.methods import statistics
from minisp.methods.statistics import Statistics
from minisp.ops import reference
from minisp.ranks import Ranks
from tests.toys import score, statistics_of, toy_examples

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: tuple[SaliencyScore, ...] = ("taylor", "fisher", "signed")


def raw(tokens: int = 40, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations and gradients (T, m) float64; the units differ in size and in how much their products cancel."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, tokens, width, dtype=torch.float64, generator=generator)
    return x * torch.linspace(0.1, 3, width), gradient + torch.linspace(-1, 1, width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_its_definition(kind: SaliencyScore) -> None:
    x, gradient = raw()
    found = statistics_of(x, gradient).score(kind)
    torch.testing.assert_close(found, score(kind, x, gradient))
    assert found.dtype == torch.float64 and bool((found > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_from_the_engine_s_pass_are_the_definition(kind: SaliencyScore) -> None:
    # ReLU of what is positive is the identity: the raw activations pass unchanged.
    x, gradient = raw(300, 5)
    x = x.abs()
    record = Statistics.empty(5, gram=True)
    for chunk, slope in zip(x.split(77), gradient.split(77), strict=True):
        record.update_(*ops.activation_backward_(chunk.float(), None, slope.float(), "relu"))
    record.finalize_(0)
    torch.testing.assert_close(record.score(kind), score(kind, x, gradient), rtol=1e-5, atol=1e-7)
    assert record.num_tokens == 300 and record.gram is not None
    torch.testing.assert_close(record.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(record.gram, record.gram.T)


@toy_examples
@given(st.sampled_from([0.25, 2.0, -4.0]), st.integers(0, 5))
def test_scaling_laws(factor: float, seed: int) -> None:
    x, gradient = raw(seed=seed)
    base, scaled = statistics_of(x, gradient), statistics_of(x, factor * gradient)
    # A power of two scales without rounding.
    assert torch.equal(scaled.score("taylor"), abs(factor) * base.score("taylor"))
    assert torch.equal(scaled.score("signed"), abs(factor) * base.score("signed"))
    assert torch.equal(scaled.score("fisher"), factor**2 * base.score("fisher"))
    for kind in KINDS:
        # Scaling a unit up and its column down changes neither the model nor a score.
        assert torch.equal(statistics_of(factor * x, gradient / factor).score(kind), base.score(kind))
        # A mean: the same tokens twice weigh the same.
        twice = statistics_of(torch.cat([x, x]), torch.cat([gradient, gradient]))
        torch.testing.assert_close(twice.score(kind), base.score(kind))
    # The triangle inequality, and Jensen's.
    assert bool((base.score("signed") <= base.score("taylor") * (1 + 1e-12)).all())
    assert bool((base.score("taylor") ** 2 <= base.score("fisher") * (1 + 1e-12)).all())


def test_products_that_cancel_count_for_all_but_the_signed_score() -> None:
    x, gradient = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [-2.0]])
    record = statistics_of(x, gradient)
    assert [float(record.score(kind)) for kind in KINDS] == [2.0, 4.0, 0.0]
    assert float(statistics_of(x, -gradient.abs()).score("signed")) == 2.0


def test_no_token_gives_no_score() -> None:
    record = Statistics.empty(3, gram=False)
    record.update_(torch.empty(0, 3), torch.zeros(3, 3))
    assert record.gram is None
    assert all(torch.equal(record.score(kind), torch.zeros(3, dtype=torch.float64)) for kind in KINDS)


def test_activations_alone_leave_the_saliency_as_it_is() -> None:
    x, _ = raw()
    record = Statistics.empty(7, gram=True)
    record.update_(x.float(), None)
    assert record.num_tokens == 40 and not record.saliency.any() and record.gram is not None and record.gram.any()


@pytest.mark.parametrize("where", ["saliency", "gram"])
def test_sums_that_are_not_finite_are_refused_by_layer(where: str) -> None:
    record = statistics_of(*raw())
    record.finalize_(0)
    assert record.gram is not None
    if where == "saliency":
        record.saliency[1, 2] = torch.inf
        record.saliency[2, 5] = torch.nan
    else:
        record.gram[2, 2], record.gram[5, 5] = torch.nan, torch.inf
    with pytest.raises(NumericalError, match=r"^Layer 4, mlp: expected finite statistics, got 2 of 7 units"):
        record.finalize_("Layer 4, mlp")


@pytest.mark.parametrize("columns", [1, 4])
def test_the_saliency_of_a_unit_is_summed_over_its_columns_first(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 300, 3 * columns, generator=generator)
    exact = reference.saliency_sums(x.double(), gradient.double(), columns)
    # Zeroing the columns of a unit changes the first-order loss of token t by the sum of its products.
    zeroed = x.view(300, 3, columns).double().clone()
    zeroed[:, 1] = 0
    change = ((x.double() - zeroed.view(300, -1)) * gradient.double()).sum(1)
    torch.testing.assert_close(exact[:, 1], torch.stack([change.abs().sum(), change.square().sum(), change.sum()]))
    torch.testing.assert_close(ops.saliency_sums(x, gradient, columns).double(), exact, rtol=1e-5, atol=1e-3)
    record = Statistics.empty(3, columns, gram=True)
    record.update_(x, ops.saliency_sums(x, gradient, columns))
    record.finalize_("toy")
    assert record.gram is not None and record.gram.shape == (3 * columns, 3 * columns)
    back = Statistics.from_tensors(dict(record.tensors()).__getitem__, columns, gram=True, device=torch.device("cpu"))
    assert back.gram is not None and torch.equal(back.gram, record.gram)
    record.gram[columns, columns] = torch.inf
    with pytest.raises(NumericalError, match="got 1 of 3 units"):
        record.finalize_("toy")


@pytest.mark.parametrize("panel", [1, 3, 7, 512])
def test_a_record_comes_back_whole_from_what_is_stored(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PANEL_ROWS", panel)
    x, gradient = raw()
    record = statistics_of(x.float(), gradient.float()).finalize_(0)
    stored = dict(record.tensors())
    assert record.gram is not None
    # As far as the diagonal reaches: the lower half, and what its panels have above it.
    size = sum(t.numel() for key, t in stored.items() if key.startswith("gram"))
    assert size == sum((min(i + panel, 7) - i) * min(i + panel, 7) for i in range(0, 7, panel))
    back = Statistics.from_tensors(stored.__getitem__, gram=True, device=torch.device("cpu"))
    assert back.num_tokens == 40 and back.gram is not None
    assert torch.equal(back.saliency, record.saliency) and torch.equal(back.gram, record.gram)
    without = Statistics.from_tensors(stored.__getitem__, gram=False, device=torch.device("cpu"))
    assert without.gram is None and torch.equal(without.saliency, record.saliency)


def test_one_token_has_a_score_of_its_own() -> None:
    x, gradient = raw(1)
    torch.testing.assert_close(statistics_of(x, gradient).score("taylor"), score("taylor", x, gradient))


def with_gradients() -> tuple[Statistics, Tensor]:
    """A record of 40 scored tokens and 40 others, and the gradients (T, d) of the scored ones."""
    x, gradient = (t.float() for t in raw())
    record = Statistics.empty(7, gram=True, outputs=3)
    record.update_(x, ops.saliency_sums(x, gradient, 1), gradient[:, :3])
    record.update_(x, None)
    return record, gradient[:, :3]


def test_gradients_of_scored_tokens_are_summed_where_they_are_wanted() -> None:
    record, gradient = with_gradients()
    record.finalize_(0)
    assert record.gradients is not None and (record.num_tokens, record.num_scored) == (80, 40)
    torch.testing.assert_close(record.gradients, gradient.T @ gradient)
    assert torch.equal(record.gradients, record.gradients.T)
    stored = dict(record.tensors())
    back = Statistics.from_tensors(stored.__getitem__, gram=True, outputs=3, device=torch.device("cpu"))
    assert back.gradients is not None and torch.equal(back.gradients, record.gradients)
    assert (back.num_tokens, back.num_scored) == (80, 40)
    # Where they are not wanted they are neither kept nor looked for.
    assert Statistics.empty(3, gram=False, outputs=1).gradients is not None
    without = Statistics.empty(3, gram=False)
    without.update_(gradient, None, gradient)
    assert without.gradients is None
    assert Statistics.from_tensors(stored.__getitem__, gram=True, device=torch.device("cpu")).gradients is None
    assert Statistics(5, torch.zeros(3, 2), None).num_scored == 0


class Twice(Ranks):
    """Two processes that found the same."""

    def sum_(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    def total(self, value: int) -> int:
        return 2 * value


def test_every_sum_is_added_up_over_the_processes() -> None:
    (both, _), (one, _) = with_gradients(), with_gradients()
    both.sum_over_(Twice())
    assert (both.num_tokens, both.num_scored) == (160, 80)
    for found, single in ((both.saliency, one.saliency), (both.gram, one.gram), (both.gradients, one.gradients)):
        assert found is not None and single is not None and torch.equal(found, 2 * single)
