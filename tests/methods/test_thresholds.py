"""One threshold over all matrices: against trying every score as a threshold, on small toys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minisp.errors import ConfigError, NumericalError
from minisp.methods.selection import Candidate, allocate, select
from minisp.methods.thresholds import (
    CostHistogram,
    LineScores,
    least_count,
    line_threshold,
    linear_shots,
    removed_weights,
)
from minisp.ranks import Ranks
from tests.methods.fisher import few_examples

pytestmark = pytest.mark.usefixtures("one_thread")

# Few different scores: ties are common.
POINTS = st.integers(0, 12)
SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


def gone(matrix: LineScores, threshold: float) -> Tensor:
    rows, columns = matrix.removed(threshold)
    return rows[:, None] | columns


def test_shots_take_equal_steps_to_the_target() -> None:
    assert linear_shots(0.5, 4) == [0.125, 0.25, 0.375, 0.5]
    assert linear_shots(0.3, 1) == [0.3]
    for share, shots in ((0.5, 0), (0.0, 3), (1.0, 3)):
        with pytest.raises(ConfigError, match="Shots"):
            linear_shots(share, shots)


def test_a_share_is_read_as_it_is_written() -> None:
    assert least_count(0.1, 30) == 3 and least_count(0.7, 10) == 7 and least_count(0.71, 10) == 8


@few_examples
@given(SHAPES, st.floats(0.01, 0.99), st.data())
def test_the_threshold_is_the_least_that_removes_the_share(
    shapes: list[tuple[int, int]], share: float, data: st.DataObject
) -> None:
    def points(count: int) -> Tensor:
        return torch.tensor(data.draw(st.lists(POINTS, min_size=count, max_size=count)), dtype=torch.float32)

    matrices = [LineScores(points(rows), points(columns)) for rows, columns in shapes]
    target = share * sum(rows * columns for rows, columns in shapes)
    every = sorted({float(s) for m in matrices for scores in (m.rows, m.columns) for s in scores})
    wanted = next(t for t in every if sum(int(gone(m, t).sum()) for m in matrices) >= target - 1e-9)
    threshold = line_threshold(matrices, share)
    assert threshold == wanted and isinstance(threshold, float)
    for matrix in matrices:
        rows, columns = matrix.removed(threshold)
        size = len(rows), len(columns)
        assert removed_weights(*size, int(rows.sum()), int(columns.sum())) == int(gone(matrix, threshold).sum())


def test_a_free_column_goes_first_and_what_is_gone_goes_again() -> None:
    scores = LineScores(torch.tensor([3.0, 2.0, 0.5]), torch.tensor([4.0, 0.0, 5.0, 1.0]))
    assert line_threshold([scores], 0.01) == 0
    shots = [line_threshold([scores], share) for share in linear_shots(0.9, 9)]
    assert shots == sorted(shots)
    first, last = (scores.removed(threshold) for threshold in (shots[1], shots[-1]))
    assert all(bool((later | ~earlier).all()) for earlier, later in zip(first, last, strict=True))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        line_threshold([LineScores(torch.tensor([1.0, torch.nan]), torch.ones(2))], 0.5)
    for bad in (torch.nan, torch.inf, -1.0):
        with pytest.raises(NumericalError, match="at least 0"):
            CostHistogram().update_(torch.tensor([[1.0, bad]]))


@few_examples
@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.integers(1, 4))
def test_a_histogram_finds_the_threshold_of_all_matrices_to_its_resolution(seed: int, share: float, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.exp(4 * torch.randn(300, generator=generator))
    costs[:10] = 0
    histogram = CostHistogram()
    for chunk in costs.chunk(parts):
        histogram.update_(chunk.view(1, -1))
    threshold = histogram.threshold(share)
    exact = float(costs.sort().values[least_count(share, 300) - 1])
    assert exact <= threshold <= exact * (1 + 1 / 4096) + 1e-37
    assert int((costs <= threshold).sum()) >= share * 300 - 1e-9
    assert int(histogram.counts.sum()) == 300


def test_a_negative_zero_is_free() -> None:
    histogram = CostHistogram()
    histogram.update_(torch.tensor([-0.0, 1.0, 2.0, 3.0]))
    assert 0 <= histogram.threshold(0.25) < 1e-37


def test_histograms_add_up() -> None:
    one, other, both = CostHistogram(), CostHistogram(), CostHistogram()
    costs = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    one.update_(costs[0])
    other.update_(costs[1])
    both.update_(costs.T)
    assert torch.equal(one.counts + other.counts, both.counts)


def test_histograms_of_all_processes_add_up() -> None:
    class Twice(Ranks):
        def sum_(self, *tensors: Tensor) -> None:
            for tensor in tensors:
                tensor.mul_(2)

    histogram = CostHistogram()
    histogram.update_(torch.ones(3))
    histogram.sum_over_(Twice())
    assert int(histogram.counts.sum()) == 6


def test_the_largest_float_has_a_bin() -> None:
    histogram = CostHistogram()
    histogram.update_(torch.tensor([1.0, torch.finfo(torch.float32).max]))
    threshold = histogram.threshold(1.0)
    assert threshold == torch.finfo(torch.float32).max and isinstance(threshold, float)


def test_units_of_coupled_structures_go_by_their_cost_per_parameter() -> None:
    # Units of 6 and of 2 parameters; a threshold on cost per parameter of 1.5 leaves 4 and 2 of them.
    dear = torch.tensor([6.0, 12.0, 18.0, 24.0, 30.0, 3.0])
    cheap = torch.tensor([1.0, 2.0, 4.0, 8.0])
    candidates = [Candidate(dear, 6, 1, "a"), Candidate(cheap, 2, 1, "b")]
    stays = int((dear / 6 > 1.5).sum()) * 6 + int((cheap / 2 > 1.5).sum()) * 2
    sizes = allocate(candidates, stays / 44, min_keep=0)
    kept = select([dear, cheap], sizes)
    assert kept[0].tolist() == (dear / 6 > 1.5).nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert kept[1].tolist() == (cheap / 2 > 1.5).nonzero().flatten().tolist() == [2, 3]
