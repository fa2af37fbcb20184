"""A `Case`: one operation on random tensors, its contenders, its least work, and the check of what they compute.

test_kernels.py and test_solver.py time cases by pytest-benchmark, gpu_parts.py in races on a GPU. Both check first.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from minisp import ops

# A rehearsal of the GPU suite: kernels run on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What a check takes at most: float64 is slow, and tensor cores truncate their sums, which grows with the tokens.
CHECKED = {"T": 512, "L": 256, "B": 1, "n": 512}
Shape = dict[str, int]
Results = tuple[Tensor, ...]
Contenders = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Place:
    """Where tensors lie, and their type."""

    device: torch.device
    dtype: torch.dtype

    @property
    def runs_triton(self) -> bool:
        """Whether Triton's kernels can be launched on these tensors."""
        return self.device.type == "cuda" or INTERPRETED

    def randn(self, *shape: int) -> Tensor:
        """Random data: zeros would cost less power, and run faster."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def ours(self, call: Callable[[ops.Impl], Any], *, triton: bool = True, native: bool = True) -> Contenders:
        """minisp's implementations on this device, each through the seam; which there are of them."""
        impls: list[ops.Impl] = ["triton"] if triton and self.runs_triton else []
        impls += ["native"] if native and not self.runs_triton else []
        if INTERPRETED:
            call = partial(_interpreted, call)
        return {f"minisp {impl}": partial(call, impl) for impl in (*impls, "torch")}


def _interpreted(call: Callable[[ops.Impl], Any], impl: ops.Impl) -> Any:
    """A call in a rehearsal, during which the seam lets kernels have tensors of a CPU."""
    with patch.object(ops, "serves_triton", lambda *tensors, any_strides=False: True):
        return call(impl)


@dataclass(frozen=True)
class Case:
    """One operation on tensors of one shape.

    Attributes:
        contenders: who computes it, by name, minisp's first; each returns what `read` makes the results of.
        specification: the results in a dtype, of `minisp.ops.reference`.
        dtype: of the tensors.
        before: puts back what contenders overwrite; to be called before each, and not timed.
        flops, num_bytes: the least work; 0 for what does not bound it.
        terms: for every result, how many numbers are summed into it; see `check`.
        eps: of contenders that multiply less exactly than the type of their results says.
    """

    contenders: Contenders
    specification: Callable[[torch.dtype], Results]
    dtype: torch.dtype
    read: Callable[[Any], Results] = tuple
    before: Callable[[], object] = lambda: None
    flops: float = 0.0
    num_bytes: float = 0.0
    terms: tuple[int, ...] = (1,)
    eps: dict[str, float] = field(default_factory=dict)


def check(case: Case, name: str) -> float:
    """Largest error of a contender's results, in units of what is allowed.

    Allowed is the error of the reference in the same dtype, and eps·√terms beside, relative to the largest element.

    Raises:
        AssertionError: more than 1, or not a number.
    """
    case.before()
    results, shares = case.read(case.contenders[name]()), []
    exact, eager = case.specification(torch.float64), case.specification(case.dtype)
    for value, rough, true, terms in zip(results, eager, exact, case.terms, strict=True):
        size = true.abs().max().clamp_min(1e-30)
        eps = case.eps.get(name, torch.finfo(value.dtype).eps)
        allowed = (rough.double() - true).abs().max() / size + eps * terms**0.5
        shares.append(float((value.double() - true).abs().max() / size / allowed))
    assert all(share <= 1 for share in shares), f"{name}: errors of {shares} times what is allowed"
    return max(shares)


def checked_shape(shape: Shape) -> Shape:
    """The shape that is checked before one is timed: the same with fewer tokens, or kept units."""
    return {name: min(size, CHECKED.get(name, size)) for name, size in shape.items()}
