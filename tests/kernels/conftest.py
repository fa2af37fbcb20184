"""Where kernels run in the tests.

A test marked `kernel` launches one. Without a GPU that needs Triton's interpreter, which is chosen by
TRITON_INTERPRET=1 before triton is imported: `test_interpreter.py` starts a process for it. Everything else runs
outside the interpreter.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, in this folder, what this process cannot run."""

    def runs(item: pytest.Item) -> bool:
        if HERE not in item.path.parents:
            return True
        launches = item.get_closest_marker("kernel") is not None
        return (launches and torch.cuda.is_available()) or launches == INTERPRETED

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]


@pytest.fixture
def device() -> str:
    """Where a `kernel` test puts its tensors."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def large_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many multiprocessors, and as short splits, as split a small product; workspaces are full of NaN at first."""
    from minisp.kernels import cross

    original = torch.Tensor.new_empty
    monkeypatch.setattr(cross, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cross, "TOKENS_PER_SPLIT", 40)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **how: original(self, *size, **how).fill_(torch.nan)
    )


class PoisonedTorch:
    """torch for a module, whose new tensors are full of NaN where torch says nothing of their content."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: Any, **how: Any) -> torch.Tensor:
        return torch.empty(*size, **how).fill_(torch.nan)

    @staticmethod
    def empty_like(*tensor: Any, **how: Any) -> torch.Tensor:
        return torch.empty_like(*tensor, **how).fill_(torch.nan)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers of these kernels allocate is full of NaN, where nobody writes it or reads it too soon."""
    from minisp.kernels import cross_entropy, norm, rotary, saliency

    for module in (cross_entropy, norm, rotary, saliency):
        monkeypatch.setattr(module, "torch", PoisonedTorch())


@pytest.fixture(autouse=INTERPRETED)
def _sound_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as bare 16-bit integers: it multiplies those in a dot, and cuts casts off."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_dot, original_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(side, float32) if side.dtype.scalar == bfloat16 else side for side in (a, b))
        return original_dot(self, a, b, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (float32, bfloat16):
            return original_cast(self, src, dst_type)
        rounded = torch.tensor(src.data, dtype=torch.float32).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, cast_impl)
