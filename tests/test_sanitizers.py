"""The CPU kernels under the address and undefined-behaviour sanitizers, as a program without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
KERNELS = ("attention", "attention_blocks", "cholesky_cpu", "elementwise", "gram", "tiles")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    sources = [ROOT / "tests" / "sanitize.cpp", *(ROOT / "csrc" / f"{name}.cpp" for name in KERNELS)]
    flags = "-std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -pthread"
    command = [str(COMPILER), *flags.split(), f"-I{ROOT / 'csrc'}", *sources, "-o", tmp_path / "sanitize", "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([tmp_path / "sanitize"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("clean\n")
    assert not run.stderr
