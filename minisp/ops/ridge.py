"""Refitting a down projection to what the whole layer computed: ridge regression on the kept units, from G alone.

The public name is `minisp.ops.ridge_solve`; `minisp.ops.reference` holds the formulas.

Shapes: m units, n kept units, d hidden size. G = XᵀX (m, m), W (d, m), S the kept units, P the removed ones.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minisp.ops import cholesky, native_cholesky
from minisp.ops.backend import Impl, choose

# Rows of a matrix that are gathered or multiplied at once: what comes between stays small.
GATHER_ROWS = 512


@dataclass(frozen=True)
class RidgeSolution:
    """A refitted weight and how its solve went.

    Attributes:
        down: W' (d, n) in the dtype of the Gram matrix.
        damping: the μ that was used, relative to the mean diagonal of G.
        backward_error, shift: see `cholesky.Solved`.
        degrees_of_freedom: tr G_SS (G_SS + μI)⁻¹, estimated from the probes; NaN without.
        energy_sliced: ‖X Wᵀ − X_S W_Sᵀ‖², what slicing alone would lose.
        energy: ‖X Wᵀ − X_S W'ᵀ‖², what is lost now.
    """

    down: Tensor
    damping: float
    backward_error: float
    shift: float
    degrees_of_freedom: float
    energy_sliced: float
    energy: float


class RidgeProblem:
    """What does not depend on the damping, gathered once.

    Args:
        gram: (m, m) float32 or float64, symmetric; not changed.
        kept: (n,) int64, sorted.
        weight: (d, m) in any floating dtype.
        energies: whether to know what is lost; without, all energies are NaN, and d (m − n)² FLOPs are saved.

    Attributes:
        original: W_S (d, n).
        cross: W_P G_PS (d, n).
        energy_sliced: see `RidgeSolution`.
    """

    def __init__(self, gram: Tensor, kept: Tensor, weight: Tensor, *, energies: bool = True):
        is_removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        is_removed[kept] = False
        removed = is_removed.nonzero().squeeze(1)
        lost = weight[:, removed].to(gram.dtype)
        self.gram, self.kept = gram, kept
        self.original = weight[:, kept].to(gram.dtype)
        self.cross = torch.zeros_like(self.original)
        energy = torch.zeros((), dtype=torch.float64, device=gram.device)
        for start in range(0, len(removed), GATHER_ROWS):
            gathered = gram[removed[start : start + GATHER_ROWS]]
            self.cross.addmm_(lost[:, start : start + GATHER_ROWS], gathered[:, kept])
            if energies:
                energy += _energy_of_rows(gathered[:, removed[start:]], lost[:, start:])
        self.energy_sliced = max(float(energy), 0.0) if energies else float("nan")

    def solve(
        self, damping: float, *, to_zero: bool = False, probes: int = 0, refine: int = 0, impl: Impl = "auto"
    ) -> RidgeSolution:
        """The solution for one damping; arguments and errors as for `ridge_solve`."""
        gram, kept = self.gram, self.kept
        chosen = choose("ridge_solve", impl, native=native_cholesky.serves_cholesky(gram.device, gram.dtype))
        assert chosen in ("torch", "native")
        if len(kept) == len(gram) and not to_zero:
            return RidgeSolution(self.original, damping, 0.0, 0.0, float(len(kept)), 0.0, 0.0)
        mu = damping * float(gram.diagonal().mean())
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 2, (probes, len(kept)), generator=generator).mul_(2).sub_(1).to(gram)
        right = torch.cat([self.cross - mu * self.original if to_zero else self.cross, noise])
        system = self._system()
        system.diagonal().add_(mu)
        solved = cholesky.solve_(system, right, impl=chosen, refine=refine, pieces=True)
        delta, answers = right[: len(self.cross)], right[len(self.cross) :]
        dead = gram.diagonal()[kept] == 0
        if to_zero and mu > 0:
            torch.where(dead, -self.original, delta, out=delta)
        else:
            delta.masked_fill_(dead, 0)
        return RidgeSolution(
            down=self.original + delta,
            damping=damping,
            backward_error=solved.backward_error,
            shift=solved.shift,
            degrees_of_freedom=len(kept) - mu * float(_dot(noise, answers)) / probes if probes else float("nan"),
            energy_sliced=self.energy_sliced,
            energy=self._energy(delta, mu, to_zero=to_zero, shifted=solved.shift > 0),
        )

    def _energy(self, delta: Tensor, mu: float, *, to_zero: bool, shifted: bool) -> float:
        """‖R − X_S Δᵀ‖² with R = X_P W_Pᵀ; Δ G_SS is (right-hand sides) − μΔ unless the system was shifted."""
        if math.isnan(self.energy_sliced):
            return self.energy_sliced
        if shifted:
            gained = 2 * _dot(delta, self.cross) - _dot(delta, delta @ self._system())
        else:
            gained = _dot(delta, self.cross) + mu * _dot(delta, delta)
            gained += mu * _dot(delta, self.original) if to_zero else 0.0
        return max(self.energy_sliced - float(gained), 0.0)

    def _system(self) -> Tensor:
        """G_SS, a copy."""
        system = self.gram.new_empty(len(self.kept), len(self.kept))
        for start in range(0, len(self.kept), GATHER_ROWS):
            system[start : start + GATHER_ROWS] = self.gram[self.kept[start : start + GATHER_ROWS]][:, self.kept]
        return system


def ridge_solve(
    gram: Tensor,
    kept: Tensor,
    weight: Tensor,
    damping: float,
    *,
    to_zero: bool = False,
    probes: int = 0,
    refine: int = 0,
    impl: Impl = "auto",
) -> RidgeSolution:
    """W' (d, n): the refitted columns of the kept units; see `reference.ridge_solve`.

    The delta form is solved, W' = W₀ + Δ with Δ (G_SS + μI) = W_P G_PS (− μ W_S when shrinking to zero): rounding
    errors then scale with the correction. Units that were never active keep their weights exactly, or get exactly 0
    when damping shrinks to zero.

    Args:
        gram: (m, m) float32 or float64, symmetric; not changed.
        kept: (n,) int64, sorted.
        weight: (d, m) in any floating dtype.
        damping: μ relative to the mean diagonal of G.
        probes: random vectors for the degrees of freedom (Hutchinson, 1990): 0 leaves them out.
        refine: steps of iterative refinement, for systems that are nearly singular in float32.

    Raises:
        NumericalError: G holds values that are not finite, is not symmetric, or damped not positive definite.
        BackendError: `impl` cannot serve these tensors.
    """
    return RidgeProblem(gram, kept, weight).solve(damping, to_zero=to_zero, probes=probes, refine=refine, impl=impl)


def ridge_fit(gram: Tensor, cross: Tensor, damping: float, *, impl: Impl = "auto") -> Tensor:
    """Δ (d, n) = argmin Σ_t ‖e_t − Δ x_t‖² + μ‖Δ‖² = C (G + μI)⁻¹, for a target that comes from elsewhere.

    Args:
        gram: G = XᵀX (n, n) float32 or float64, symmetric; overwritten.
        cross: C = EᵀX (d, n) in the same dtype; not changed.
        damping: μ relative to the mean diagonal of G, above 0.

    Raises:
        NumericalError: G holds values that are not finite, is not symmetric, or damped not positive definite.
        BackendError: `impl` cannot serve these tensors.
    """
    chosen = choose("ridge_fit", impl, native=native_cholesky.serves_cholesky(gram.device, gram.dtype))
    assert chosen in ("torch", "native")
    answer = cross.clone()
    gram.diagonal().add_(damping * float(gram.diagonal().mean()))
    cholesky.solve_(gram, answer, impl=chosen, pieces=True)
    return answer


def output_energy(gram: Tensor, weight: Tensor) -> float:
    """‖X Wᵀ‖² = tr(W G Wᵀ) for G (m, m) symmetric and the weight (d, m): d m² FLOPs, as much as G's symmetry saves."""
    exact = weight.to(gram.dtype)
    total = torch.zeros((), dtype=torch.float64, device=gram.device)
    for start in range(0, len(gram), GATHER_ROWS):
        total += _energy_of_rows(gram[start : start + GATHER_ROWS, start:], exact[:, start:])
    return float(total)


def _energy_of_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """What the rows (r, c) of G from its diagonal on, and the columns that mirror them, add to tr(W G Wᵀ); W (d, c)."""
    count = len(rows)
    across = weight[:, :count]
    beyond = 2 * _dot(across, weight[:, count:] @ rows[:, count:].T)
    return _dot(across, across @ rows[:, :count]) + beyond


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a ⊙ b () in float64, some rows at a time; the host does not wait."""
    pairs = zip(a.split(GATHER_ROWS), b.split(GATHER_ROWS), strict=True)
    return sum(((x * y).sum(dtype=torch.float64) for x, y in pairs), a.new_zeros((), dtype=torch.float64))
