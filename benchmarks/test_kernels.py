"""Every kernel of minisp in every implementation, beside what a user would write: see conftest.py for how to run it."""

from collections.abc import Callable

import operations
import pytest
from cases import Place, Shape

OURS = ("minisp triton", "minisp native", "minisp torch")
OPPONENTS = {
    "gram": ("addmm in float32", "addmm to float32", "16-bit matmul", "addmm tf32"),
    "cross": ("addmm in float32", "addmm to float32", "addmm tf32"),
    "mirror": ("tril and its transpose",),
    "saliency": ("autograd with a hook", "op by op", "torch.compile"),
    "activation": ("op by op",),
    "rms_norm": ("transformers", "F.rms_norm"),
    "rotary": ("transformers",),
    "attention": ("keys repeated",),
    "cross_entropy": ("autograd",),
}


@pytest.mark.parametrize(("operation", "contender"), [(op, name) for op in OPPONENTS for name in OURS + OPPONENTS[op]])
def test_kernel(
    operation: str, contender: str, shapes: dict[str, Shape], place: Place, contend: Callable[..., None]
) -> None:
    contend(getattr(operations, operation), shapes[operation], place, contender)
