"""The solver of symmetric positive definite systems: accuracy, what it leaves alone, and what it refuses."""

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minisp.errors import BackendError, MinispError, NumericalError
from minisp.ops import cholesky, native_cholesky

DTYPES = (torch.float32, torch.float64)
HAS_NATIVE = native_cholesky.serves_cholesky(torch.device("cpu"), torch.float32)
IMPLS = ("torch", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="extension not built")))
SIZES = (1, 2, 63, 128, 129, 300, 700)


def random_gram(n: int) -> Tensor:
    x = torch.randn(2 * n + 1, n, dtype=torch.float64)
    return x.T @ x


def power_law(n: int) -> Tensor:
    """Condition number 1e8 after scaling to a unit diagonal, to within the effect of that scaling."""
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    gram = (basis * torch.logspace(0, -8, n, dtype=torch.float64)) @ basis.T
    return (gram + gram.T) / 2


def nearly_duplicate_units(n: int) -> Tensor:
    x = torch.randn(2 * n + 1, n, dtype=torch.float64)
    half = n // 2
    x[:, half : 2 * half] = x[:, :half] + 1e-4 * x[:, half : 2 * half]
    return x.T @ x


def badly_scaled(n: int) -> Tensor:
    scale = torch.logspace(-6, 6, n, dtype=torch.float64)
    return random_gram(n) * scale[:, None] * scale


SYSTEMS = {"random": random_gram, "power law": power_law, "duplicates": nearly_duplicate_units, "scales": badly_scaled}


def backward_error(gram: Tensor, right: Tensor, solution: Tensor) -> float:
    """Normwise, in float64, for the matrix scaled to a unit diagonal (zero rows left out)."""
    gram, right, solution = gram.double(), right.double(), solution.double()
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    matrix, wanted, x = gram * scale[:, None] * scale, right * scale, solution / scale
    wanted = wanted * (diagonal > 0)
    return float((x @ matrix - wanted).norm() / (matrix.norm() * x.norm() + wanted.norm()).clamp_min(1e-300))


def solve(gram: Tensor, right: Tensor, **options: object) -> tuple[Tensor, cholesky.Solved]:
    solution = right.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solved = cholesky.solve_(gram.clone(), solution, **options)  # type: ignore[arg-type]
    return solution, solved


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_error(dtype: torch.dtype, system: Callable[[int], Tensor], n: int, impl: str) -> None:
    gram, right = system(n).to(dtype), torch.randn(20, n, dtype=dtype)
    solution, solved = solve(gram, right, impl=impl)
    allowed = 10 * n * torch.finfo(dtype).eps
    assert solved.backward_error <= allowed
    # A shift, where rounding has made the matrix indefinite, is an error of the system of its own size.
    assert backward_error(gram, right, solution) <= allowed + solved.shift
    assert solved.shift <= n * torch.finfo(dtype).eps


@pytest.mark.skipif(not HAS_NATIVE, reason="extension not built")
@pytest.mark.parametrize("n", [1, 127, 128, 129, 300, 511, 512, 513, 700, 1100, 1664])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_panels_of_a_gpu_give_the_same_solution(
    dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four blocks to a square: its inverse is merged from theirs.
    gram, right = random_gram(n).to(dtype) / n, torch.randn(7, n, dtype=dtype)
    for columns in (128, 512):
        monkeypatch.setattr(native_cholesky, "panel_columns", lambda device, columns=columns: columns)
        engine = native_cholesky.Factorisation()
        factor, solution = gram.clone(), right.clone()
        assert engine.factor_(factor) == 0
        engine.solve_(solution)
        assert torch.equal(factor.triu(1), gram.triu(1)), "the strict upper triangle is left alone"
        assert backward_error(gram, right, solution) <= 10 * n * torch.finfo(dtype).eps
        factor.copy_(gram)[n - 1, n - 1] = -1
        assert engine.factor_(factor) == n


@pytest.mark.skipif(not HAS_NATIVE, reason="extension not built")
def test_more_right_hand_sides_than_unknowns_are_solved_in_parts() -> None:
    gram, right = random_gram(40) / 40, torch.randn(170, 40, dtype=torch.float64)
    solution, solved = solve(gram, right)
    assert solved.backward_error <= 1e-13
    torch.testing.assert_close(solution @ gram, right)


@pytest.mark.skipif(not HAS_NATIVE, reason="extension not built")
def test_padding_around_the_matrices_is_neither_read_nor_written() -> None:
    n, around = 150, float("nan")
    room, sides = torch.full((n + 4, n + 9), around), torch.full((8, n + 5), around)
    matrix, right = room[2 : n + 2, 3 : n + 3], sides[1:7, 2 : n + 2]
    matrix.copy_(random_gram(n))
    right.normal_()
    gram, wanted = matrix.clone(), right.clone()
    cholesky.solve_(matrix, right)
    assert backward_error(gram, wanted, right) <= 10 * n * torch.finfo(torch.float32).eps
    matrix.fill_(around)
    right.fill_(around)
    assert room.isnan().all()
    assert sides.isnan().all()


@pytest.mark.skipif(not HAS_NATIVE, reason="extension not built")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_row_may_have_any_stride(dtype: torch.dtype, impl: str) -> None:
    # What a transposed column has: torch calls strides (1, 1) contiguous, a BLAS wants at least the row's length.
    gram, right = random_gram(5).to(dtype), torch.randn(5, 1, dtype=dtype).T.contiguous()
    assert right.stride() == (1, 1)
    wanted = torch.linalg.solve(gram.double(), right[0].double())
    cholesky.solve_(gram.clone(), right, impl=impl)
    torch.testing.assert_close(right[0].double(), wanted, rtol=1e-4, atol=1e-6)


def test_native_work_takes_no_more_memory_than_it_says() -> None:
    assert native_cholesky.workspace_bytes(torch.device("cpu"), 1536, torch.float32) <= 0.1 * 4 * 1536**2
    assert native_cholesky.workspace_bytes(torch.device("cpu"), 1536, torch.float64) <= 0.1 * 8 * 1536**2


@pytest.mark.parametrize("impl", IMPLS)
def test_refinement_gains_what_single_precision_lost(impl: str) -> None:
    n = 200
    gram = power_law(n) + 1e-5 * torch.eye(n, dtype=torch.float64)
    right = torch.randn(5, n, dtype=torch.float64)
    exact = torch.linalg.solve(gram.float().double(), right.float().double().T).T
    errors = [
        float((solve(gram.float(), right.float(), impl=impl, refine=steps)[0] - exact).norm() / exact.norm())
        for steps in (0, 3)
    ]
    assert errors[0] > 1e-4
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize("impl", IMPLS)
def test_refinement_of_double_precision_leaves_the_factor_alone(impl: str) -> None:
    gram, right = random_gram(300), torch.randn(5, 300, dtype=torch.float64)
    exact = torch.linalg.solve(gram, right.T).T
    refined, solved = solve(gram, right, impl=impl, refine=3)
    torch.testing.assert_close(refined, exact, rtol=1e-10, atol=1e-12)
    assert solved.backward_error < 1e-15


@pytest.mark.parametrize("impl", IMPLS)
def test_a_matrix_that_rounding_made_indefinite_is_shifted_and_said_to_be(impl: str) -> None:
    n = 80
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    values = torch.ones(n, dtype=torch.float64)
    values[0] = -20 * torch.finfo(torch.float32).eps
    gram = ((basis * values) @ basis.T).float()
    gram = (gram + gram.T) / 2
    right = torch.randn(3, n)
    solution = right.clone()
    with pytest.warns(UserWarning, match=r"was not positive definite.*added to its scaled diagonal"):
        solved = cholesky.solve_(gram.clone(), solution, impl=impl)
    assert 0 < solved.shift <= 100 * n * torch.finfo(torch.float32).eps
    assert solution.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_dead_units_get_nothing_and_disturb_nobody(impl: str) -> None:
    gram, right = random_gram(200), torch.randn(4, 200, dtype=torch.float64)
    dead = torch.tensor([0, 77, 199])
    living = torch.tensor([i for i in range(200) if i not in dead])
    gram[dead] = 0
    gram[:, dead] = 0
    solution, _ = solve(gram, right, impl=impl)
    assert not solution[:, dead].any()
    alone, _ = solve(gram[living][:, living], right[:, living], impl=impl)
    torch.testing.assert_close(solution[:, living], alone)


System = tuple[Tensor, Tensor]


def with_value(gram: Tensor, i: int, j: int, value: float | Tensor) -> Tensor:
    gram[i, j] = value
    return gram


def with_zero_unit(gram: Tensor, i: int) -> Tensor:
    gram[i] = 0
    gram[:, i] = 0
    return gram


def with_strong_pair(gram: Tensor, i: int, j: int) -> Tensor:
    gram[i, j] = gram[j, i] = 3 * (gram[i, i] * gram[j, j]).sqrt()
    return gram


def bad(rng: random.Random) -> float:
    return rng.choice([float("nan"), float("inf"), float("-inf")])


OTHER_DTYPES = (torch.float16, torch.bfloat16, torch.int64, torch.complex64, torch.bool)

# What is wrong: from a Gram matrix g, right-hand sides r, two units i and j, and a source of choices.
KINDS: dict[str, Callable[[Tensor, Tensor, int, int, random.Random], System]] = {
    "bad value in the matrix": lambda g, r, i, j, rng: (with_value(g, i, j, bad(rng)), r),
    "bad value in the right-hand sides": lambda g, r, i, j, rng: (g, with_value(r, 1, j, bad(rng))),
    "zero rows": lambda g, r, i, j, rng: (with_zero_unit(g, i), r),
    "zero on the diagonal": lambda g, r, i, j, rng: (with_value(g, i, i, 0), r),
    "negative diagonal": lambda g, r, i, j, rng: (with_value(g, i, i, -g[i, i]), r),
    "not symmetric": lambda g, r, i, j, rng: (with_value(g, i, j, g[i, j] + 0.5 * g.max() * (i != j)), r),
    "indefinite": lambda g, r, i, j, rng: (with_strong_pair(g, i, j), r),
    "all zero": lambda g, r, i, j, rng: (g.zero_(), r),
    "rank one": lambda g, r, i, j, rng: (r[:1].T @ r[:1], r),
    "huge": lambda g, r, i, j, rng: (g * (0.01 * torch.finfo(g.dtype).max / g.abs().max() / len(g)), r),
    "tiny": lambda g, r, i, j, rng: (g * (1e6 * torch.finfo(g.dtype).tiny / g.abs().max()), r),
    "other dtype": lambda g, r, i, j, rng: (g.to(rng.choice(OTHER_DTYPES)), r),
    "another dtype right": lambda g, r, i, j, rng: (
        g,
        r.to(torch.float32 if r.dtype == torch.float64 else torch.float64),
    ),
    "other shape": lambda g, r, i, j, rng: (rng.choice([g[:, :-1], g[:-1], g[None], g[0]]), r),
    "another shape right": lambda g, r, i, j, rng: (g, rng.choice([r[:, :-1], r[None], r[0], torch.cat([r, r], 1)])),
    "columns apart": lambda g, r, i, j, rng: (torch.stack([g, g], -1)[..., 0], r),
    "one row for all": lambda g, r, i, j, rng: (g[:1].expand(len(g), len(g)), r),
    "rows apart": lambda g, r, i, j, rng: (torch.stack([g, g], 1)[:, 0], r),
    "transposed right": lambda g, r, i, j, rng: (g, r.T.contiguous().T),
    "aliasing": lambda g, r, i, j, rng: (g, g[:3]),
    "device": lambda g, r, i, j, rng: (g.to("meta"), r),
    "gradient": lambda g, r, i, j, rng: (g.requires_grad_(), r),
    "sparse": lambda g, r, i, j, rng: (g.to_sparse(), r),
    "no unknowns": lambda g, r, i, j, rng: (g[:0, :0], r[:, :0]),
    "no right-hand sides": lambda g, r, i, j, rng: (g, r[:0]),
}
# What has an answer: every other kind must be refused (some shapes of "not symmetric" happen to leave it symmetric).
ANSWERED = {"zero rows", "all zero", "huge", "tiny", "rows apart", "no unknowns", "no right-hand sides"}
MAY_BE_ANSWERED = ANSWERED | {"not symmetric", "rank one", "indefinite"}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_is_solved_or_refused(kind: str, impl: str) -> None:
    rng = random.Random(kind)
    for n in (1, 2, 5, 130):
        for dtype in DTYPES:
            right = torch.randn(3, n, dtype=dtype)
            gram, right = KINDS[kind](random_gram(n).to(dtype), right, rng.randrange(n), rng.randrange(n), rng)
            matrix = gram.clone() if kind == "rows apart" else gram
            before = gram.detach().clone(), right.clone()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    solved = cholesky.solve_(matrix, right, impl=impl)  # type: ignore[arg-type]
            except MinispError as error:
                assert isinstance(error, NumericalError | BackendError)
                assert "expected" in str(error)
                assert kind not in ANSWERED, f"{kind}, n = {n}: {error}"
                continue
            # With one unknown, most of these are no faults.
            assert kind in MAY_BE_ANSWERED or n == 1, f"{kind}, n = {n} was answered"
            if right.numel():
                assert right.isfinite().all()
                assert backward_error(*before, right) <= 10 * n * torch.finfo(dtype).eps + solved.shift
