"""The Kronecker factors: what their product is, damping, dead places, the bias, and the nearest product."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from minisp.errors import NumericalError
from minisp.methods.curvature import Curvature, Factor, NearestSum, cholesky_of, with_bias
from tests.methods.fisher import Tokens, any_tokens, factorial, fisher, normal

pytestmark = pytest.mark.usefixtures("one_thread")


def product(curvature: Curvature) -> Tensor:
    return curvature.scale * torch.kron(curvature.gradients.matrix, curvature.inputs.matrix)


def independent(tokens: Tokens, damping: float = 0.0) -> Curvature:
    inputs, gradients = tokens.a.T @ tokens.a, tokens.g.T @ tokens.g
    return Curvature.independent(Factor.of_(inputs, damping), Factor.of_(gradients, damping), len(tokens.a))


def test_of_independent_inputs_and_gradients_the_product_is_the_fisher_matrix() -> None:
    tokens = factorial()
    torch.testing.assert_close(product(independent(tokens)), fisher(tokens))
    # It is a sum: twice the tokens are twice the information.
    twice = Tokens(tokens.a.repeat(2, 1), tokens.g.repeat(2, 1))
    torch.testing.assert_close(product(independent(twice)), 2 * fisher(tokens))


def test_a_factor_has_mean_diagonal_one_before_damping() -> None:
    total = factorial().a.T @ factorial().a
    factor = Factor.of_(total.clone(), 0.25)
    assert factor.level == pytest.approx(float(total.diagonal().mean()))
    wanted = total / total.diagonal().mean() + 0.25 * torch.eye(len(total), dtype=torch.float64)
    torch.testing.assert_close(factor.matrix, wanted)
    torch.testing.assert_close(factor.inverse, torch.linalg.inv(wanted))
    torch.testing.assert_close(factor.inverse_diagonal, torch.linalg.inv(wanted).diagonal())


def test_the_sum_is_taken_over_in_place() -> None:
    total = torch.diag(torch.tensor([1.0, 3.0]))
    assert Factor.of_(total, 0.5).matrix.data_ptr() == total.data_ptr()
    assert total.diagonal().tolist() == [1.0, 2.0]


def test_dead_places_are_left_out_of_inverse_and_damping() -> None:
    total = factorial().a.T @ factorial().a
    total[2], total[:, 2] = 0, 0
    factor, live = Factor.of_(total.clone(), 0.1), torch.tensor([0, 1, 3, 4, 5])
    assert factor.dead.nonzero().flatten().tolist() == [2]
    assert not factor.matrix[2].any() and not factor.inverse[2].any() and not factor.inverse[:, 2].any()
    # The mean counts dead places, as the damping of the refit does.
    inside = total[live][:, live] / total.diagonal().mean() + 0.1 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(factor.inverse[live][:, live], torch.linalg.inv(inside))
    assert float(factor.inverse_diagonal[2]) == float("inf")
    root = factor.inverse_root()
    wanted = factor.inverse.clone()
    wanted[2, 2] = 1
    torch.testing.assert_close(root.T @ root, wanted)
    assert torch.equal(root, root.triu())


def test_a_factor_without_any_activity_is_dead_everywhere() -> None:
    factor = Factor.of_(torch.zeros(3, 3), 0.1)
    assert factor.level == 0 and factor.dead.all()
    assert not factor.matrix.any() and not factor.inverse.any()


def test_blocks_of_the_inverse() -> None:
    factor = Factor.of_(factorial().a.T @ factorial().a, 0.1)
    places = torch.tensor([[0, 3], [5, 1]])
    inverse = torch.linalg.inv(factor.matrix)
    wanted = torch.stack([inverse[block][:, block] for block in places])
    torch.testing.assert_close(factor.inverse_blocks(places), wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_a_diagonal_that_is_none_is_refused(bad: float) -> None:
    total = torch.eye(4)
    total[3, 3] = bad
    with pytest.raises(NumericalError, match=r"1 places of 4 .* the first of them 3"):
        Factor.of_(total, 0.1)


def test_matrices_that_are_not_positive_definite_are_refused() -> None:
    with pytest.raises(NumericalError, match="1 of 2, of size 3"):
        cholesky_of(torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 1.0]))]))


def test_the_bias_is_one_more_input_that_is_always_one() -> None:
    a = factorial().a
    ones = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    torch.testing.assert_close(with_bias(a.T @ a, a.sum(0), len(a)), ones.T @ ones)


def half_step(own: Tensor, held: Tensor, matrix: Tensor, chunk: int = 1000) -> Tensor:
    record = NearestSum.empty(own.shape[1], matrix)
    for x, o in zip(own.split(chunk), held.split(chunk), strict=True):
        record.update_(x, o)
    return record.finalize_().double()


def distance(information: Tensor, gradients: Tensor, inputs: Tensor) -> float:
    return float((information - torch.kron(gradients, inputs)).norm() / information.norm())


def test_a_half_step_is_the_least_squares_fit() -> None:
    tokens, held = any_tokens(), normal(3, 3, seed=9)
    held = held @ held.T
    # F_(ij),(kl) ≈ G_ik A_jl: for every (i, k), one regression of F_i·k· on A.
    blocks = fisher(tokens).view(4, 3, 4, 3)
    wanted = torch.einsum("ijkl,jl->ik", blocks, held) / held.square().sum()
    torch.testing.assert_close(half_step(tokens.g, tokens.a, held), wanted, rtol=1e-5, atol=1e-4)
    # In any chunks, up to rounding in float32.
    torch.testing.assert_close(half_step(tokens.g, tokens.a, held, chunk=7), wanted, rtol=1e-5, atol=1e-4)


def test_what_lies_above_the_diagonal_of_a_running_sum_does_not_count() -> None:
    tokens, held = any_tokens(), torch.eye(3, dtype=torch.float64)
    record = NearestSum.empty(4, held)
    record.update_(tokens.g, tokens.a)
    record.total[0, 3] = torch.nan
    torch.testing.assert_close(record.finalize_().double(), half_step(tokens.g, tokens.a, held))


def test_power_iteration_finds_the_factors_of_a_product() -> None:
    tokens = factorial()
    information = fisher(tokens)
    gradients = half_step(tokens.g, tokens.a, torch.eye(6, dtype=torch.float64))
    inputs = half_step(tokens.a, tokens.g, gradients)
    assert distance(information, gradients, inputs) < 1e-6
    found = Curvature.nearest(Factor.of_(inputs, 0), Factor.of_(gradients, 0))
    torch.testing.assert_close(product(found), information, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_power_iteration_never_fits_worse_than_independence_and_ends_at_the_nearest_product(seed: int) -> None:
    tokens = any_tokens(seed=seed)
    information = fisher(tokens)
    inputs, gradients = tokens.a.T @ tokens.a, tokens.g.T @ tokens.g / len(tokens.a)
    distances = [distance(information, gradients, inputs)]
    for _ in range(30):
        gradients = half_step(tokens.g, tokens.a, inputs)
        distances.append(distance(information, gradients, inputs))
        inputs = half_step(tokens.a, tokens.g, gradients)
        distances.append(distance(information, gradients, inputs))
    assert distances[1] < distances[0] and distances[-1] < 0.9 * distances[0]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(distances))
    # The nearest product is the first singular pair of F rearranged (Van Loan & Pitsianis, 1993).
    singular = torch.linalg.svdvals(information.view(4, 3, 4, 3).transpose(1, 2).reshape(16, 9))
    assert distances[-1] == pytest.approx(float(singular[1:].norm() / singular.norm()), rel=1e-3)
