"""The blocked Cholesky of the extension `minisp._C`, for CPUs and CUDA, behind checks; see csrc/cholesky.h."""

import ctypes
import os
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from minisp.native import extension

# cublas_api.h, cublasMath_t.
CUBLAS_DEFAULT_MATH = 0


def gemm_address(device: str, dtype: torch.dtype) -> int:
    """Address of the process's float32 or float64 GEMM: Fortran's on "cpu", cuBLAS's on "cuda"; 0 where none is found.

    On a CPU it is the BLAS inside torch, which shares torch's threads.
    """
    letter = "d" if dtype == torch.float64 else "s"
    return blas_address(device, f"cublas{letter.upper()}gemm_v2" if device == "cuda" else f"{letter}gemm_")


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
    """Whether `Factorisation` can be used: float32 or float64, with a BLAS in the process and code for the device."""
    return (
        dtype in (torch.float32, torch.float64)
        and device.type in ("cpu", "cuda")
        and find_spec("minisp._C") is not None
        and hasattr(extension(), "cholesky_factor" if device.type == "cpu" else "cholesky_factor_cuda")
        and gemm_address(device.type, dtype) != 0
    )


def workspace_bytes(device: torch.device, size: int, dtype: torch.dtype, streamed_columns: int = 0) -> int:
    """Memory that a `Factorisation` of a matrix (size, size) takes beside the matrix."""
    query = "cholesky_workspace_cuda" if device.type == "cuda" else "cholesky_workspace"
    return int(getattr(extension(), query)(size, dtype == torch.float64, streamed_columns))


class Factorisation:
    """Cholesky in place, see csrc/cholesky.h: the strict upper triangle is untouched, the rest becomes the factor.

    Args:
        device: who computes. A matrix on the host with a GPU here is streamed through it.
        streamed_columns: 0: the matrix is worked on where it is; else: it is copied in panels, with as many columns of
            earlier panels at a time.
    """

    def __init__(self, device: torch.device, streamed_columns: int = 0):
        self.device = device
        self.streamed_columns = streamed_columns

    def factor_(self, matrix: Tensor) -> int:
        """0, or the number of the first pivot that is not positive, counted from 1. The matrix must outlive this."""
        double = matrix.dtype == torch.float64
        if matrix.device != self.device and not self.streamed_columns:
            self.streamed_columns = 512
        size = workspace_bytes(self.device, len(matrix), matrix.dtype, self.streamed_columns)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        gemm = gemm_address(self.device.type, matrix.dtype)
        place = _row_major(matrix)
        self.call = (place, len(matrix), double, self.workspace.data_ptr(), gemm, self.streamed_columns)
        if self.device.type == "cpu":
            return int(extension().cholesky_factor(self.call))
        pivot = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.cuda.device(self.device):
            extension().cholesky_factor_cuda(self.call, (*_queue(), pivot.data_ptr()))
        return int(pivot)

    def solve_(self, right: Tensor) -> None:
        """right (d, n) ← right A⁻¹."""
        place = _row_major(right)
        if self.device.type == "cpu":
            extension().cholesky_solve(self.call, place, len(right))
            return
        with torch.cuda.device(self.device):
            extension().cholesky_solve_cuda(self.call, (*_queue(), 0), place, len(right))


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
