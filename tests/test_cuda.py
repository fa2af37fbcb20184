"""What only a GPU can show about correctness; the suite of benchmarks/gpu_suite.py runs these first."""

import warnings

import pytest
import torch

from minisp import cholesky, native, ops, reference
from minisp.fast import minify
from tests.models import tiny_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
pytestmark = [pytest.mark.gpu, needs_gpu]

HAS_SOLVER = torch.cuda.is_available() and native.serves_cholesky(torch.device("cuda"), torch.float32)
needs_solver = pytest.mark.skipif(not HAS_SOLVER, reason="the extension was built without CUDA")


def system(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2 * n, n, dtype=torch.float64)
    gram = (x.T @ x / n).to(dtype)
    return (gram + gram.T) / 2, torch.randn(33, n, dtype=dtype)


def backward_error(gram: torch.Tensor, right: torch.Tensor, solution: torch.Tensor) -> float:
    gram, right, solution = gram.double().cpu(), right.double().cpu(), solution.double().cpu()
    return float((solution @ gram - right).norm() / (gram.norm() * solution.norm() + right.norm()))


@needs_solver
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 512, 513, 1500, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solver(dtype: torch.dtype, n: int, on_host: bool) -> None:
    gram, right = system(n, dtype)
    matrix, solution = gram.clone() if on_host else gram.cuda(), right.cuda()
    solved = cholesky.solve_(matrix, solution)
    allowed = 10 * n * torch.finfo(dtype).eps
    assert backward_error(gram, right, solution) <= allowed
    assert solved.backward_error <= allowed


@needs_solver
def test_a_bad_pivot_is_named() -> None:
    gram, _ = system(700, torch.float32)
    gram[600, 600] = -1.0
    assert native.Factorisation(torch.device("cuda")).factor_(gram.cuda()) == 601
    gram[600, 600] = float("nan")
    assert native.Factorisation(torch.device("cuda")).factor_(gram.cuda()) == 601


@needs_solver
def test_the_callers_stream_is_used() -> None:
    gram, right = system(900, torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        solution = right.cuda()
        cholesky.solve_(gram.cuda(), solution)
    stream.synchronize()
    assert backward_error(gram, right, solution) <= 10 * 900 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_operations_against_the_reference(impl: ops.Impl) -> None:
    gate, up, grad = (torch.randn(1000, 300).to(torch.bfloat16) for _ in range(3))
    exact = reference.activation_backward(gate.double(), up.double(), grad.double(), "silu")
    forward = ops.activation(gate.cuda(), up.cuda(), "silu", impl=impl)
    z, u, g = gate.cuda(), up.cuda(), grad.cuda()
    x, sums = ops.activation_backward_(z, u, g, "silu", impl=impl)
    torch.testing.assert_close(forward.cpu().double(), exact[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(x.cpu().double(), exact[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sums.cpu().double(), exact[3], rtol=1e-3, atol=1e-3)
    weights = torch.rand(1000)
    for w, rtol in ((None, 1e-4), (weights, 4e-3)):
        gram, cross = torch.zeros(300, 300, device="cuda"), torch.zeros(300, 300, device="cuda")
        ops.gram_update_(gram, x, weights=w if w is None else w.cuda(), impl=impl)
        ops.cross_update_(cross, x, up.cuda(), weights=w if w is None else w.cuda(), impl=impl)
        wide, double = x.cpu().double(), None if w is None else w.double()
        scale = float(wide.square().sum(0).max())
        for ours, true in (
            (ops.mirror_(gram), reference.gram(wide, double)),
            (cross, reference.cross(wide, up.double(), double)),
        ):
            torch.testing.assert_close(ours.cpu().double(), true, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_cross_entropy_against_the_reference(impl: ops.Impl) -> None:
    logits, targets = (torch.randn(70, 32003) * 4).to(torch.bfloat16), torch.randint(32003, (70,))
    loss, gradient = ops.cross_entropy_gradient(logits.cuda(), targets.cuda(), impl=impl)
    true_loss, exact = reference.cross_entropy_gradient(logits.double(), targets)
    assert loss == pytest.approx(float(true_loss), rel=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), exact, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("width", [1536, 4096, 6144])
def test_gram_of_many_tokens(width: int) -> None:
    # Split sums, whole ones and, where the GPU has them, descriptors; and twice the same bits.
    x = torch.randn(5000, width, device="cuda").to(torch.bfloat16)
    results = []
    for _ in range(2):
        gram = torch.zeros(width, width, device="cuda")
        ops.gram_update_(gram, x, impl="triton")
        results.append(gram.tril())
    assert torch.equal(*results)
    exact = reference.gram(x.double()).tril()
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-4, atol=1e-4 * 5000)


def test_everything_on_a_gpu_is_served_by_kernels() -> None:
    who = ops.implementations(torch.device("cuda"), torch.bfloat16, "silu")
    assert {name for name, impl in who.items() if impl == "triton"} == {
        "activation",
        "activation_backward_",
        "cross_entropy_gradient",
        "cross_update_",
        "gram_update_",
    }


def test_a_model_on_the_gpu_gives_what_the_cpu_gives() -> None:
    windows = torch.randint(3, 64, (16, 60), generator=torch.Generator().manual_seed(0))
    reports = []
    for device in ("cpu", "cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reports.append(minify(tiny_model("llama").to(device), keep=0.6, calibration=windows, alignment=4))
    for ours, theirs in zip(*(report.kept for report in reports), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(*(report.layers for report in reports), strict=True):
        assert ours.residual == pytest.approx(theirs.residual, rel=1e-3)
