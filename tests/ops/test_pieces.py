"""How accurate the solver is where a GPU rounds the inputs of its large products, shown on a CPU.

The extension takes its BLAS by address: here it gets one that rounds first. The panels are those of a GPU.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minisp.ops import cholesky, native_cholesky

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not native_cholesky.serves_cholesky(CPU, torch.float32), reason="the extension is not built"
)

Product = Callable[[Tensor, Tensor], Tensor]
INT, FLOAT = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_float)
SGEMM = ctypes.CFUNCTYPE(
    None,
    *[ctypes.c_char_p] * 2,
    *[INT] * 3,
    FLOAT,
    ctypes.c_void_p,
    INT,
    ctypes.c_void_p,
    INT,
    FLOAT,
    ctypes.c_void_p,
    INT,
)
N = 800
DAMPINGS = (1e-4, 1e-3, 1e-2, 5e-2)


def truncated(x: Tensor) -> Tensor:
    """TF32 as tensor cores read a float32 number: the lower 13 bits of its mantissa are ignored."""
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def in_tf32(a: Tensor, b: Tensor) -> Tensor:
    return truncated(a) @ truncated(b)


def in_pieces(a: Tensor, b: Tensor) -> Tensor:
    """As csrc/cholesky_cuda.h says; products of bfloat16 numbers are exact in float32."""
    (a_high, a_low), (b_high, b_low) = (
        (x.bfloat16().float(), (x - x.bfloat16().float()).bfloat16().float()) for x in (a, b)
    )
    return a_high @ b_high + a_low @ b_high + a_high @ b_low


def rows(address: int, count: int, length: int, stride: int) -> Tensor:
    """The columns of a Fortran matrix, as rows."""
    flat = np.ctypeslib.as_array(ctypes.cast(address, FLOAT), shape=((count - 1) * stride + length,))
    return torch.as_strided(torch.from_numpy(flat), (count, length), (stride, 1))


def sgemm(product: Product) -> Any:
    """Fortran's sgemm, as the solver calls it, with another product."""

    def gemm(*arguments: Any) -> None:
        a_op, _, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc = arguments
        right = rows(a, m[0], k[0], lda[0]).T if a_op[:1] == b"T" else rows(a, k[0], m[0], lda[0])
        target = rows(c, n[0], m[0], ldc[0])
        found = alpha[0] * product(rows(b, n[0], k[0], ldb[0]), right)
        target.copy_(found + beta[0] * target if beta[0] else found)

    return SGEMM(gemm)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Product], None]]:
    """Gives the solver a GPU's panels, and the large products that it is called with."""
    alive = []

    def put(product: Product) -> None:
        alive.append(sgemm(product))
        address = ctypes.cast(alive[-1], ctypes.c_void_p).value
        monkeypatch.setattr(native_cholesky, "large_gemm_address", lambda device, dtype: address)

    monkeypatch.setattr(native_cholesky, "panel_columns", lambda device: 512)
    yield put


def system(damping: float) -> tuple[Tensor, Tensor]:
    """A Gram matrix whose spectrum falls by a power law; damped by so much of its mean diagonal."""
    x = torch.randn(N, N) * torch.arange(1, N + 1).float().pow(-0.5)[:, None]
    gram = x.T @ x
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return gram, torch.randn(16, N)


def excess(gram: Tensor, right: Tensor, solution: Tensor) -> float:
    """By how much of its optimum the ridge objective is missed: tr(E A Eᵀ) / tr(X A Xᵀ)."""
    a = gram.double()
    exact = torch.linalg.solve(a, right.double().T).T
    error = solution.double() - exact
    return float(((error @ a) * error).sum() / ((exact @ a) * exact).sum())


def test_with_exact_products_the_emulated_blas_changes_nothing(rounding: Callable[[Product], None]) -> None:
    gram, right = system(1e-2)
    solutions = [right.clone(), right.clone()]
    cholesky.solve_(gram.clone(), solutions[0])
    rounding(torch.matmul)
    cholesky.solve_(gram.clone(), solutions[1])
    torch.testing.assert_close(solutions[1], solutions[0], rtol=1e-4, atol=1e-4 * float(solutions[0].abs().max()))


@pytest.mark.parametrize("damping", DAMPINGS)
def test_products_in_pieces_need_no_shift_and_no_refinement(
    damping: float, rounding: Callable[[Product], None]
) -> None:
    rounding(in_pieces)
    gram, right = system(damping)
    solution = right.clone()
    solved = cholesky.solve_(gram.clone(), solution)
    assert solved.shift == 0
    # Products are good to 2⁻¹⁶, whose errors add up at random: a float32 factorisation promises n·2⁻²⁴.
    assert solved.backward_error <= 2**-20
    # Of λ ≥ 5 %, what the defaults damp with, rounding the result to bfloat16 costs more.
    assert excess(gram, right, solution) <= (1e-6 if damping >= 5e-2 else 1e-5 if damping >= 1e-2 else 5e-3)


def test_truncated_tf32_is_not_used_because_it_fails(rounding: Callable[[Product], None]) -> None:
    gram, right = system(1e-2)
    in_two = right.clone()
    rounding(in_pieces)
    cholesky.solve_(gram.clone(), in_two)
    rounding(in_tf32)
    engine, one, factor = native_cholesky.Factorisation(), right.clone(), gram.clone()
    if engine.factor_(factor) == 0:
        engine.solve_(one)
        assert excess(gram, right, one) > 100 * excess(gram, right, in_two)
