"""Costs and updates of the Surgeon, against optimal brain surgery on the whole Fisher matrix in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.errors import NumericalError
from minisp.methods.curvature import Curvature, Factor, with_bias
from minisp.methods.reconstruction import refit
from minisp.methods.surgeon import (
    Part,
    change_cost,
    column_costs,
    element_costs,
    row_costs,
    scatter,
    unit_costs,
    update_elements,
    update_lines,
)
from tests.methods.fisher import COLUMNS, ROWS, Tokens, factorial, few_examples, fisher, lines, normal, removal

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_ROW, EVERY_COLUMN = torch.arange(ROWS), torch.arange(COLUMNS)


def curvature_of(tokens: Tokens, damping_a: float = 0.0, damping_g: float = 0.0) -> Curvature:
    inputs, gradients = tokens.a.T @ tokens.a, tokens.g.T @ tokens.g
    return Curvature.independent(Factor.of_(inputs, damping_a), Factor.of_(gradients, damping_g), len(tokens.a))


def toy(seed: int = 0) -> tuple[Tensor, Curvature, Tensor]:
    """F of the tokens themselves (R C, R C), its curvature, and W (R, C)."""
    tokens = factorial(seed=seed)
    return fisher(tokens), curvature_of(tokens), normal(ROWS, COLUMNS, seed=seed + 10)


def places(*blocks: tuple[int, ...]) -> Tensor:
    return torch.tensor(blocks)


def without(size: int, gone: list[int]) -> Tensor:
    return torch.tensor([place for place in range(size) if place not in gone], dtype=torch.int64)


def removed_lines(curvature: Curvature, weight: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    kept = without(weight.shape[0], rows), without(weight.shape[1], columns)
    return scatter(update_lines(curvature, weight, *kept), *kept, (weight.shape[0], weight.shape[1]))


def damped(seed: int = 0) -> tuple[Tensor, Curvature, Tensor]:
    """As `toy`, with the dampings 0.01 and 0.1 in F as well."""
    tokens = factorial(seed=seed)
    a, g = tokens.a.T @ tokens.a, tokens.g.T @ tokens.g
    a.diagonal().add_(0.01 * a.diagonal().mean())
    g.diagonal().add_(0.1 * g.diagonal().mean())
    return torch.kron(g, a) / len(tokens.a), curvature_of(tokens, 0.01, 0.1), normal(ROWS, COLUMNS, seed=seed + 10)


def mask(share: float, seed: int = 0) -> Tensor:
    return torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) < share


def test_an_element_costs_what_removing_it_alone_does() -> None:
    information, curvature, weight = toy()
    costs = element_costs(curvature, weight)
    for row in range(ROWS):
        for column in range(COLUMNS):
            removed = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
            removed[row, column] = True
            cost, _ = removal(information, weight, removed)
            assert float(costs[row, column]) == pytest.approx(cost, rel=1e-9)


def test_a_row_or_column_costs_what_removing_it_alone_does() -> None:
    information, curvature, weight = toy()
    rows = row_costs(curvature, weight, EVERY_ROW[:, None])
    columns = column_costs(curvature, weight, EVERY_COLUMN[:, None])
    wanted_rows = [removal(information, weight, lines(weight, [row], []))[0] for row in range(ROWS)]
    wanted_columns = [removal(information, weight, lines(weight, [], [column]))[0] for column in range(COLUMNS)]
    assert rows.tolist() == pytest.approx(wanted_rows, rel=1e-9)
    assert columns.tolist() == pytest.approx(wanted_columns, rel=1e-9)
    # The published scalar forms.
    a, g = curvature.inputs.matrix, curvature.gradients.matrix
    scalar = 0.5 * curvature.scale * ((weight @ a) * weight).sum(1) / torch.linalg.inv(g).diagonal()
    torch.testing.assert_close(rows, scalar)
    scalar = 0.5 * curvature.scale * (weight * (g @ weight)).sum(0) / torch.linalg.inv(a).diagonal()
    torch.testing.assert_close(columns, scalar)


def test_a_set_of_rows_or_columns_costs_what_removing_it_together_does() -> None:
    information, curvature, weight = toy()
    rows = row_costs(curvature, weight, places((0, 2), (4, 1)))
    wanted = [removal(information, weight, lines(weight, block, []))[0] for block in ([0, 2], [4, 1])]
    assert rows.tolist() == pytest.approx(wanted, rel=1e-9)
    columns = column_costs(curvature, weight, places((0, 5, 3), (2, 1, 4)))
    wanted = [removal(information, weight, lines(weight, [], block))[0] for block in ([0, 5, 3], [2, 1, 4])]
    assert columns.tolist() == pytest.approx(wanted, rel=1e-9)
    # Not the sum of what its rows cost alone.
    alone = row_costs(curvature, weight, EVERY_ROW[:, None])
    assert abs(float(rows[0] / alone[[0, 2]].sum()) - 1) > 0.01


def test_a_unit_costs_what_its_rows_and_columns_do_in_all_its_maps() -> None:
    information, curvature, weight = toy()
    other_information, other_curvature, other = toy(seed=50)
    parts = [Part(curvature, weight, places((0, 1), (3, 4)), 0), Part(other_curvature, other, places((2,), (5,)), 1)]
    wanted = [
        removal(information, weight, lines(weight, rows, []))[0]
        + removal(other_information, other, lines(other, [], columns))[0]
        for rows, columns in (([0, 1], [2]), ([3, 4], [5]))
    ]
    # An iterable that can be read once: maps may be loaded one at a time.
    assert unit_costs(iter(parts)).tolist() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("rows", "columns"), [([3], []), ([0, 2, 3], []), ([], [1]), ([], [0, 4, 5]), ([1, 4], [2, 3]), ([2], [0])]
)
def test_rows_and_columns_are_made_up_for_jointly(rows: list[int], columns: list[int]) -> None:
    information, curvature, weight = toy()
    cost, wanted = removal(information, weight, lines(weight, rows, columns))
    found = removed_lines(curvature, weight, rows, columns)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert not found[lines(weight, rows, columns)].any()
    assert change_cost(curvature, weight, found) == pytest.approx(cost, rel=1e-9)


def test_the_published_forms_of_the_updates() -> None:
    _, curvature, weight = toy()
    inverse_g, inverse_a = (torch.linalg.inv(f.matrix) for f in (curvature.gradients, curvature.inputs))
    gone = [0, 3]
    row_change = -inverse_g[:, gone] @ torch.linalg.inv(inverse_g[gone][:, gone]) @ weight[gone]
    torch.testing.assert_close(removed_lines(curvature, weight, gone, []), weight + row_change)
    column_change = -weight[:, gone] @ torch.linalg.inv(inverse_a[gone][:, gone]) @ inverse_a[gone]
    torch.testing.assert_close(removed_lines(curvature, weight, [], gone), weight + column_change)


@pytest.mark.parametrize("damping", [1e-3, 0.05, 1.0])
def test_the_update_of_columns_is_the_refit_of_this_project(damping: float) -> None:
    tokens, weight = factorial(), normal(ROWS, COLUMNS, seed=10)
    kept = torch.tensor([0, 2, 5])
    found = update_lines(curvature_of(tokens, damping), weight, EVERY_ROW, kept)
    config = MinifyConfig(damping=damping, shrink_to="original")
    wanted, _ = refit(tokens.a.T @ tokens.a, kept, weight, len(tokens.a), config)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    # And no other damping's.
    other, _ = refit(tokens.a.T @ tokens.a, kept, weight, len(tokens.a), MinifyConfig(damping=2 * damping))
    assert not torch.allclose(found, other, rtol=1e-6)


def test_damping_counts_in_costs_and_updates() -> None:
    tokens, weight = factorial(), normal(ROWS, COLUMNS, seed=10)
    a, g = tokens.a.T @ tokens.a, tokens.g.T @ tokens.g
    a.diagonal().add_(0.3 * a.diagonal().mean())
    g.diagonal().add_(0.7 * g.diagonal().mean())
    information, curvature = torch.kron(g, a) / len(tokens.a), curvature_of(tokens, 0.3, 0.7)
    cost, wanted = removal(information, weight, lines(weight, [1], [2]))
    found = removed_lines(curvature, weight, [1], [2])
    torch.testing.assert_close(found, wanted)
    assert change_cost(curvature, weight, found) == pytest.approx(cost)
    cost, _ = removal(information, weight, lines(weight, [1], []))
    assert float(row_costs(curvature, weight, places((1,)))) == pytest.approx(cost)
    cost, wanted = removal(information, weight, mask(0.4))
    torch.testing.assert_close(update_elements(curvature, weight, mask(0.4)), wanted)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("largest", [1000, 0])
def test_elements_are_made_up_for_jointly(share: float, largest: int) -> None:
    exact = largest > 0
    information, curvature, weight = toy() if exact else damped()
    removed = mask(share)
    cost, wanted = removal(information, weight, removed)
    found = update_elements(curvature, weight, removed, largest=largest)
    assert not found[removed].any() and removed.any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 if exact else 2e-3)
    assert change_cost(curvature, weight, found) == pytest.approx(cost, rel=1e-9 if exact else 1e-5)


def test_the_system_of_removed_elements_is_the_one_in_the_eigenbases() -> None:
    _, curvature, weight = toy()
    removed = mask(0.3)
    s_g, k_g = torch.linalg.eigh(curvature.gradients.matrix)
    s_a, k_a = torch.linalg.eigh(curvature.inputs.matrix)

    def inverse_times(matrix: Tensor) -> Tensor:
        """F⁻¹ vec X = K_G ((K_Gᵀ X K_A) / (s_G s_Aᵀ)) K_Aᵀ."""
        scaled: Tensor = k_g @ ((k_g.T @ matrix @ k_a) / (s_g[:, None] * s_a)) @ k_a.T
        return scaled

    units = torch.eye(int(removed.sum()), dtype=torch.float64)
    spread = torch.zeros(len(units), ROWS, COLUMNS, dtype=torch.float64)
    spread[:, removed] = units
    system = torch.stack([inverse_times(matrix)[removed] for matrix in spread])
    solution = (spread * torch.linalg.solve(system, weight[removed])[:, None, None]).sum(0)
    torch.testing.assert_close(update_elements(curvature, weight, removed), weight - inverse_times(solution))


def test_every_step_beyond_the_bound_costs_less_from_the_mask_alone_on() -> None:
    tokens = factorial(seed=3)
    curvature, weight, removed = curvature_of(tokens, 0.01, 0.1), normal(ROWS, COLUMNS, seed=4), mask(0.5)

    def cost(steps: int) -> float:
        return change_cost(curvature, weight, update_elements(curvature, weight, removed, largest=0, steps=steps))

    costs = [cost(steps) for steps in range(8)]
    assert costs[0] == pytest.approx(change_cost(curvature, weight, weight.masked_fill(removed, 0)))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(costs))
    assert costs[1] < costs[0]
    assert cost(50) == pytest.approx(change_cost(curvature, weight, update_elements(curvature, weight, removed)))


def test_whole_rows_and_columns_are_elements_too() -> None:
    _, curvature, weight = toy()
    removed = lines(weight, [1], [0, 4])
    wanted = removed_lines(curvature, weight, [1], [0, 4])
    torch.testing.assert_close(update_elements(curvature, weight, removed), wanted)


@pytest.mark.parametrize("largest", [1000, 0])
def test_removing_again_what_is_gone_changes_nothing(largest: int) -> None:
    _, curvature, weight = toy()
    once = removed_lines(curvature, weight, [1], [2])
    torch.testing.assert_close(removed_lines(curvature, once, [1], [2]), once, rtol=0, atol=1e-14)
    removed = lines(weight, [1], [2])
    once = update_elements(curvature, weight, removed)
    torch.testing.assert_close(update_elements(curvature, once, removed, largest=largest), once, rtol=0, atol=1e-12)
    assert float(row_costs(curvature, once, places((1,)))) == 0
    assert float(column_costs(curvature, once, places((2,)))) == 0
    # More may go later: what is gone stays so, and counts among the constraints.
    later = update_elements(curvature, once, removed | mask(0.2))
    _, wanted = removal(toy()[0], once, removed | mask(0.2))
    torch.testing.assert_close(later, wanted)


@pytest.mark.parametrize("largest", [1000, 0])
def test_a_dead_input_or_output_costs_nothing_and_nothing_makes_up_for_it(largest: int) -> None:
    tokens, weight = factorial(), normal(ROWS, COLUMNS, seed=10)
    tokens.a[:, 3] = 0
    tokens.g[:, 1] = 0
    curvature = curvature_of(tokens, 0.01, 0.1)
    costs = element_costs(curvature, weight)
    assert not costs[:, 3].any() and not costs[1].any()
    live_rows, live_columns = without(ROWS, [1]), without(COLUMNS, [3])
    assert bool((costs[live_rows][:, live_columns] > 0).all())
    columns, rows = (
        column_costs(curvature, weight, EVERY_COLUMN[:, None]),
        row_costs(curvature, weight, EVERY_ROW[:, None]),
    )
    assert (columns == 0).nonzero().flatten().tolist() == [3] and (rows == 0).nonzero().flatten().tolist() == [1]
    # A set costs what its live rows do.
    pair = row_costs(curvature, weight, places((1, 2)))
    assert float(pair) == pytest.approx(float(rows[2]))
    found = removed_lines(curvature, weight, [1], [3])
    assert torch.equal(found[live_rows][:, live_columns], weight[live_rows][:, live_columns])
    removed = lines(weight, [1], [3])
    found = update_elements(curvature, weight, removed, largest=largest)
    torch.testing.assert_close(found, weight.masked_fill(removed, 0), rtol=0, atol=0)
    # Dead places that stay keep their weights; the others are treated as if these were not there.
    removed[1], removed[:, 3], removed[0, 0] = False, False, True
    found = update_elements(curvature, weight, removed, largest=largest)
    assert torch.equal(found[:, 3], weight[:, 3]) and torch.equal(found[1], weight[1])
    assert not torch.equal(found, weight.masked_fill(removed, 0))


def test_a_map_that_nothing_passes_is_free() -> None:
    curvature = curvature_of(Tokens(torch.zeros(4, COLUMNS).double(), torch.zeros(4, ROWS).double()), 0.01, 0.1)
    weight = normal(ROWS, COLUMNS, seed=1)
    assert not element_costs(curvature, weight).any()
    assert not row_costs(curvature, weight, EVERY_ROW[:, None]).any()
    found = removed_lines(curvature, weight, [0], [1])
    assert torch.equal(found, weight.masked_fill(lines(weight, [0], [1]), 0))


def test_a_bias_takes_part_and_stays() -> None:
    tokens, weight = factorial(), normal(ROWS, COLUMNS + 1, seed=10)
    ones = torch.cat([tokens.a, torch.ones(len(tokens.a), 1, dtype=torch.float64)], 1)
    information = fisher(Tokens(ones, tokens.g))
    inputs = Factor.of_(with_bias(tokens.a.T @ tokens.a, tokens.a.sum(0), len(ones)), 0.0)
    curvature = Curvature.independent(inputs, Factor.of_(tokens.g.T @ tokens.g, 0.0), len(ones))
    cost, wanted = removal(information, weight, lines(weight, [], [2]))
    found = removed_lines(curvature, weight, [], [2])
    torch.testing.assert_close(found, wanted)
    assert float(column_costs(curvature, weight, places((2,)))) == pytest.approx(cost)
    assert not torch.allclose(found[:, -1], weight[:, -1])
    # A row goes with its bias.
    cost, _ = removal(information, weight, lines(weight, [2], []))
    assert float(row_costs(curvature, weight, places((2,)))) == pytest.approx(cost)


@few_examples
@given(st.permutations(range(ROWS)), st.permutations(range(COLUMNS)), st.integers(0, 5))
def test_permuting_rows_and_columns_permutes_costs_and_updates(rows: list[int], columns: list[int], seed: int) -> None:
    tokens, weight = factorial(seed=seed), normal(ROWS, COLUMNS, seed=seed + 10)
    turned, turned_weight = Tokens(tokens.a[:, columns], tokens.g[:, rows]), weight[rows][:, columns]
    before, after = (curvature_of(t, 0.01, 0.1) for t in (tokens, turned))
    torch.testing.assert_close(element_costs(after, turned_weight), element_costs(before, weight)[rows][:, columns])
    costs = row_costs(before, weight, EVERY_ROW[:, None])
    torch.testing.assert_close(row_costs(after, turned_weight, EVERY_ROW[:, None]), costs[rows])
    removed = mask(0.3, seed)
    found = update_elements(after, turned_weight, removed[rows][:, columns])
    torch.testing.assert_close(found, update_elements(before, weight, removed)[rows][:, columns])
    gone = [rows.index(1)], [columns.index(2)]
    wanted = removed_lines(before, weight, [1], [2])[rows][:, columns]
    torch.testing.assert_close(removed_lines(after, turned_weight, *gone), wanted)


@few_examples
@given(st.floats(-6, 6), st.integers(0, 5))
def test_a_scale_that_moves_between_the_factors_changes_nothing(exponent: float, seed: int) -> None:
    tokens, weight = factorial(seed=seed), normal(ROWS, COLUMNS, seed=seed + 10)
    scaled = Tokens(tokens.a * 10**exponent, tokens.g / 10**exponent)
    before, after = (curvature_of(t, 0.01, 0.1) for t in (tokens, scaled))
    torch.testing.assert_close(element_costs(after, weight), element_costs(before, weight))
    torch.testing.assert_close(
        column_costs(after, weight, EVERY_COLUMN[:, None]), column_costs(before, weight, EVERY_COLUMN[:, None])
    )
    torch.testing.assert_close(removed_lines(after, weight, [1], [2]), removed_lines(before, weight, [1], [2]))
    removed = mask(0.4, seed)
    for largest in (0, 1000):
        found, wanted = (update_elements(c, weight, removed, largest=largest) for c in (after, before))
        # Rounding may end the steps earlier or later.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 if largest else 2e-3)


@few_examples
@given(st.integers(0, 5), st.data())
def test_no_update_of_the_same_zeros_costs_less(seed: int, data: st.DataObject) -> None:
    tokens, weight = factorial(seed=seed), normal(ROWS, COLUMNS, seed=seed + 10)
    curvature, removed = curvature_of(tokens, 0.01, 0.1), mask(data.draw(st.floats(0.05, 0.95)), seed)
    found = update_elements(curvature, weight, removed)
    other = found + 0.1 * normal(ROWS, COLUMNS, seed=seed + 20).masked_fill(removed, 0)
    assert change_cost(curvature, weight, found) <= change_cost(curvature, weight, other)
    masked = change_cost(curvature, weight, weight.masked_fill(removed, 0))
    assert change_cost(curvature, weight, found) <= masked * (1 + 1e-12)


def test_everything_or_nothing_may_go() -> None:
    _, curvature, weight = toy()
    assert torch.equal(removed_lines(curvature, weight, [], []), weight)
    assert not removed_lines(curvature, weight, list(range(ROWS)), []).any()
    assert not removed_lines(curvature, weight, [], list(range(COLUMNS))).any()
    for largest in (0, 1000):
        nothing, all_of_it = torch.zeros_like(weight, dtype=torch.bool), torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(update_elements(curvature, weight, nothing, largest=largest), weight)
        assert not update_elements(curvature, weight, all_of_it, largest=largest).any()


def test_float32_and_half_weights_agree_with_float64() -> None:
    tokens, weight = factorial(), normal(ROWS, COLUMNS, seed=10).to(torch.bfloat16)
    exact = curvature_of(tokens, 0.01, 0.1)
    single = curvature_of(Tokens(tokens.a.float(), tokens.g.float()), 0.01, 0.1)
    for costs in (row_costs, column_costs):
        size = ROWS if costs is row_costs else COLUMNS
        found, wanted = (costs(c, weight, torch.arange(size)[:, None]) for c in (single, exact))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    found = removed_lines(single, weight, [1], [2])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), removed_lines(exact, weight, [1], [2]), rtol=1e-3, atol=1e-4)
    found = update_elements(single, weight, mask(0.5))
    torch.testing.assert_close(found.double(), update_elements(exact, weight, mask(0.5)), rtol=1e-3, atol=1e-3)


def test_a_singular_factor_is_a_typed_error() -> None:
    tokens = factorial()
    tokens.a[:, 0] = tokens.a[:, 1]
    tokens.a[:, 2:] = tokens.a[:, :1]
    broken = curvature_of(tokens)
    broken.inputs.matrix[0, 1] = broken.inputs.matrix[1, 0] = 3 * broken.inputs.matrix[0, 0]
    with pytest.raises(NumericalError):
        element_costs(broken, normal(ROWS, COLUMNS, seed=10))
