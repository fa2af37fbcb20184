"""Which units stay: widths against every possible choice on small toys, and the order of units inside a layer."""

import itertools
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minisp.errors import ConfigError
from minisp.methods.selection import Candidate, allocate, default_alignment, ranking, select
from tests.toys import toy_examples

pytestmark = pytest.mark.usefixtures("one_thread")

# Whole numbers: sums are exact in any order, and ties are common.
POINTS = st.integers(0, 20)


@st.composite
def equal_steps(draw: st.DrawFn) -> tuple[list[Tensor], float, int, float]:
    """Scores of layers whose widths are multiples of the alignment, keep, the alignment, and min_keep."""
    alignment = draw(st.integers(1, 4))
    steps = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    scores = [draw(st.lists(POINTS, min_size=n * alignment, max_size=n * alignment)) for n in steps]
    total = alignment * sum(steps)
    kept = draw(st.integers(alignment * len(steps), total))
    return [torch.tensor(s, dtype=torch.float64) for s in scores], kept / total, alignment, draw(st.floats(0, 1))


@st.composite
def ragged_steps(draw: st.DrawFn) -> tuple[list[Tensor], float, int, float]:
    """As `equal_steps`, with layers of any width: the last step of a layer may be a shorter one."""
    alignment = draw(st.integers(1, 5))
    scores = draw(st.lists(st.lists(POINTS, min_size=1, max_size=17), min_size=1, max_size=5))
    return (
        [torch.tensor(s, dtype=torch.float64) for s in scores],
        draw(st.floats(0.05, 1)),
        alignment,
        draw(st.floats(0, 1)),
    )


def allocate_widths(scores: list[Tensor], keep: float, *, alignment: int, min_keep: float, cost: int = 3) -> list[int]:
    """Layers whose units cost the same."""
    candidates = [Candidate(score, cost, alignment, str(place)) for place, score in enumerate(scores)]
    return allocate(candidates, keep, min_keep=min_keep)


def uniform_widths(full: list[int], keep: float, *, alignment: int) -> list[int]:
    """Layers that are tied."""
    return allocate([Candidate(torch.ones(size), 3, alignment, "mlp") for size in full], keep, min_keep=0.1)


def worth(score: Tensor, width: int) -> int:
    """The most saliency that `width` units can have."""
    return sum(sorted(map(int, score.tolist()), reverse=True)[:width])


def lower_bounds(scores: list[Tensor], keep: float, alignment: int, min_keep: float, budget: int) -> list[int]:
    """Of every layer's width: rounded up to the alignment where all of them fit, else down, to a step at least."""
    shares = [floor(min(min_keep, keep) * len(score)) for score in scores]
    up = [
        min(len(score), max(1, -(-share // alignment)) * alignment) for score, share in zip(scores, shares, strict=True)
    ]
    if sum(up) <= budget:
        return up
    return [
        min(len(score), max(1, share // alignment) * alignment) for score, share in zip(scores, shares, strict=True)
    ]


def most(scores: list[Tensor], bounds: list[int], alignment: int, budget: int) -> int:
    """The most saliency of any choice of aligned widths inside the budget, found by trying all of them."""
    choices = itertools.product(*(range(b, len(s) + 1, alignment) for s, b in zip(scores, bounds, strict=True)))
    return max(
        sum(worth(s, w) for s, w in zip(scores, choice, strict=True)) for choice in choices if sum(choice) <= budget
    )


@toy_examples
@given(equal_steps())
def test_no_choice_of_widths_keeps_more_saliency(toy: tuple[list[Tensor], float, int, float]) -> None:
    scores, keep, alignment, min_keep = toy
    budget = round(keep * sum(map(len, scores)))
    for bound in (0.0, min_keep):
        bounds = lower_bounds(scores, keep, alignment, bound, budget)
        widths = allocate_widths(scores, keep, alignment=alignment, min_keep=bound)
        assert all(width >= lowest for width, lowest in zip(widths, bounds, strict=True))
        kept = sum(worth(s, w) for s, w in zip(scores, widths, strict=True))
        assert kept == most(scores, bounds, alignment, budget)


@toy_examples
@given(ragged_steps())
def test_widths_stay_inside_the_budget_and_use_all_of_it_that_fits(toy: tuple[list[Tensor], float, int, float]) -> None:
    scores, keep, alignment, min_keep = toy
    full = [len(score) for score in scores]
    budget = floor(keep * sum(full) + 1e-9)
    smallest = lower_bounds(scores, keep, alignment, min_keep, budget)
    if sum(smallest) > budget:
        with pytest.raises(ConfigError, match=f"at most {3 * budget}(?!,)|at least {3 * sum(smallest)} "):
            allocate_widths(scores, keep, alignment=alignment, min_keep=min_keep)
        return
    widths = allocate_widths(scores, keep, alignment=alignment, min_keep=min_keep)
    assert sum(widths) <= budget
    for width, m, lowest in zip(widths, full, smallest, strict=True):
        assert width >= lowest
        assert width == m or (0 < width < m and width % alignment == 0)
        # The next step of any layer would not fit.
        assert width == m or sum(widths) - width + min(m, width + alignment) > budget


@pytest.mark.parametrize("total", [49, 100])
def test_a_budget_is_not_rounded_below_a_whole_number_of_units(total: int) -> None:
    for kept in range(1, total + 1):
        # (kept / total) · total can be a hair below `kept`, as for 1 of 49.
        assert allocate_widths([torch.ones(total)], kept / total, alignment=1, min_keep=0) == [kept]
        assert uniform_widths([total, total], kept / total, alignment=1) == [kept, kept]
    # A thousandth of a unit short of the next is short.
    assert allocate_widths([torch.ones(100)], 0.49999, alignment=1, min_keep=0) == [49]


def test_steps_are_compared_by_saliency_per_unit() -> None:
    # The next steps: 2 units worth 9 each, and 4 units worth 5 each.
    scores = [torch.tensor([20.0] * 4 + [9.0] * 2), torch.tensor([20.0] * 4 + [5.0] * 4)]
    assert allocate_widths(scores, 12 / 14, alignment=4, min_keep=0) == [6, 4]
    # A shorter step takes no more of the budget than it has units.
    assert allocate_widths([torch.full((6,), 9.0), torch.ones(6)], 1.0, alignment=4, min_keep=0) == [6, 6]


def test_a_bound_above_keep_is_rounded_up_where_keep_has_room() -> None:
    # Half of 5, 5, 5 and 7 units are 2, 2, 2 and 3, rounded up 4; together 10 of the 11 that may stay.
    scores = [*(torch.full((5,), 9.0) for _ in range(3)), torch.ones(7)]
    assert allocate_widths(scores, 0.5, alignment=2, min_keep=1.0) == [2, 2, 2, 4]
    # Without a bound, the budget goes to the others.
    assert allocate_widths(scores, 0.5, alignment=2, min_keep=0) == [5, 2, 2, 2]
    # Bounds that are rounded up and take the whole budget fit: half of 6 is 3, rounded up 4.
    assert allocate_widths([torch.full((6,), 9.0), torch.ones(6)], 2 / 3, alignment=2, min_keep=0.5) == [4, 4]


def test_a_step_that_no_longer_fits_is_passed_over_for_a_smaller_one() -> None:
    # The last steps: 4 units worth 9 each, which do not fit any more, and 2 units worth 1 each, which do.
    scores = [torch.full((8,), 9.0), torch.ones(6)]
    assert allocate_widths(scores, 10 / 14, alignment=4, min_keep=0) == [4, 6]


def test_the_budget_goes_where_the_saliency_is() -> None:
    poor, rich = torch.full((40,), 1.0), torch.full((40,), 2.0)
    assert allocate_widths([poor, rich], 0.5, alignment=4, min_keep=0) == [4, 36]
    assert allocate_widths([rich, poor], 0.5, alignment=4, min_keep=0.25) == [28, 12]
    # A bound above keep is keep.
    assert allocate_widths([rich, poor], 0.5, alignment=4, min_keep=0.9) == [20, 20]


@pytest.mark.parametrize(
    ("width", "alignment"), [(1, 1), (63, 1), (64, 2), (1536, 32), (4095, 64), (4096, 128), (28672, 128)]
)
def test_the_default_alignment_is_a_32nd_of_the_width(width: int, alignment: int) -> None:
    assert default_alignment(width) == alignment


def test_uniform_widths() -> None:
    assert uniform_widths([48, 48], 0.7, alignment=8) == [32, 32]
    assert uniform_widths([50, 50, 50], 1.0, alignment=8) == [50, 50, 50]
    with pytest.raises(ConfigError, match="from 40 to 48"):
        uniform_widths([40, 48], 0.5, alignment=8)
    with pytest.raises(ConfigError, match=r"at most 28 of 288 parameters .* at least 48 from .*, 8 units"):
        uniform_widths([48, 48], 0.1, alignment=8)


def test_saliency_is_weighed_against_parameters() -> None:
    # Ten units each; one of the first costs three parameters, one of the second one. Per unit the first are worth more,
    # per parameter the second.
    dear, cheap = torch.full((10,), 5.0), torch.full((10,), 2.0)
    candidates = [Candidate(dear, 3, 1, "attention"), Candidate(cheap, 1, 1, "mlp")]
    # Half of 40 parameters: all that is cheap, and three of the dear ones.
    assert allocate(candidates, 0.5, min_keep=0) == [3, 10]
    equal = [Candidate(dear, 1, 1, "attention"), Candidate(cheap, 1, 1, "mlp")]
    assert allocate(equal, 0.5, min_keep=0) == [9, 1]


@toy_examples
@given(
    st.lists(st.tuples(st.lists(POINTS, min_size=1, max_size=6), st.integers(1, 5)), min_size=1, max_size=3), st.data()
)
def test_a_budget_of_parameters_is_filled_by_worth_per_parameter(
    structures: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    keep = data.draw(st.floats(0.2, 1))
    candidates = [
        Candidate(torch.tensor(points, dtype=torch.float64), cost, 1, str(place))
        for place, (points, cost) in enumerate(structures)
    ]
    total = sum(cost * len(points) for points, cost in structures)
    smallest = sum(cost for _, cost in structures)
    if smallest > floor(keep * total + 1e-9):
        with pytest.raises(ConfigError, match="Budget"):
            allocate(candidates, keep, min_keep=0)
        return
    sizes = allocate(candidates, keep, min_keep=0)
    spent = sum(cost * size for (_, cost), size in zip(structures, sizes, strict=True))
    room = floor(keep * total + 1e-9) - spent
    assert room >= 0
    gains = []
    for (points, cost), size in zip(structures, sizes, strict=True):
        ranked = sorted(points, reverse=True)
        taken = [point / cost for point in ranked[1:size]]
        # What is left does not fit, or nothing of it is left.
        assert size == len(points) or cost > room
        gains.append((taken, ranked[size] / cost if size < len(points) else None, cost))
    for taken, _, cost in gains:
        for _, left, other in gains:
            # A unit that was taken is worth no less per parameter than one that was left and costs no more.
            if taken and left is not None and other <= cost:
                assert min(taken) >= left - 1e-12 or room + cost < other


def test_structures_of_one_tie_keep_equally_many() -> None:
    scores = [torch.tensor([9.0, 8.0, 7.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.full((4,), 3.0)]
    candidates = [Candidate(score, 1, 1, tie) for score, tie in zip(scores, ("a", "a", "b"), strict=True)]
    # The third unit of both of "a" is worth 8 for two parameters, a unit of "b" 3 for one.
    assert allocate(candidates, 0.75, min_keep=0) == [3, 3, 3]
    assert allocate(candidates, 5 / 12, min_keep=0) == [2, 2, 1]


@toy_examples
@given(st.lists(st.tuples(st.lists(POINTS, min_size=1, max_size=12), st.data()), min_size=1, max_size=3))
def test_the_most_salient_units_stay_and_of_equal_ones_the_first(layers: list[tuple[list[int], st.DataObject]]) -> None:
    scores = [points for points, _ in layers]
    widths = [data.draw(st.integers(0, len(points))) for points, data in layers]
    found = select([torch.tensor(points, dtype=torch.float64) for points in scores], widths)
    for kept, points, width in zip(found, scores, widths, strict=True):
        ranked = sorted(range(len(points)), key=lambda unit: (-points[unit], unit))
        assert kept.tolist() == sorted(ranked[:width])
        assert kept.dtype == torch.int64 and kept.device.type == "cpu"


@toy_examples
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=12, unique=True), st.data())
def test_permuting_units_permutes_what_stays(points: list[int], data: st.DataObject) -> None:
    score = torch.tensor(points, dtype=torch.float64)
    order = torch.tensor(data.draw(st.permutations(range(len(points)))))
    width = data.draw(st.integers(1, len(points)))
    ((kept,), (permuted,)) = select([score], [width]), select([score[order]], [width])
    assert sorted(order[permuted].tolist()) == kept.tolist()
    # A unit that becomes more salient never loses its place.
    raised = score.clone()
    raised[kept[0]] += 2000
    assert int(kept[0]) in select([raised], [width])[0].tolist()


def test_scores_and_widths_are_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        select([torch.ones(3), torch.ones(3)], [2])


@toy_examples
@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_groups_keep_equally_many_and_the_most_that_this_allows(groups: int, units: int, data: st.DataObject) -> None:
    points = data.draw(st.lists(POINTS, min_size=groups * units, max_size=groups * units))
    score, kept = torch.tensor(points, dtype=torch.float64), data.draw(st.integers(1, units))
    (found,) = select([score], [groups * kept], [groups])
    assert torch.bincount(found // units, minlength=groups).tolist() == [kept] * groups
    assert float(score[found].sum()) == sum(worth(run, kept) for run in score.view(groups, units))
    assert sorted(ranking(score, groups).tolist()) == list(range(groups * units))


def test_a_step_of_groups_is_worth_the_next_unit_of_each() -> None:
    # Steps of the groups are worth 9 + 1 and 1 + 1; ranked alone, the units would go as 9, 1, 1, 1.
    grouped = Candidate(torch.tensor([9.0, 1.0, 1.0, 1.0]), 1, 2, "queries", 2)
    other = Candidate(torch.tensor([4.0, 4.0]), 2, 1, "mlp")
    # Of 8 parameters 4 stay: a step of each is worth 5 and 2 for each parameter.
    assert allocate([grouped, other], 0.5, min_keep=0) == [2, 1]
    assert allocate([grouped, other], 0.75, min_keep=0) == [2, 2]
