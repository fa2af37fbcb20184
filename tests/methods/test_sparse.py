"""Patterns, SparseGPT, and the proof of a pattern, against brute force on the whole quadratic model in float64."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minisp.config import Pattern
from minisp.errors import ConfigError
from minisp.methods.curvature import Curvature, Factor
from minisp.methods.sparse import (
    least,
    least_groups,
    magnitude_scores,
    sparsegpt,
    sparsity_facts,
    wanda_scores,
)
from minisp.methods.surgeon import change_cost, element_costs, update_elements
from tests.methods.fisher import factorial, few_examples, normal, removal

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 3, 8


def identity(size: int) -> Factor:
    return Factor.of_(torch.eye(size, dtype=torch.float64), 0.0)


def with_inputs(a: Tensor, damping: float = 0.0) -> Curvature:
    """G = I, and A = Σ a aᵀ."""
    return Curvature.nearest(Factor.of_(a.T @ a, damping), identity(ROWS))


def toy(seed: int = 0, damping: float = 0.0) -> tuple[Tensor, Curvature, Tensor]:
    """F (R C, R C) with G = I, its curvature, and W (R, C)."""
    curvature = with_inputs(normal(20, COLUMNS, seed=seed) @ normal(COLUMNS, COLUMNS, seed=seed + 1), damping)
    information = curvature.scale * torch.kron(torch.eye(ROWS).double(), curvature.inputs.matrix)
    return information, curvature, normal(ROWS, COLUMNS, seed=seed + 2)


def block_inputs(size: int, seed: int = 0) -> Curvature:
    """Inputs that correlate inside groups of `size` alone."""
    a = torch.block_diag(*(normal(6, size, seed=seed + place) for place in range(COLUMNS // size)))
    return with_inputs(a)


@pytest.mark.parametrize(("pattern", "kept", "size"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_groups_keep_their_highest_scores(pattern: Pattern, kept: int, size: int) -> None:
    scores = normal(ROWS, 16, seed=0).square()
    removed = least(scores, pattern, 0.9)
    for row in range(ROWS):
        for start in range(0, 16, size):
            group = scores[row, start : start + size].tolist()
            wanted = sorted(range(size), key=lambda place: group[place])[: size - kept]
            assert removed[row, start : start + size].nonzero().flatten().tolist() == sorted(wanted)


def test_a_share_of_the_matrix_or_of_each_row_goes() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 0.0]])
    assert least(scores, "unstructured", 0.5).int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert least(scores, "unstructured", 0.5, by_row=True).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 1]]
    # Of equal scores the first.
    assert least(torch.ones(1, 4), "2:4", 0.5).int().tolist() == [[1, 1, 0, 0]]


def test_magnitude_and_wanda_are_the_surgeons_costs_of_simpler_curvatures() -> None:
    _, curvature, weight = toy()
    plain = Curvature(identity(COLUMNS), identity(ROWS), 1.0)
    torch.testing.assert_close(element_costs(plain, weight).float(), magnitude_scores(weight) / 2)
    assert magnitude_scores(torch.tensor([[-3.0]])).item() == 9
    squares = curvature.inputs.matrix.diagonal() * curvature.inputs.level
    diagonal = Curvature.nearest(Factor.of_(torch.diag(squares), 0.0), identity(ROWS))
    torch.testing.assert_close(element_costs(diagonal, weight).float(), wanda_scores(weight, squares) / 2)
    assert wanda_scores(torch.tensor([[-3.0, 1.0]]), torch.tensor([2.0, 5.0])).tolist() == [[18.0, 5.0]]


def group_masks(size: int, count: int) -> list[Tensor]:
    return [
        torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(p), True)
        for p in combinations(range(size), count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_group_by_itself_loses_what_costs_least(seed: int) -> None:
    information, curvature, weight = toy(seed)
    removed = least_groups(curvature.inputs, weight, "2:4")
    for row in range(ROWS):
        for start in (0, 4):
            costs = {}
            for mask in group_masks(4, 2):
                alone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
                alone[row, start : start + 4] = mask
                costs[tuple(mask.tolist())], _ = removal(information, weight, alone)
            assert tuple(removed[row, start : start + 4].tolist()) == min(costs, key=lambda mask: costs[mask])


def test_groups_of_eight() -> None:
    information, curvature, weight = toy(5)
    removed = least_groups(curvature.inputs, weight[:1], "4:8")
    costs = []
    for mask in group_masks(8, 4):
        alone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        alone[0] = mask
        costs.append((removal(information, weight, alone)[0], mask))
    assert torch.equal(removed[0], min(costs, key=lambda pair: pair[0])[1])


@few_examples
@given(st.integers(0, 200))
def test_where_groups_do_not_correlate_the_best_mask_never_costs_more_than_another(seed: int) -> None:
    curvature, weight = block_inputs(4, seed), normal(ROWS, COLUMNS, seed=seed + 9)

    def cost(removed: Tensor) -> float:
        return change_cost(curvature, weight, update_elements(curvature, weight, removed))

    best = cost(least_groups(curvature.inputs, weight, "2:4"))
    for scores in (magnitude_scores(weight), element_costs(curvature, weight)):
        assert best <= cost(least(scores, "2:4", 0.5)) * (1 + 1e-9)


def test_the_best_mask_of_a_group_does_not_depend_on_the_outputs() -> None:
    tokens = factorial(ROWS, COLUMNS)
    weight = normal(ROWS, COLUMNS, seed=3)
    inputs, gradients = Factor.of_(tokens.a.T @ tokens.a, 0.1), Factor.of_(tokens.g.T @ tokens.g, 0.1)
    removed = least_groups(inputs, weight, "2:4")
    information = torch.kron(gradients.matrix, inputs.matrix)
    for row in range(ROWS):
        costs = []
        for mask in group_masks(4, 2):
            alone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
            alone[row, 4:] = mask
            costs.append((removal(information, weight, alone)[0], mask))
        assert torch.equal(removed[row, 4:], min(costs, key=lambda pair: pair[0])[1])


def greedy(a: Tensor, weight: Tensor, removed: Tensor) -> Tensor:
    """For a given mask: column by column, the best change of all columns behind, found from the inputs themselves."""
    now = weight.clone()
    for column in range(weight.shape[1]):
        rows = removed[:, column]
        lost = now[rows, column].clone()
        now[rows, column] = 0
        behind = a[:, column + 1 :]
        if behind.shape[1]:
            now[rows, column + 1 :] += lost[:, None] * torch.linalg.lstsq(behind, a[:, column : column + 1]).solution.T
    return now


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
@pytest.mark.parametrize("columns", [8, 16, 32])
def test_sparsegpt_makes_up_for_each_column_with_those_behind(pattern: Pattern, columns: int) -> None:
    a, weight = normal(60, 24, seed=0) @ normal(24, 24, seed=1), normal(5, 24, seed=2)
    found = sparsegpt(Factor.of_(a.T @ a, 0.0), weight, pattern, 0.5, columns=columns)
    facts = sparsity_facts(found, pattern)
    assert facts.holds and facts.zeros == 60
    torch.testing.assert_close(found, greedy(a, weight, found == 0))
    assert not torch.allclose(found, weight.masked_fill(found == 0, 0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_the_block_of_columns_changes_nothing_where_groups_decide(pattern: Pattern) -> None:
    a, weight = normal(60, 24, seed=0) @ normal(24, 24, seed=1), normal(5, 24, seed=2)
    results = [sparsegpt(Factor.of_(a.T @ a, 0.01), weight, pattern, 0.5, columns=n) for n in (8, 16, 128)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("seed", range(6))
def test_sparsegpt_is_brute_force_where_greedy_is_optimal(seed: int) -> None:
    # Inputs do not correlate: costs add up, and nothing can be made up for.
    squares = torch.linspace(0.5, 3, COLUMNS, dtype=torch.float64)
    weight = normal(ROWS, COLUMNS, seed=seed)
    curvature = Curvature.nearest(Factor.of_(torch.diag(squares), 0.0), identity(ROWS))
    found = sparsegpt(curvature.inputs, weight, "2:4", 0.5)
    masks = [torch.cat(pair) for pair in product(group_masks(4, 2), repeat=2)]
    for row in range(ROWS):
        best = min((float((squares * weight[row].square())[mask].sum()) / 2, place) for place, mask in enumerate(masks))
        assert torch.equal(found[row] == 0, masks[best[1]])
        assert torch.equal(found[row], weight[row].masked_fill(masks[best[1]], 0))


@pytest.mark.parametrize("seed", range(6))
def test_sparsegpt_takes_the_cheapest_of_what_it_may_in_every_group(seed: int) -> None:
    # One weight of eight goes from each row. Those before it are fixed, so [A⁻¹]_jj is that of the inputs from j on.
    information, curvature, weight = toy(seed)
    found = sparsegpt(curvature.inputs, weight, "unstructured", 1 / 24)
    costs = []
    for row, column in product(range(ROWS), range(COLUMNS)):
        inputs = curvature.inputs.matrix[column:, column:]
        cost = 0.5 * float(weight[row, column] ** 2 / torch.linalg.inv(inputs)[0, 0])
        costs.append((cost * curvature.scale, row, column))
    cost, row, column = min(costs)
    assert (found == 0).nonzero().tolist() == [[row, column]]
    assert change_cost(curvature, weight, found) == pytest.approx(cost)
    if column == 0:
        # All inputs are free: nothing is greedy about it.
        _, wanted = removal(information, weight, found == 0)
        torch.testing.assert_close(found, wanted)


def test_the_first_column_alone_is_removed_as_exactly_as_can_be() -> None:
    information, curvature, weight = toy()
    weight[:, 0] = 1e-3
    found = sparsegpt(curvature.inputs, weight, "unstructured", 1 / 8)
    assert (found == 0)[:, 0].all() and int((found == 0).sum()) == ROWS
    cost, wanted = removal(information, weight, found == 0)
    torch.testing.assert_close(found, wanted)
    assert change_cost(curvature, weight, found) == pytest.approx(cost)


@few_examples
@given(st.integers(0, 100))
def test_the_joint_update_of_its_mask_never_costs_more_than_sparsegpt(seed: int) -> None:
    _, curvature, weight = toy(seed, 0.01)
    found = sparsegpt(curvature.inputs, weight, "2:4", 0.5)
    joint = update_elements(curvature, weight, found == 0)
    assert change_cost(curvature, weight, joint) <= change_cost(curvature, weight, found) * (1 + 1e-9)


def test_weights_of_dead_inputs_go_first_and_move_nothing() -> None:
    a, weight = normal(20, COLUMNS, seed=0), 10 + normal(ROWS, COLUMNS, seed=1)
    a[:, [1, 2]] = 0
    inputs = Factor.of_(a.T @ a, 0.01)
    for removed in (sparsegpt(inputs, weight, "2:4", 0.5) == 0, least_groups(inputs, weight, "2:4")):
        assert removed[:, 1:3].all()
    found = sparsegpt(inputs, weight, "unstructured", 0.25)
    assert torch.equal(found, weight.masked_fill(torch.isin(torch.arange(COLUMNS), torch.tensor([1, 2])), 0))


def test_facts_of_a_matrix() -> None:
    weight = torch.tensor([[0.0, 1, 2, 0, 1, 1, 0, 0], [0, 1, 2, 3, 0, 0, 0, 5], [0, -0.0, 0, 0, 0, 0, 0, 0]])
    facts = sparsity_facts(weight, "2:4")
    assert (facts.weights, facts.zeros, facts.groups, facts.broken) == (24, 16, 6, 1)
    assert (facts.zero_rows, facts.zero_columns, facts.share, facts.holds) == (1, 2, 16 / 24, False)
    # The group of eight of the second row has four that are not zero.
    facts = sparsity_facts(weight, "4:8")
    assert (facts.groups, facts.broken, facts.holds) == (3, 0, True)
    facts = sparsity_facts(weight, "unstructured")
    assert (facts.groups, facts.broken, facts.holds, facts.zeros) == (0, 0, True, 16)
    # Not a number is not zero.
    assert not sparsity_facts(torch.full((1, 4), torch.nan), "2:4").holds


def test_what_cannot_be_is_refused() -> None:
    inputs, weight = identity(6), torch.ones(2, 6)
    for call in (
        lambda: least(weight, "2:4", 0.5),
        lambda: least_groups(inputs, weight, "2:4"),
        lambda: sparsegpt(inputs, weight, "2:4", 0.5),
        lambda: sparsity_facts(weight, "2:4"),
    ):
        with pytest.raises(ConfigError, match="multiple of 4, got 6"):
            call()
    with pytest.raises(ConfigError, match="blocks of a multiple of 4 columns, got 6"):
        sparsegpt(identity(8), torch.ones(2, 8), "2:4", 0.5, columns=6)
    with pytest.raises(ConfigError, match="groups"):
        least_groups(inputs, weight, "unstructured")
