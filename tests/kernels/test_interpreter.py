"""Runs the tests marked `kernel` without a GPU, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What compiles the kernels for GPUs launches none.
FILES = sorted({path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name, "test_compiles.py"})


@pytest.mark.parametrize("name", FILES)
def test_kernels_are_correct_under_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", "kernel", str(HERE / name)]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
