"""Every processor level that the CPU kernels are compiled for: the machine's own by a cap, the others emulated."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minisp.ops import native
from tests.native_build import COMPILER, LEVELS, ROOT, build_program

HAS_EXTENSION = native.serves(torch.zeros(1, 1))
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built")
X86 = platform.machine() in ("x86_64", "AMD64")
ARM = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
# The native operations, and the blocked Cholesky, whose diagonal blocks are eliminated by a level's code.
TESTS = ("tests/ops/test_ops.py", "-k", "native or threads or implementations or not_a_number or ridge_solve_names")


def machine_levels() -> list[str]:
    """The levels that this machine's processor can be capped to."""
    if not HAS_EXTENSION:
        return []
    info = native.extension().build_info()
    return list(info["levels"][: info["levels"].index(info["machine_level"]) + 1])


def run_python(*arguments: str, cap: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MINISP_MAX_CPU_ISA": cap}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.slow
def test_the_operations_at(level: str) -> None:
    if level not in machine_levels():
        pytest.skip(f"this processor has no {level}")
    code = "from minisp.ops import native; print(native.level())"
    assert run_python("-c", code, cap=level).stdout.split() == [level]
    result = run_python("-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", *TESTS, cap=level)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@needs_extension
def test_a_cap_that_names_no_level_is_an_error_that_lists_them() -> None:
    code = "import torch; from minisp.ops import native; native.serves_gram(torch.zeros(1, 1))"
    result = run_python("-c", code, cap="sse9")
    assert result.returncode != 0
    assert "BackendError" in result.stderr
    assert f"expected one of {', '.join(LEVELS)}, got 'sse9'" in result.stderr


@needs_extension
def test_a_cap_above_the_machine_changes_nothing() -> None:
    code = "from minisp.ops import native; print(native.level())"
    expected = native.extension().build_info()["machine_level"]
    assert run_python("-c", code, cap="amx").stdout.split() == [expected]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.slow
def test_every_level_against_plain_doubles_with_emulated_instructions(tmp_path: Path) -> None:
    program = build_program(ROOT / "tests" / "levels.cpp", tmp_path, levels=LEVELS, flags="-O2 -ffp-contract=fast")
    run = subprocess.run([program], capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.split()[:2] for line in run.stdout.splitlines()] == [
        [level, dtype] for level in LEVELS for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.skipif(None in ARM, reason="no aarch64-linux-gnu-g++, or no qemu-aarch64 to run what it makes")
@pytest.mark.slow
def test_the_portable_level_on_arm_against_plain_doubles(tmp_path: Path) -> None:
    compiler, emulator = ARM
    source, flags = ROOT / "tests" / "levels.cpp", "-O3 -static"
    program = build_program(source, tmp_path, levels=("portable",), flags=flags, compiler=compiler)
    run = subprocess.run([str(emulator), program, "few"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.split()[:2] for line in run.stdout.splitlines()] == [["portable", "float32"], ["portable", "bfloat16"]]


@pytest.mark.skipif(COMPILER is None or not X86, reason="needs a C++ compiler for x86-64")
def test_levels_share_no_code_and_run_none_when_loaded(tmp_path: Path) -> None:
    # A weak symbol outside a level's namespace would be merged: one level's instructions for all.
    for path in (ROOT / "csrc" / "levels").glob("*.cpp"):
        target = tmp_path / f"{path.stem}.o"
        flags = ["-std=c++17", "-O3", "-fPIC", "-DMINISP_LEVEL=avx2", "-mavx2", "-mfma", "-Wno-psabi", "-w"]
        subprocess.run([str(COMPILER), *flags, "-c", path, "-o", target], check=True)
        listed = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listed.splitlines() if line[17:18] in "WVuw"]
        # The compiler's own pointer to the C++ runtime is data, the same for all.
        shared = [line for line in weak if "minisp::avx2::" not in line and "DW.ref.__gxx_personality" not in line]
        assert not shared
        assert "_GLOBAL__sub_I" not in listed
