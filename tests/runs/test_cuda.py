"""What only a GPU can show about correctness; the suite of benchmarks/gpu_suite.py runs these first."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from minisp import ops
from minisp.fast import minify
from minisp.models.skeleton import load_model
from minisp.ops import cholesky, native_cholesky, reference
from minisp.plan import layout
from minisp.report.report import MinifyReport
from minisp.store.checkpoint import Checkpoint
from tests.tiny import LAYERS, VOCABULARY, WIDTH, save_checkpoint, tiny_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
pytestmark = [pytest.mark.gpu, needs_gpu]

HAS_SOLVER = torch.cuda.is_available() and native_cholesky.serves_cholesky(torch.device("cuda"), torch.float32)
needs_solver = pytest.mark.skipif(
    not HAS_SOLVER,
    reason="no GPU here"
    if not torch.cuda.is_available()
    else "the extension is not built, has no code for this GPU, or the driver is too old for it",
)


def system(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2 * n, n, dtype=torch.float64)
    gram = (x.T @ x / n).to(dtype)
    return (gram + gram.T) / 2, torch.randn(33, n, dtype=dtype)


def backward_error(gram: torch.Tensor, right: torch.Tensor, solution: torch.Tensor) -> float:
    gram, right, solution = gram.double().cpu(), right.double().cpu(), solution.double().cpu()
    return float((solution @ gram - right).norm() / (gram.norm() * solution.norm() + right.norm()))


@needs_solver
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 129, 512, 513, 1500, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solver(dtype: torch.dtype, n: int, pieces: bool) -> None:
    gram, right = system(n, dtype)
    solution = right.cuda()
    solved = cholesky.solve_(gram.cuda(), solution, pieces=pieces)
    # Two products in pieces, good to 2⁻¹⁶ each, show where there is nothing else to round.
    least = 2**-15 if pieces and dtype == torch.float32 else 0.0
    allowed = max(10 * n * torch.finfo(dtype).eps, least)
    assert backward_error(gram, right, solution) <= allowed
    assert solved.backward_error <= allowed


@needs_solver
@pytest.mark.parametrize("pieces", [False, True])
def test_a_system_as_wide_as_the_largest_models(pieces: bool) -> None:
    # 34 panels, the last of them not full, and more right-hand sides than a panel has columns. A matrix of low rank
    # plus a diagonal is made and multiplied quickly.
    n, generator = 17_000, torch.Generator("cuda").manual_seed(0)
    factor = torch.randn(n, 256, generator=generator, device="cuda") / 16
    gram = factor @ factor.T
    gram.diagonal().add_(1)
    wanted = torch.randn(600, n, generator=generator, device="cuda")
    right = wanted.clone()
    solved = cholesky.solve_(gram, right, pieces=pieces)
    assert solved.backward_error <= n * torch.finfo(torch.float32).eps / 100
    left = right.double() + (right.double() @ factor.double()) @ factor.double().T - wanted.double()
    assert float(left.norm() / wanted.double().norm()) <= 1e-3


@needs_solver
@pytest.mark.parametrize("pivot", [-1.0, float("nan")])
def test_a_bad_pivot_is_named(pivot: float) -> None:
    gram, _ = system(700, torch.float32)
    gram[600, 600] = pivot
    assert native_cholesky.Factorisation().factor_(gram.cuda()) == 601
    assert native_cholesky.Factorisation(pieces=True).factor_(gram.cuda()) == 601


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
    gram, cross = torch.zeros(300, 300, device="cuda"), torch.zeros(300, 300, device="cuda")
    ops.gram_update_(gram, x, impl=impl)
    ops.cross_update_(cross, x, up.cuda(), impl=impl)
    wide = x.cpu().double()
    scale = float(wide.square().sum(0).max())
    for ours, true in ((ops.mirror_(gram), reference.gram(wide)), (cross, reference.cross(wide, up.double()))):
        torch.testing.assert_close(ours.cpu().double(), true, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_blas_adds_sixteen_bit_products_to_float32(dtype: torch.dtype) -> None:
    # To a part of a matrix too, in place, with units apart, and beside nothing.
    x, y = torch.randn(1000, 640, device="cuda").to(dtype), torch.randn(1000, 96, device="cuda").to(dtype)
    room = torch.full((3, 640, 96), torch.nan, device="cuda")
    room[1] = 1
    ops.cross_update_(room[1], x, y)
    wide = x.double()
    torch.testing.assert_close(room[1].double(), 1 + reference.cross(wide, y.double()), rtol=1e-4, atol=0.1)
    assert room[0].isnan().all() and room[2].isnan().all()
    gram = torch.zeros(640, 640, device="cuda")
    ops.gram_update_(gram, x, impl="torch")
    assert not gram[:512, 512:].any()
    torch.testing.assert_close(ops.mirror_(gram).double(), reference.gram(wide), rtol=1e-4, atol=0.1)
    narrow = torch.zeros(320, 96, device="cuda")
    ops.cross_update_(narrow, x[:, ::2], y)
    torch.testing.assert_close(narrow.double(), reference.cross(wide[:, ::2], y.double()), rtol=1e-4, atol=0.1)


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
    served = {name for name, impl in who.items() if impl == "triton"}
    assert served >= {
        "activation",
        "activation_backward_",
        "cross_entropy_gradient",
        "gram_update_",
        "rms_norm",
        "rotary",
    }
    # Its BLAS is faster for 16 bits.
    assert who["cross_update_"] == "torch"
    assert ops.implementations(torch.device("cuda"), torch.float32, "silu")["cross_update_"] == "triton"


WINDOWS = torch.randint(3, VOCABULARY, (16, 60), generator=torch.Generator().manual_seed(0))


def cut(model: Any, **options: Any) -> MinifyReport:
    """The methods of the defaults, on windows that are too few for a model that anyone would use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minify(model, keep=0.6, calibration=WINDOWS, alignment=4, **options)


def assert_agree(ours: MinifyReport, theirs: MinifyReport) -> None:
    for kept, expected in zip(ours.kept, theirs.kept, strict=True):
        assert torch.equal(kept, expected)
    for layer, expected_layer in zip(ours.layers, theirs.layers, strict=True):
        assert layer.residual == pytest.approx(expected_layer.residual, rel=1e-3)
        assert layer.drift_explained == pytest.approx(expected_layer.drift_explained, rel=1e-2, abs=1e-4)


def test_a_model_on_the_gpu_gives_what_the_cpu_gives() -> None:
    assert_agree(cut(tiny_model("llama").to("cuda")), cut(tiny_model("llama")))


@pytest.mark.parametrize(
    ("options", "num_segments", "head_on_disk"),
    [
        ({}, 1, False),
        ({"segment": 1, "device_memory": "4GB"}, LAYERS, False),
        ({"segment": 1}, LAYERS, True),
    ],
)
def test_a_checkpoint_gives_on_the_gpu_what_it_gives_on_the_cpu(
    options: dict[str, Any], num_segments: int, head_on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"))
    theirs = cut(source, out=tmp_path / "cpu", device="cpu", dtype="float32")
    if head_on_disk:
        # The head of so small a model never pays to leave on disk.
        monkeypatch.setattr(layout, "_candidates", lambda shape, segment: iter([(1, 2, True)]))
    ours = cut(source, out=tmp_path / "cuda", device="cuda", dtype="float32", **options)
    assert (len(ours.plan.segments), ours.plan.layout.stream_vocabulary) == (num_segments, head_on_disk)
    assert_agree(ours, theirs)
    written, expected = (Checkpoint.open(tmp_path / device) for device in ("cuda", "cpu"))
    values = dict(expected.read(expected.tensors))
    assert written.tensors.keys() == expected.tensors.keys()
    for name, tensor in written.read(written.tensors):
        torch.testing.assert_close(tensor, values[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_checkpoint_in_the_type_that_the_gpu_takes_by_itself(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"))
    theirs = cut(source, out=tmp_path / "cpu", device="cpu", dtype="float32")
    ours = cut(source, out=tmp_path / "cuda")
    assert torch.device(ours.plan.device).type == "cuda"
    assert ours.plan.dtype in ("bfloat16", "float16")
    assert sum(map(len, ours.kept)) <= 0.6 * WIDTH * LAYERS
    # Rounding chooses other units of a random model, which are worth as much.
    losses = []
    for folder in (ours.out, theirs.out):
        model = load_model(Checkpoint.open(folder), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            losses.append(float(model(WINDOWS, labels=WINDOWS).loss))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
