"""C++ test programs over csrc/, with the kernels of chosen processor levels compiled for whatever machine this is."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def build_program(
    source: Path, folder: Path, *, levels: Sequence[str], flags: str, compiler: str | None = COMPILER
) -> Path:
    """Compile `source` with csrc/*.cpp, the bindings excepted, and with csrc/levels/*.cpp once for each level.

    The intrinsics of wider levels come from tests/emulated/, so that no level needs its processor.
    """
    table = [f"-DMINISP_LEVELS(X)={' '.join(f'X({level})' for level in levels)}"]
    table += [f"-DMINISP_HAS_{level}" for level in LEVELS]
    quiet = ["-Wno-psabi", "-Wno-ignored-attributes"]
    common = [str(compiler), "-std=c++17", "-pthread", *flags.split(), f"-I{ROOT / 'csrc'}", *quiet, *table]
    objects, commands = [], []

    def add(path: Path, name: str, *options: str) -> None:
        objects.append(folder / f"{name}.o")
        commands.append([*common, *options, "-c", str(path), "-o", str(objects[-1])])

    for path in (source, *(ROOT / "csrc").glob("*.cpp")):
        if path.stem not in ("bindings", "build_info"):
            add(path, f"{path.parent.name}_{path.stem}")
    for level in levels:
        for path in (ROOT / "csrc" / "levels").glob("*.cpp"):
            add(path, f"{level}_{path.stem}", f"-I{ROOT / 'tests' / 'emulated'}", f"-DMINISP_LEVEL={level}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for built in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), commands):
            assert built.returncode == 0, built.stderr
    program = folder / source.stem
    link = [*common, *map(str, objects), "-o", str(program), "-ldl"]
    linked = subprocess.run(link, capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    return program
