"""Damping chosen by generalised cross-validation, against leaving tokens out for real."""

import pytest
import torch

from minisp import ops
from minisp.methods import damping
from minisp.ops.ridge import RidgeProblem


def noisy_layer(tokens: int, width: int, hidden: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations whose units share few factors, so that removed units can be told from kept ones, with noise."""
    factors = torch.randn(tokens, width // 4, dtype=torch.float64)
    x = factors @ torch.randn(width // 4, width, dtype=torch.float64)
    x += 0.5 * torch.randn(tokens, width, dtype=torch.float64)
    return x, torch.randn(hidden, width, dtype=torch.float64)


def test_the_curve_is_the_exact_leave_one_out_error_up_to_averaging() -> None:
    x, weight = noisy_layer(200, 40)
    kept = torch.arange(0, 40, 2)
    problem = RidgeProblem(x.T @ x, kept, weight)
    _, curve = damping.choose_damping(problem, 200)
    target = x @ weight.T - x[:, kept] @ weight[:, kept].T
    for value, relative in curve:
        mu = value * float((x * x).sum() / 40)
        solve = torch.linalg.solve(x[:, kept].T @ x[:, kept] + mu * torch.eye(20, dtype=torch.float64), x[:, kept].T)
        hat = x[:, kept] @ solve
        left_out = (target - hat @ target) / (1 - hat.diagonal())[:, None]
        assert relative == pytest.approx(float(left_out.norm() / target.norm()), rel=0.05)


def test_the_choice_is_the_lowest_of_the_curve_and_beats_the_extremes_on_new_tokens() -> None:
    x, weight = noisy_layer(400, 80)
    train, test = x[:60], x[60:]
    kept = torch.arange(0, 80, 2)
    problem = RidgeProblem(train.T @ train, kept, weight)
    solution, curve = damping.choose_damping(problem, len(train))
    assert solution.damping == min(curve, key=lambda point: point[1])[0]
    # Half a decade below and above the best decade.
    halves = sorted({value for value, _ in curve} - set(damping.DECADES))
    assert len(curve) == len(damping.DECADES) + 2 and halves[1] / halves[0] == pytest.approx(10)
    assert min(abs(halves[0] * 10**0.5 / value - 1) for value in damping.DECADES) < 1e-9

    def loss(down: torch.Tensor) -> float:
        return float((test @ weight.T - test[:, kept] @ down.T).norm())

    assert loss(solution.down) < loss(problem.solve(1e-6).down)
    assert loss(solution.down) < loss(problem.solve(100.0).down)


def test_removing_dead_units_leaves_nothing_to_choose() -> None:
    x, weight = noisy_layer(100, 16)
    x[:, 12:] = 0
    solution, curve = damping.choose_damping(RidgeProblem(x.T @ x, torch.arange(12), weight), 100)
    assert curve == () and solution.damping == 1e-2
    assert torch.equal(solution.down, weight[:, :12])
    assert ops.output_energy(x.T @ x, weight) > 0


def test_a_fit_with_more_degrees_of_freedom_than_tokens_is_never_chosen() -> None:
    x, weight = noisy_layer(12, 40)
    problem = RidgeProblem(x.T @ x, torch.arange(0, 40, 2), weight)
    # Told of 8 tokens, twelve degrees of freedom are too many.
    solution, curve = damping.choose_damping(problem, 8)
    assert curve[0][1] == float("inf") and all(error > 0 for _, error in curve)
    assert solution.degrees_of_freedom < 8


def test_where_no_damping_leaves_a_degree_of_freedom_the_largest_one_is_chosen() -> None:
    x, weight = noisy_layer(12, 40)
    solution, curve = damping.choose_damping(RidgeProblem(x.T @ x, torch.arange(0, 40, 2), weight), 1)
    assert all(error == float("inf") for _, error in curve)
    assert solution.damping == max(value for value, _ in curve)
