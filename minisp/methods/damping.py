"""How much damping: chosen per layer from the data, by generalised cross-validation.

Ridge regression of the residual target R = X_P W_Pᵀ (T, d) on X_S predicts H R, H = X_S (G_SS + μI)⁻¹ X_Sᵀ. Predicting
every token from all others would leave the mean squared error, up to an average over the leverages (Golub, Heath &
Wahba, 1979),

    GCV(μ) = (1/T) ‖(I − H) R‖² / (1 − tr H / T)²,

whose parts follow from G alone: the numerator is the squared residual of the layer's output, tr H the degrees of
freedom. It treats tokens as independent, which those of one text are not.
"""

from minisp import ops
from minisp.ops.ridge import RidgeProblem

Curve = tuple[tuple[float, float], ...]
"""Pairs of (damping, √GCV relative to the error of slicing alone), sorted."""

DECADES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PROBES = 8


def choose_damping(problem: RidgeProblem, num_tokens: int, *, to_zero: bool = False) -> tuple[ops.RidgeSolution, Curve]:
    """The solution of the smallest GCV among decades of damping and the two half decades around the best of them.

    Args:
        problem: what to solve.
        num_tokens: T, the tokens in the Gram matrix.
        to_zero: as for `ops.ridge_solve`.

    Returns:
        The solution and the curve, which is empty where slicing loses nothing and there is nothing to choose.

    Raises:
        NumericalError: a system cannot be solved.
    """
    if problem.energy_sliced == 0:
        return problem.solve(DECADES[len(DECADES) // 2], to_zero=to_zero), ()
    curve: dict[float, float] = {}
    best: ops.RidgeSolution | None = None

    def attempt(damping: float) -> None:
        nonlocal best
        solution = problem.solve(damping, to_zero=to_zero, probes=PROBES)
        free = 1 - solution.degrees_of_freedom / num_tokens
        curve[damping] = (solution.energy / problem.energy_sliced) ** 0.5 / free if free > 0 else float("inf")
        # Of equal errors, as where no damping leaves a degree of freedom, the larger damping is the safer one.
        if best is None or curve[damping] <= curve[best.damping]:
            best = solution

    for damping in DECADES:
        attempt(damping)
    assert best is not None
    centre = best.damping
    for damping in (centre / 10**0.5, centre * 10**0.5):
        attempt(damping)
    return best, tuple(sorted(curve.items()))
