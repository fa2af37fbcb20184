"""The CPU kernels of the extension `minisp._C`, behind checks: what they serve, and calls that cannot go wrong.

They take contiguous CPU tensors in bfloat16 or float32 and compute in float32. Each op of `minisp.ops` that has a
"native" implementation asks `serves…` first.
"""

import ctypes
import os
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# cublas_api.h, cublasMath_t.
CUBLAS_DEFAULT_MATH = 0
KINDS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3}
"""The activations, numbered as in csrc/elementwise.h; exact GELU has no native version."""


def serves(*tensors: Tensor | None, kind: str | None = None) -> bool:
    """Whether the extension is built and these tensors (None: absent) and this activation are within its reach."""
    return (
        find_spec("minisp._C") is not None
        and (kind is None or kind in KINDS)
        and all(
            t.device.type == "cpu" and t.is_contiguous() and t.dtype in (torch.bfloat16, torch.float32)
            for t in tensors
            if t is not None
        )
        and len({t.dtype for t in tensors if t is not None}) == 1
    )


def serves_gram(x: Tensor) -> bool:
    """Whether `gram_update_` can be used: bfloat16 on a CPU with matrix tiles."""
    return serves(x) and x.dtype == torch.bfloat16 and bool(_extension().tiles_available())


def activation_backward_(gate: Tensor, up: Tensor | None, grad_x: Tensor, kind: str) -> Tensor:
    """In place; the sums (3, m) float32 are returned. See `minisp.ops.activation_backward_`."""
    sums = torch.zeros(3, gate.shape[1])
    _extension().activation_backward(
        gate.data_ptr(),
        _address(up),
        grad_x.data_ptr(),
        sums.data_ptr(),
        *_shape(gate),
        KINDS[kind],
        torch.get_num_threads(),
    )
    return sums


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Logits (T, V), targets (T,) int64: see `minisp.ops.cross_entropy_gradient`."""
    gradient = torch.empty_like(logits)
    targets = targets.contiguous()
    loss = _extension().cross_entropy(
        logits.data_ptr(), targets.data_ptr(), gradient.data_ptr(), *_shape(logits), torch.get_num_threads()
    )
    return loss, gradient


def serves_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` can be used: bfloat16 heads of at most 512 dimensions, on a CPU with matrix tiles."""
    tensors = (query, key, value)
    return (
        find_spec("minisp._C") is not None
        and all(t.device.type == "cpu" and t.dtype == torch.bfloat16 and t.stride(-1) == 1 for t in tensors)
        and query.shape[1] % key.shape[1] == 0
        and key.shape == value.shape
        and 0 < query.shape[-1] == key.shape[-1] <= 512
        and bool(_extension().tiles_available())
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Differentiable; see `minisp.ops.causal_attention`."""
    result: Tensor = _CausalAttention.apply(query, key, value, scale)
    return result


class _CausalAttention(torch.autograd.Function):
    """See csrc/attention.h. Results and gradients lie in memory as (B, L, H, D), as the projections want them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = _empty_heads(query)
        logsumexp = torch.empty(query.shape[:3])
        shape = (*query.shape[:2], key.shape[1], *query.shape[2:], scale)
        addresses = (_strided(t) for t in (query, key, value, out))
        _extension().attention_forward(*addresses, logsumexp.data_ptr(), shape, torch.get_num_threads())
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        grad_out = grad_outputs[0] if grad_outputs[0].stride(-1) == 1 else grad_outputs[0].contiguous()
        gradients = (_empty_heads(query), _empty_heads(key), _empty_heads(value))
        read = [_strided(t) for t in (query, key, value, out, grad_out)]
        written = [_strided(t) for t in gradients]
        _extension().attention_backward(read, logsumexp.data_ptr(), written, ctx.shape, torch.get_num_threads())
        return *gradients, None


def _empty_heads(like: Tensor) -> Tensor:
    batch, heads, tokens, dim = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _row_major(matrix: Tensor) -> tuple[int, int]:
    """Address and stride of a matrix whose rows are contiguous; of a single row, torch may say any stride."""
    return matrix.data_ptr(), max(matrix.stride(0), matrix.shape[1])


def _strided(tensor: Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *tensor.stride()[:3]


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
        and hasattr(_extension(), "cholesky_factor" if device.type == "cpu" else "cholesky_factor_cuda")
        and gemm_address(device.type, dtype) != 0
    )


def workspace_bytes(device: torch.device, size: int, dtype: torch.dtype, streamed_columns: int = 0) -> int:
    """Memory that a `Factorisation` of a matrix (size, size) takes beside the matrix."""
    query = "cholesky_workspace_cuda" if device.type == "cuda" else "cholesky_workspace"
    return int(getattr(_extension(), query)(size, dtype == torch.float64, streamed_columns))


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
            return int(_extension().cholesky_factor(self.call))
        pivot = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.cuda.device(self.device):
            _extension().cholesky_factor_cuda(self.call, (*_queue(), pivot.data_ptr()))
        return int(pivot)

    def solve_(self, right: Tensor) -> None:
        """right (d, n) ← right A⁻¹."""
        place = _row_major(right)
        if self.device.type == "cpu":
            _extension().cholesky_solve(self.call, place, len(right))
            return
        with torch.cuda.device(self.device):
            _extension().cholesky_solve_cuda(self.call, (*_queue(), 0), place, len(right))


def _queue() -> tuple[int, int]:
    """torch's cuBLAS handle and current stream.

    The handle multiplies in full precision, whatever torch's own products do; torch sets that anew when it takes it.
    """
    handle = torch.cuda.current_blas_handle()
    set_mode = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    set_mode(blas_address("cuda", "cublasSetMathMode"))(handle, CUBLAS_DEFAULT_MATH)
    return handle, torch.cuda.current_stream().cuda_stream


def gram_update_(gram: Tensor, x: Tensor) -> None:
    """gram (m, m) float32 contiguous += XᵀX for x (T, m) bfloat16, on and below the diagonal blocks."""
    _extension().gram_update(gram.data_ptr(), x.data_ptr(), x.shape[0], x.shape[1], torch.get_num_threads())


def _extension() -> Any:
    return import_module("minisp._C")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shape(tensor: Tensor) -> tuple[int, int, bool]:
    return tensor.shape[0], tensor.shape[1], tensor.dtype == torch.bfloat16
