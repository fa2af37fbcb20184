"""Where kernels run in the tests, and how they are compiled without a GPU.

A test marked `kernel` launches one. Without a GPU that needs Triton's interpreter, which is chosen by
TRITON_INTERPRET=1 before triton is imported: `test_interpreter.py` starts a process for it. Everything else runs
outside the interpreter.
"""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
# Bytes of shared memory that one launch may ask for, by compute capability.
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


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


@pytest.fixture(autouse=INTERPRETED)
def _sound_bfloat16_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as bare 16-bit integers and multiplies those; widen the operands first."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(side, float32) if side.dtype.scalar == bfloat16 else side for side in (a, b))
        return original(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel for one GPU: bytes of shared memory and of stack, machine code as text."""

    shared: int
    stack: int
    sass: str

    def assert_fits(self, capability: int) -> None:
        assert self.stack == 0
        assert not re.findall(r"\b(?:STL|LDL)\b", self.sass), "registers spill to local memory"
        assert self.shared <= SHARED_LIMIT[capability]


@pytest.fixture
def compile_for(tmp_path: Path) -> Callable[..., Compiled]:
    """compile_for(capability, kernel, signature, constants, aligned, **options) compiles without a GPU.

    `aligned` names the arguments that are multiples of 16, as the launcher finds out from their values.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def compile_for(
        capability: int,
        kernel: Any,
        signature: dict[str, str],
        constants: dict[str, int],
        aligned: tuple[str, ...],
        **options: int,
    ) -> Compiled:
        signature = signature | dict.fromkeys(constants, "constexpr")
        attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, signature, constants, attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        stack = re.search(r"STACK:(\d+)", usage)
        assert stack, usage
        return Compiled(compiled.metadata.shared, int(stack[1]), _output(tools / "nvdisasm", "-c", cubin))

    return compile_for


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
