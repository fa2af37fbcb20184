"""The blocked Cholesky of the extension `minisp._C`, for CPUs and CUDA, behind checks; see csrc/cholesky.h."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from minisp.errors import BackendError, one_line
from minisp.ops.native import extension

# cublas_api.h, cublasMath_t.
CUBLAS_DEFAULT_MATH = 0


def gemm_address(device: str, dtype: torch.dtype) -> int:
    """Address of the process's GEMM: Fortran's of a dtype on "cpu", cuBLAS's of all on "cuda"; 0 where none is found.

    On a CPU it is the BLAS inside torch, which shares torch's threads.
    """
    name = "dgemm_" if dtype == torch.float64 else "sgemm_"
    return blas_address(device, "cublasGemmEx" if device == "cuda" else name)


def large_gemm_address(device: str, dtype: torch.dtype) -> int:
    """Who makes the large products: the same. Tests put one in its place that rounds as a GPU does."""
    return gemm_address(device, dtype)


@cache
def blas_address(device: str, name: str) -> int:
    """Address of a function of the BLAS that torch has loaded for "cpu" or "cuda"; 0 where it is not found."""
    folder = Path(torch.__file__).parent / "lib"
    libraries = ["libtorch_cpu.so", "libtorch_cpu.dylib"]
    if device == "cuda":
        libraries = [f"libcublas.so.{(torch.version.cuda or '0').split('.')[0]}"]
    for library in libraries:
        for path in (folder / library, library):
            with suppress(OSError, AttributeError):
                # Only a library that torch has loaded already: nothing new comes into the process.
                loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
                return ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0
    return 0


def serves_cholesky(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `Factorisation` can be used: float32 or float64, with a BLAS in the process and code for the device.

    On a GPU: the extension was built with CUDA, the driver is new enough for it, and it holds code for this GPU.
    """
    return (
        dtype in (torch.float32, torch.float64)
        and device.type in ("cpu", "cuda")
        and find_spec("minisp._C") is not None
        and (device.type == "cpu" or _has_code(device))
        and gemm_address(device.type, dtype) != 0
    )


def _has_code(device: torch.device) -> bool:
    # A driver that is too old for the extension's CUDA runtime shows no devices, even where torch's runtime has some.
    return (
        hasattr(extension(), "cholesky_factor_cuda")
        and extension().cuda_device_count() > 0
        and runs_on(extension().build_info()["cuda_archs"], torch.cuda.get_device_capability(device))
    )


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `archs` runs on a GPU of this compute capability (CUDA C++ Programming Guide, 5.8.1).

    Machine code sm_XY runs on GPUs of the same major and no lesser minor version, sm_XYa on that version alone; PTX,
    compute_XY, is compiled by the driver for every GPU from that version on.
    """

    def serves(arch: str) -> bool:
        kind, _, number = arch.partition("_")
        own = divmod(int(number.rstrip("a")), 10)
        if number.endswith("a"):
            return capability == own
        return capability >= own if kind == "compute" else capability[0] == own[0] and capability >= own

    return any(serves(arch) for arch in archs)


def panel_columns(device: torch.device) -> int:
    """Columns of a panel, and of the inverses in its place: csrc/ has code for these."""
    return 512 if device.type == "cuda" else 128


def workspace_bytes(device: torch.device, size: int, dtype: torch.dtype, *, pieces: bool = False) -> int:
    """Memory that a `Factorisation` of a matrix (size, size) takes beside the matrix: 2 panels, with pieces 5."""
    columns = panel_columns(device)
    own = int(extension().cholesky_workspace(columns, size, dtype == torch.float64))
    return own + (size + columns) * 3 * int(extension().cholesky_piece_columns) * 2 * pieces


class Factorisation:
    """Cholesky in place, see csrc/cholesky.h: the strict upper triangle is untouched, the rest becomes the factor.

    Args:
        pieces: whether large float32 products on a GPU are made of three bfloat16 ones, each number in two pieces of 8
            bits: csrc/cholesky_cuda.h. Products are then good to 2⁻¹⁶ instead of 2⁻²⁴. CPUs always multiply in full.
    """

    def __init__(self, *, pieces: bool = False):
        self.pieces = pieces

    def factor_(self, matrix: Tensor) -> int:
        """0, or the number of the first pivot that is not positive, counted from 1. The matrix must outlive this.

        Raises:
            BackendError: the device refuses a call.
        """
        device, size, double = matrix.device, len(matrix), matrix.dtype == torch.float64
        own = workspace_bytes(device, size, matrix.dtype)
        parted = self.pieces and device.type == "cuda" and not double
        total = workspace_bytes(device, size, matrix.dtype, pieces=parted)
        self.workspace = torch.empty(total, dtype=torch.uint8, device=device)
        address = self.workspace.data_ptr()
        multiply = gemm_address(device.type, matrix.dtype), large_gemm_address(device.type, matrix.dtype)
        self.call = (_row_major(matrix), size, double, panel_columns(device), address, size, *multiply)
        self.room = address + own if parted else 0
        if device.type == "cpu":
            return int(extension().cholesky_factor(self.call))
        pivot = torch.zeros((), dtype=torch.int64, device=device)
        with _calling(device):
            extension().cholesky_factor_cuda(self.call, (*_queue(), pivot.data_ptr(), self.room))
        return int(pivot)

    def solve_(self, right: Tensor) -> None:
        """right (d, n) ← right A⁻¹.

        Raises:
            BackendError: the device refuses a call.
        """
        place = _row_major(right)
        if right.device.type == "cpu":
            extension().cholesky_solve(self.call, place, len(right))
            return
        with _calling(right.device):
            extension().cholesky_solve_cuda(self.call, (*_queue(), 0, self.room), place, len(right))


@contextmanager
def _calling(device: torch.device) -> Iterator[None]:
    """Calls of CUDA and cuBLAS on a device; what they refuse is a typed error."""
    with torch.cuda.device(device):
        try:
            yield
        except RuntimeError as error:
            raise BackendError(
                f"Ridge system on {device}: expected CUDA and cuBLAS to take the solver's calls, got: "
                f"{one_line(error)} Pass impl='torch', rebuild the extension for this GPU, or update the driver."
            ) from error


def _queue() -> tuple[int, int]:
    """torch's cuBLAS handle and current stream.

    The handle multiplies in full precision, whatever torch's own products do; torch sets that anew when it takes it.
    """
    handle = torch.cuda.current_blas_handle()
    set_mode = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    set_mode(blas_address("cuda", "cublasSetMathMode"))(handle, CUBLAS_DEFAULT_MATH)
    return handle, torch.cuda.current_stream().cuda_stream


def _row_major(matrix: Tensor) -> tuple[int, int]:
    """Address and stride of a matrix whose rows are contiguous; of a single row, torch may say any stride."""
    return matrix.data_ptr(), max(matrix.stride(0), matrix.shape[1])
