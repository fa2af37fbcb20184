"""Who computes an operation: the choice behind every `impl` argument."""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from minisp.errors import BackendError

Impl = Literal["auto", "torch", "native", "triton"]

# Before sm_80, GPUs multiply no bfloat16, and the kernels spill their registers.
OLDEST_GPU = (8, 0)


def serves_triton(*tensors: Tensor | None, any_strides: bool = False) -> bool:
    """Whether the kernels of `minisp.kernels` take these tensors (None: absent): on a GPU from sm_80 on, in one known
    dtype.

    Unless any strides will do, the tensors must be alike in strides too, with the last axis contiguous.
    """
    given = [t for t in tensors if t is not None]
    return (
        find_spec("triton") is not None
        and all(t.is_cuda and t.dtype in (torch.bfloat16, torch.float16, torch.float32) for t in given)
        and len({t.dtype for t in given}) == 1
        and torch.cuda.get_device_capability(given[0].device) >= OLDEST_GPU
        and (any_strides or (len({t.stride() for t in given}) == 1 and given[0].stride(-1) == 1))
    )


def choose(op: str, impl: Impl, *, native: bool = False, triton: bool = False) -> Impl:
    """Who computes: the caller's choice where it can serve, or the best of those that can."""
    able: list[Impl] = ["torch"]
    able += ["native"] if native else []
    able += ["triton"] if triton else []
    if impl == "auto":
        return able[-1]
    if impl not in able:
        raise BackendError(
            f"Operation {op}: expected an implementation that serves these tensors ({', '.join(able)}), got {impl!r}. "
            "Pass impl='auto', build the extension, or move the tensors."
        )
    return impl


def input_precision(dtype: torch.dtype) -> str:
    """How kernels multiply float32 inputs: as `torch.set_float32_matmul_precision` asks of torch's own products."""
    if dtype != torch.float32:
        return "ieee"
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set by torch's other name for it, after which torch refuses to read this one.
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[named]
