"""The curvature of the loss in one linear map y = a Wᵀ, as a Kronecker product of two small matrices.

With g = ∂L/∂y, the gradient of one token's loss in W is g aᵀ. The empirical Fisher information of W, read by rows, is

    F = Σ_t (g_t g_tᵀ) ⊗ (a_t a_tᵀ) ≈ G ⊗ A        (Martens & Grosse, 2015; every token is a term of its own),

so that ½ Σ (ΔW)_ij F_ij,kl (ΔW)_kl = ½ tr(G ΔW A ΔWᵀ) estimates, in nats over all tokens, what a change ΔW costs. Two
estimates of the factors:

* Independence of a and g: F ≈ (1/N) Σ g gᵀ ⊗ Σ a aᵀ for N tokens, that is 1/√N on both sums, as van der Ouderaa et al.
  (ICLR 2024, arXiv 2312.17244, "The LLM Surgeon") have it.
* The nearest Kronecker product in Frobenius norm (Van Loan & Pitsianis, 1993), by alternating least squares, which is
  the power iteration on F rearranged: for A fixed, the best G is Σ (aᵀ A a) g gᵀ / ‖A‖², and likewise for A.

Every factor is scaled to a mean diagonal of 1; one number per map keeps their product. The two factors of a map are so
always of one size, and maps that read the same input share one factor.

Shapes: T tokens, W (R, C), a (T, C) inputs, g (T, R) gradients of the summed loss at the output. Where the map has a
bias, it is the last column of W, and the last entry of a is 1: then C counts it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minisp import ops
from minisp.errors import NumericalError
from minisp.methods.statistics import fill_, panels
from minisp.ops.ridge import ridge_fit
from minisp.ranks import Ranks


@dataclass
class FactorSum:
    """Σ a aᵀ or Σ g gᵀ over calibration tokens, of one side of a linear map. Sums only, so chunks and ranks add up.

    Life of a record: `empty` → `update_` per chunk of tokens → `finalize_`.

    Attributes:
        total: (n, n) float32.
        sums: (n,) float64 Σ a, which a bias needs, or Σ g.
        num_tokens: tokens seen.
    """

    total: Tensor
    sums: Tensor
    num_tokens: int = 0

    @classmethod
    def empty(cls, size: int, device: torch.device | str = "cpu") -> "FactorSum":
        """All sums zero for n = `size` places."""
        total = torch.zeros(size, size, dtype=torch.float32, device=device)
        return cls(total, torch.zeros(size, dtype=torch.float64, device=device))

    def update_(self, values: Tensor) -> None:
        """Add a chunk: a (T, n) or g (T, n)."""
        ops.gram_update_(self.total, values)
        self.sums += values.sum(0, dtype=torch.float64)
        self.num_tokens += len(values)

    def sum_over_(self, ranks: Ranks) -> None:
        """Add up the records of all processes; before `finalize_`."""
        ranks.sum_(self.total, self.sums)
        self.num_tokens = ranks.total(self.num_tokens)

    def finalize_(self, whose: object) -> "FactorSum":
        """Complete the matrix and check the sums.

        Args:
            whose: what a message calls the side of the map.

        Raises:
            NumericalError: a sum is not finite.
        """
        ops.mirror_(self.total)
        # A finite diagonal bounds the rest: |M_ij| ≤ √(M_ii M_jj).
        wrong = ~torch.isfinite(self.total.diagonal())
        if wrong.any():
            raise NumericalError(
                f"{whose}: expected finite sums, got {int(wrong.sum())} of {len(wrong)} places with NaN or infinity. "
                "Check the weights, or compute in float32 (dtype='float32')."
            )
        return self

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) to store of the finalized record."""
        yield "sums", self.sums
        yield "num_tokens", torch.tensor(self.num_tokens)
        yield from panels(self.total, "total")

    @classmethod
    def from_tensors(cls, read: Callable[[str], Tensor], device: torch.device | str = "cpu") -> "FactorSum":
        """The record of which `tensors` were stored; `read` gives the tensor of a key."""
        sums = read("sums").to(device)
        record = cls.empty(len(sums), device)
        record.sums, record.num_tokens = sums, int(read("num_tokens"))
        fill_(record.total, "total", read)
        return record


@dataclass(frozen=True)
class Factor:
    """One damped factor M̂ + λI of a curvature, n × n, with M = level · M̂ and mean(diag M̂) = 1.

    A place whose diagonal is 0 was never active: it is dead. It gets no damping, its row of `matrix` and of `inverse`
    is zero, and removing it costs nothing.

    Attributes:
        matrix: (n, n) float32 or float64, symmetric.
        level: mean(diag M).
        dead: (n,) bool.
        squares: (n,) diag M, without damping.
    """

    matrix: Tensor
    level: float
    dead: Tensor
    squares: Tensor

    @classmethod
    def of_(cls, total: Tensor, damping: float) -> "Factor":
        """The factor of a finished sum.

        Args:
            total: M (n, n) float32 or float64, symmetric, both triangles; becomes the factor's matrix.
            damping: λ, relative to mean(diag M), at least 0.

        Raises:
            NumericalError: the diagonal of M is negative or not finite.
        """
        diagonal = total.diagonal().clone()
        wrong = ~(diagonal.isfinite() & (diagonal >= 0))
        if wrong.any():
            raise NumericalError(
                f"Curvature: expected a diagonal that is finite and at least 0, got {int(wrong.sum())} places of "
                f"{len(total)} where it is not, the first of them {int(wrong.nonzero()[0])}. Check the weights, or "
                "compute in float32 (dtype='float32')."
            )
        level = float(diagonal.mean(dtype=torch.float64))
        if level > 0:
            total.div_(level)
        dead = diagonal == 0
        total.diagonal().add_((~dead).to(total.dtype), alpha=damping)
        return cls(total, level, dead, diagonal)

    @cached_property
    def inverse(self) -> Tensor:
        """(M̂ + λI)⁻¹ (n, n): 7/3 n³ FLOPs, and 2 n² values of memory while it is made.

        Raises:
            NumericalError: the matrix holds values that are not finite, or is not positive definite.
        """
        unit = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device)
        return ridge_fit(self.matrix.clone(), unit, 0.0)

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """diag (M̂ + λI)⁻¹ (n,), infinite for dead places: what is divided by it is then 0."""
        return self.inverse.diagonal().masked_fill(self.dead, torch.inf)

    def inverse_blocks(self, places: Tensor) -> Tensor:
        """[(M̂ + λI)⁻¹]_BB (u, c, c) for u sets B of c places; dead places have 1 on the diagonal.

        Args:
            places: (u, c) int64.
        """
        blocks = self.inverse[places[:, :, None], places[:, None, :]]
        # Each row of the inverse was rounded on its own.
        blocks = (blocks + blocks.mT) / 2
        blocks.diagonal(dim1=1, dim2=2).add_(self.dead[places].to(blocks.dtype))
        return blocks

    def inverse_root(self) -> Tensor:
        """U (n, n) upper triangular, Uᵀ U = (M̂ + λI)⁻¹; dead places have 1 on the diagonal. 2/3 n³ FLOPs, 2 n² values.

        With the order of places reversed, P (M̂ + λI) P = L Lᵀ, and U = (P L P)⁻¹. No inverse is formed and factored
        again, which float32 may find not positive definite.

        Raises:
            NumericalError: the matrix is not positive definite.
        """
        turned = self.matrix.flip(0, 1)
        turned.diagonal().add_(self.dead.flip(0).to(turned.dtype))
        upper = cholesky_of(turned).flip(0, 1)
        unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        root: Tensor = torch.linalg.solve_triangular(upper, unit, upper=True)
        return root


def cholesky_of(matrices: Tensor) -> Tensor:
    """L (..., n, n) lower triangular of matrices that should be positive definite.

    Raises:
        NumericalError: one of them is not.
    """
    factors: Tensor
    factors, info = torch.linalg.cholesky_ex(matrices)
    if bool(info.any()):
        raise NumericalError(
            f"Curvature: expected positive definite matrices, got {int((info != 0).sum())} of {info.numel()}, of size "
            f"{matrices.shape[-1]}, that are not. Raise the damping."
        )
    return factors


@dataclass(frozen=True)
class Curvature:
    """F ≈ scale · Ĝ ⊗ Â of one linear map, both factors damped; in nats over all tokens.

    Attributes:
        inputs: Â (C, C), the bias's place last where the map has one.
        gradients: Ĝ (R, R).
        scale: what the product of the factors is multiplied by.
    """

    inputs: Factor
    gradients: Factor
    scale: float

    @classmethod
    def independent(cls, inputs: Factor, gradients: Factor, num_tokens: int) -> "Curvature":
        """From A = Σ a aᵀ and G = Σ g gᵀ over the same N tokens, as if a and g were independent: G ⊗ A / N."""
        return cls(inputs, gradients, inputs.level * gradients.level / max(num_tokens, 1))

    @classmethod
    def nearest(cls, inputs: Factor, gradients: Factor) -> "Curvature":
        """From factors whose product is F itself, as `NearestSum` leaves them."""
        return cls(inputs, gradients, inputs.level * gradients.level)

    @property
    def transposed(self) -> "Curvature":
        """The curvature of Wᵀ."""
        return Curvature(self.gradients, self.inputs, self.scale)


def with_bias(total: Tensor, sums: Tensor, num_tokens: int) -> Tensor:
    """Σ [a; 1] [a; 1]ᵀ (C + 1, C + 1) from Σ a aᵀ (C, C) and Σ a (C,), for a map with a bias."""
    border = torch.cat([sums, sums.new_tensor([num_tokens])]).to(total)
    return torch.cat([torch.cat([total, border[None, :-1]]), border[:, None]], 1)


@dataclass
class NearestSum:
    """One factor of the nearest Kronecker product while the other one is held: half a step of the power iteration.

    Life of a record: `empty` → `update_` per chunk of tokens → `finalize_`. Streamed are a and g of the same tokens,
    which is to say in the backward; held are both matrices. A chunk takes 2 T n² FLOPs for this factor's sum, half of
    that with symmetry, and 2 T k² for the weights. Sums add up over chunks and ranks.

    From any start, no half step makes ‖F − G ⊗ A‖ larger: each solves its least-squares problem exactly. From the A of
    the independent estimate, one half step for G is therefore at least as near as that estimate.

    Attributes:
        total: (n, n) float32 Σ (oᵀ M o) x xᵀ.
        other: M (k, k), the factor that is held, not damped.
    """

    total: Tensor
    other: Tensor

    @classmethod
    def empty(cls, size: int, other: Tensor) -> "NearestSum":
        """The sum is zero; it will be (n, n) with n = `size`."""
        return cls(torch.zeros(size, size, dtype=torch.float32, device=other.device), other)

    def update_(self, own: Tensor, held: Tensor) -> None:
        """Add a chunk: x (T, n) on the side of this factor, o (T, k) on the side of the one that is held."""
        exact = held.to(self.other.dtype)
        # M is positive semi-definite; rounding may take a zero below zero.
        weights = ((exact @ self.other) * exact).sum(1).clamp_min_(0)
        ops.gram_update_(self.total, own.float() * weights.float().sqrt()[:, None])

    def finalize_(self) -> Tensor:
        """The factor (n, n): argmin over X of ‖F − X ⊗ M‖, or of ‖F − M ⊗ X‖, which is Σ (oᵀ M o) x xᵀ / ‖M‖²."""
        energy = float(torch.linalg.vector_norm(self.other, dtype=torch.float64)) ** 2
        return ops.mirror_(self.total).div_(energy or 1.0)
