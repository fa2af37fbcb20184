"""What a ridge solve would cost a GPU, counted without one: launches, waits of the host, and whether there is code."""

from importlib import import_module

import pytest
import torch

from minisp.ops import cholesky, native_cholesky, residual
from minisp.ops.ridge import RidgeProblem
from tests.counting import Counted

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    not native_cholesky.serves_cholesky(CPU, torch.float32), reason="the extension is not built"
)
BUILT = ("sm_80", "sm_90a", "sm_100", "sm_120")
PTX = "compute_80"


def system(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2 * n, n)
    return x.T @ x / n, torch.randn(33, n)


@pytest.mark.parametrize(
    ("gpu", "capability", "in_machine_code", "with_ptx"),
    [
        ("T4", (7, 5), False, False),
        ("V100", (7, 0), False, False),
        ("A100", (8, 0), True, True),
        ("L40", (8, 9), True, True),
        ("H100", (9, 0), True, True),
        ("B200", (10, 0), True, True),
        ("B300", (10, 3), True, True),
        ("Thor", (11, 0), False, True),
        ("RTX 5090", (12, 0), True, True),
    ],
)
def test_which_gpus_the_extension_has_code_for(
    gpu: str, capability: tuple[int, int], in_machine_code: bool, with_ptx: bool
) -> None:
    assert native_cholesky.runs_on(BUILT, capability) == in_machine_code
    assert native_cholesky.runs_on((*BUILT, PTX), capability) == with_ptx
    assert not native_cholesky.runs_on((), capability)


def test_code_for_hopper_alone_runs_nowhere_else() -> None:
    assert native_cholesky.runs_on(["sm_90a"], (9, 0))
    assert not native_cholesky.runs_on(["sm_90a"], (10, 0))
    assert not native_cholesky.runs_on(["sm_100"], (9, 0))


@needs_native
@pytest.mark.parametrize("devices", [0, 1])
def test_a_driver_that_shows_no_device_means_torch(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = import_module("minisp._C")
    monkeypatch.setattr(extension, "cholesky_factor_cuda", None, raising=False)
    monkeypatch.setattr(extension, "cuda_device_count", lambda: devices)
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda_archs": [*BUILT, PTX]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native_cholesky, "gemm_address", lambda device, dtype: 1)
    assert native_cholesky.serves_cholesky(torch.device("cuda"), torch.float32) == (devices > 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not native_cholesky.serves_cholesky(torch.device("cuda"), torch.float32)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that a GPU gets, as many as there can be."""
    on = residual.rows_at_once
    monkeypatch.setattr(residual, "GPU_BYTES", 0)
    monkeypatch.setattr(residual, "rows_at_once", lambda device_type, size: on("cuda", size))


def test_gpu_blocks_stay_few_and_small() -> None:
    for n in (1536, 11008, 14336, 28672):
        rows = residual.rows_at_once("cuda", n)
        assert -(-n // rows) <= residual.GPU_BLOCKS
        assert rows * n * 8 <= max(residual.GPU_BYTES, 8 * n * n / residual.GPU_BLOCKS + 8 * n)


@needs_native
@pytest.mark.usefixtures("like_a_gpu")
def test_a_solve_launches_at_most_200_operations_around_its_factorisation() -> None:
    gram, right = system(480)
    wanted = right.clone()
    with Counted() as counted:
        solved = cholesky.solve_(gram.clone(), right)
    assert counted.num_launches <= 200
    # The wait for the pivot is in C++, that for the checks in `tolist`, which a CPU does not count.
    assert counted.syncs <= 1
    assert solved.backward_error <= 480 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(right @ gram, wanted, rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.usefixtures("like_a_gpu")
def test_a_refit_waits_a_few_times_however_large_it_is() -> None:
    found = []
    for n in (480, 1500):
        gram, _ = system(n)
        with Counted() as counted:
            RidgeProblem(gram, torch.arange(0, n, 2), torch.randn(700, n)).solve(0.05)
        found.append(counted.syncs)
    assert found[0] == found[1] <= 8


@needs_native
@pytest.mark.parametrize(("n", "d"), [(1536, 576), (11008, 4096), (14336, 4096), (28672, 8192)])
def test_the_schedule_of_a_gpu_stays_within_its_budget(n: int, d: int) -> None:
    count = import_module("minisp._C").cholesky_count
    panels = -(-n // 512)
    factor, both = count(n, 0, False, False), count(n, d, False, False)

    def launches(found: dict[str, int]) -> int:
        return found["products"] + found["inversions"] + found["copies"]

    # Per panel: a copy, the product with what was before, 4 blocks, 3 merges of 4 products, the square, the inverse.
    assert launches(factor) <= 20 * panels + 1
    # Per panel and direction: a copy, a product, the inverse made a square, the product with it.
    assert launches(both) - launches(factor) <= 2 * 4 * panels
    assert factor["inversions"] == -(-n // 128)
    assert factor["flops"] + factor["large_flops"] <= n**3 / 3 + 1.1 * 512 * n**2
    assert both["large_flops"] - factor["large_flops"] <= 2 * d * n**2 + 2.1 * 512 * d * n
    # In pieces, a product is 3 launches for every 1024 columns of its depth.
    parted = count(n, d, False, True)
    assert parted["large_flops"] == both["large_flops"]
    assert launches(parted) - launches(both) <= 3 * 3 * panels * (n / 2048 + 1) + 2 * 3 * panels


@needs_native
@pytest.mark.parametrize("n", [11008, 28672])
def test_the_memory_of_a_gpu_beside_the_matrix_is_that_of_a_few_panels(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cholesky, "panel_columns", lambda device: 512)
    panel = 4 * 512 * n
    assert native_cholesky.workspace_bytes(CPU, n, torch.float32) <= 1.1 * panel
    assert native_cholesky.workspace_bytes(CPU, n, torch.float32, pieces=True) <= 4.2 * panel
