"""Optimal brain surgery by its definition, on the whole Fisher matrix of one small linear map, in float64.

Nothing here uses the code that it is compared with. Weights are numbered by rows: w = W.flatten(), F (R C, R C).
"""

from typing import NamedTuple

import torch
from hypothesis import settings
from torch import Tensor

from tests.toys import toy_examples

few_examples = settings(toy_examples, max_examples=15)
ROWS, COLUMNS = 5, 6


class Tokens(NamedTuple):
    """Inputs a (T, C) and output gradients g (T, R)."""

    a: Tensor
    g: Tensor


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spread(size: int, low: float, high: float) -> Tensor:
    return torch.linspace(low, high, size, dtype=torch.float64)


def factorial(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tokens:
    """Every one of a set of inputs with every one of a set of gradients: a and g are exactly independent.

    Each set shares few directions, and its places differ in size, so that correlations and sizes both matter.
    """
    a = normal(9, 2, seed=seed) @ normal(2, columns, seed=seed + 1) + 0.5 * normal(9, columns, seed=seed + 2)
    g = normal(7, 2, seed=seed + 3) @ normal(2, rows, seed=seed + 4) + 0.5 * normal(7, rows, seed=seed + 5)
    a, g = a * spread(columns, 0.3, 2), g * spread(rows, 2, 0.4)
    return Tokens(a.repeat_interleave(len(g), 0), g.repeat(len(a), 1))


def any_tokens(count: int = 40, rows: int = 4, columns: int = 3, seed: int = 0) -> Tokens:
    """Inputs and gradients that depend on each other: where one is large, so is the other, and their directions go
    together."""
    a, g = normal(count, columns, seed=seed), normal(count, rows, seed=seed + 1)
    size = torch.exp(normal(count, 1, seed=seed + 2))
    g[:, :2] += 2 * a[:, :2]
    return Tokens(a * size, g * size)


def fisher(tokens: Tokens) -> Tensor:
    """F = Σ_t vec(g aᵀ) vec(g aᵀ)ᵀ, from each token's gradient in W."""
    gradients = (tokens.g[:, :, None] * tokens.a[:, None, :]).flatten(1)
    return gradients.T @ gradients


def removal(information: Tensor, weight: Tensor, removed: Tensor) -> tuple[float, Tensor]:
    """The least ½ δᵀ F δ of all changes δ that bring the weights `removed` (R, C) to zero, and W + δ.

    Found as a minimum over the other weights, without F⁻¹: F_SS δ_S = −F_SQ δ_Q with δ_Q = −w_Q.
    """
    gone = removed.flatten()
    change = torch.where(gone, -weight.flatten(), torch.zeros_like(weight.flatten()))
    change[~gone] = torch.linalg.solve(information[~gone][:, ~gone], -(information[~gone][:, gone] @ change[gone]))
    cost = 0.5 * float(change @ information @ change)
    return cost, (weight.flatten() + change).view_as(weight)


def lines(weight: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """The mask (R, C) of whole rows and whole columns."""
    removed = torch.zeros_like(weight, dtype=torch.bool)
    removed[rows] = True
    removed[:, columns] = True
    return removed
