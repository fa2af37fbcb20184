"""The CPU kernels under the address and undefined-behaviour sanitizers, as a program without Python."""

import subprocess
from pathlib import Path

import pytest

from tests.native_build import COMPILER, ROOT, build_program

FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def run(program: Path, *arguments: str) -> str:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    program = build_program(ROOT / "tests" / "sanitize.cpp", tmp_path, levels=("portable",), flags=FLAGS)
    assert run(program).endswith("clean\n")


@pytest.mark.slow
def test_the_sanitizers_find_nothing_in_emulated_matrix_tiles(tmp_path: Path) -> None:
    program = build_program(ROOT / "tests" / "levels.cpp", tmp_path, levels=("amx",), flags=FLAGS)
    assert run(program, "few").startswith("amx float32")
