"""The ridge solve: the reference in float64, what it minimises, dead and equal units, energies, errors."""

import pytest
import torch
from torch import Tensor

from minisp import ops
from minisp.errors import NumericalError
from minisp.ops import reference
from tests.tolerance import error


def gram_and_weight(width: int = 40, tokens: int = 300, hidden: int = 7) -> tuple[Tensor, Tensor]:
    mixing = torch.randn(width, width, dtype=torch.float64) * torch.logspace(0, -2, width, dtype=torch.float64)
    x = torch.randn(tokens, width, dtype=torch.float64) @ mixing
    return x.T @ x, torch.randn(hidden, width, dtype=torch.float64)


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
def test_ridge_solve(damping: float, to_zero: bool) -> None:
    gram, weight = gram_and_weight()
    kept = torch.tensor([0, 3, 4, 9, 17, 30, 39])
    exact = reference.ridge_solve(gram, kept, weight, damping, to_zero=to_zero)
    ours = ops.ridge_solve(gram, kept, weight, damping, to_zero=to_zero).down
    assert error(ours, exact) < 1e-8
    single = ops.ridge_solve(gram.float(), kept, weight.float(), damping, to_zero=to_zero).down
    assert error(single, exact) < 1e-3


def test_ridge_solve_minimises_what_it_says() -> None:
    gram, weight = gram_and_weight()
    kept = torch.arange(0, 40, 3)
    shift = 0.05 * gram.diagonal().mean()

    def objective(new: Tensor) -> Tensor:
        difference = weight.clone()
        difference[:, kept] -= new
        return ((difference @ gram) * difference).sum() + shift * (new - weight[:, kept]).square().sum()

    solved = ops.ridge_solve(gram, kept, weight, 0.05).down
    best = objective(solved)
    for _ in range(20):
        assert objective(solved + 1e-3 * torch.randn_like(solved)) > best
    assert objective(weight[:, kept]) > best


def test_dead_units_are_free() -> None:
    gram, weight = gram_and_weight()
    dead = torch.tensor([2, 8])
    gram[dead] = 0
    gram[:, dead] = 0
    living = torch.tensor([i for i in range(40) if i not in dead])
    # Removing only dead units changes nothing, to the last bit.
    assert torch.equal(ops.ridge_solve(gram, living, weight, 1e-2).down, weight[:, living])
    # A dead unit that stays keeps its weights, even without damping.
    kept = torch.tensor([0, 2, 5, 8])
    solved = ops.ridge_solve(gram, kept, weight, 0.0).down
    assert torch.equal(solved[:, [1, 3]], weight[:, dead])
    assert error(solved, reference.ridge_solve(gram, kept, weight, 0.0)) < 1e-8


def test_of_two_equal_units_one_goes_exactly() -> None:
    gram, weight = gram_and_weight()
    gram[7] = gram[3]
    gram[:, 7] = gram[:, 3]
    kept = torch.tensor([i for i in range(40) if i != 7])
    solved = ops.ridge_solve(gram, kept, weight, 1e-12).down
    assert reference.residual(gram, kept, weight, solved) < 1e-5
    assert reference.residual(gram, kept, weight, weight[:, kept]) > 0.05


def test_keeping_everything_is_the_identity() -> None:
    gram, weight = gram_and_weight()
    assert torch.equal(ops.ridge_solve(gram, torch.arange(40), weight, 1e-2).down, weight)


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_energies_are_those_of_the_definition(damping: float, to_zero: bool) -> None:
    gram, weight = gram_and_weight()
    kept = torch.arange(0, 40, 2)
    solution = ops.ridge_solve(gram, kept, weight, damping, to_zero=to_zero)
    total = ops.output_energy(gram, weight)
    for energy, new in ((solution.energy, solution.down), (solution.energy_sliced, weight[:, kept])):
        expected = float(reference.residual(gram, kept, weight, new))
        assert (energy / total) ** 0.5 == pytest.approx(expected, rel=1e-6)


def test_energies_hold_where_the_solver_had_to_shift() -> None:
    x = torch.randn(30, 64)
    gram, weight, kept = x.T @ x, torch.randn(7, 64), torch.arange(0, 64, 1)[:50]
    with pytest.warns(UserWarning, match="not positive definite"):
        solution = ops.ridge_solve(gram, kept, weight, 0.0)
    assert solution.shift > 0
    total = ops.output_energy(gram, weight)
    expected = float(reference.residual(gram.double(), kept, weight.double(), solution.down.double()))
    assert abs((solution.energy / total) ** 0.5 - expected) < 1e-3


@pytest.mark.parametrize("to_zero", [False, True])
def test_dead_units_are_exact_with_damping(to_zero: bool) -> None:
    gram, weight = gram_and_weight()
    gram[4] = 0
    gram[:, 4] = 0
    solved = ops.ridge_solve(gram.float(), torch.tensor([1, 4, 9]), weight.float(), 1e-2, to_zero=to_zero).down
    assert torch.equal(solved[:, 1], torch.zeros(7) if to_zero else weight[:, 4].float())


def test_degrees_of_freedom() -> None:
    gram, weight = gram_and_weight()
    kept = torch.arange(0, 40, 2)
    system = gram[kept][:, kept]
    for damping in (0.0, 1e-3, 1.0):
        shift = damping * gram.diagonal().mean()
        exact = float(torch.linalg.solve(system + shift * torch.eye(20), system).trace())
        found = ops.ridge_solve(gram, kept, weight, damping, probes=400).degrees_of_freedom
        # Variance of Hutchinson's estimate with signs: 2 (‖M‖² − Σ m_ii²) a probe.
        inverse = shift * torch.linalg.inv(system + shift * torch.eye(20))
        spread = (2 * (inverse.square().sum() - inverse.diagonal().square().sum()) / 400).sqrt()
        assert abs(found - exact) <= 4 * float(spread) + 1e-6


def test_ridge_solve_names_what_is_wrong() -> None:
    gram, weight = gram_and_weight()
    kept = torch.arange(10)
    broken = gram.clone()
    broken[4, 4] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinite"):
        ops.ridge_solve(broken, kept, weight, 1e-2)
    indefinite = gram.clone()
    indefinite[2, 5] = indefinite[5, 2] = 10 * (gram[2, 2] * gram[5, 5]).sqrt()
    with pytest.raises(NumericalError, match=r"positive definite.*pivot at unit \d+ of 10"):
        ops.ridge_solve(indefinite, kept, weight, 1e-2)
