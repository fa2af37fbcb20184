"""Builds the C++ extension `minisp._C` with ninja; everything else about the package is in pyproject.toml.

The extension needs a C++17 compiler, pybind11 and ninja, and neither torch nor a GPU. Where nvcc is found, csrc/*.cu is
compiled for `CUDA_ARCHS` and `PTX_ARCH` and linked with the static CUDA runtime, so that the result imports on a
machine without a driver. Environment: CXX and NVCC name the compilers, MINISP_CUDA=0 builds the CPU part alone.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
# 90a and not 90: Hopper's matrix instructions exist only in the architecture-specific target.
CUDA_ARCHS = ("80", "90a", "100", "120")
# For GPUs that are none of these, drivers compile the intermediate code of the oldest that is supported.
PTX_ARCH = "80"
CXX_FLAGS = "-std=c++17 -O3 -pthread -fPIC -fvisibility=hidden -Wall -Wextra"
AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# csrc/levels/ is compiled once for each processor level, lowest first; csrc/level.h says what they are. No vector
# passes between functions that are not inlined, so that its calling convention (psabi) does not matter.
LEVELS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": AVX512,
    "avx512_bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
# What the compilers' __builtin_cpu_supports calls what a level adds, where it adds anything.
LEVEL_NAMES = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512bf16", "amx": "amx-bf16"}
LEVEL_FLAGS = "-ffp-contract=fast -Wno-psabi -Wno-ignored-attributes"

RULES = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} {flags} {cxx_flags} $level_flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule cuda
  command = {nvcc} -ccbin {cxx} {flags} -std=c++17 -O3 {gencode} -Xcompiler -fPIC,-fvisibility=hidden $
    -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {linker} $in -o $out
"""


def find_nvcc() -> str | None:
    """The CUDA compiler from NVCC, PATH or CUDA_HOME; None where there is none or MINISP_CUDA=0."""
    if os.environ.get("MINISP_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def known_archs(nvcc: str) -> list[str]:
    """The members of `CUDA_ARCHS` that this nvcc can compile for (12.8 was the first to know 100 and 120)."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if "sm_" + arch.rstrip("a") in listed]


def known_levels(cxx: str) -> list[str]:
    """The members of `LEVELS` that this compiler can make for its target, up to the first that it cannot.

    It must be able to ask a processor for a level too: clang knew the flags of tiles before their name. Where flags or
    names are another processor's, some compilers only warn.
    """
    known = []
    for level, flags in LEVELS.items():
        asked = f'__builtin_cpu_supports("{LEVEL_NAMES[level]}")' if level in LEVEL_NAMES else "0"
        command = [cxx, *flags.split(), "-Werror", "-S", "-x", "c++", "-", "-o", os.devnull]
        source = f"int main() {{ return {asked}; }}".encode()
        if subprocess.run(command, input=source, capture_output=True, check=False).returncode:
            break
        known.append(level)
    return known


def ninja_file(output: Path, version: str) -> str:
    """The text of a build.ninja that compiles csrc/ into the shared object `output`."""
    import pybind11

    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if cxx is None:
        raise SystemExit("minisp._C: expected a C++17 compiler, found none. Install g++ or set CXX to a compiler.")
    nvcc = find_nvcc()
    archs = known_archs(nvcc) if nvcc else []
    includes = [SOURCES.resolve(), pybind11.get_include(), sysconfig.get_path("include")]
    flags = [shlex.quote(f"-I{path}") for path in includes] + [f'-DMINISP_VERSION=\\"{version}\\"']
    names = [f"sm_{arch}" for arch in archs] + ([f"compute_{PTX_ARCH}"] if nvcc else [])
    flags.append(f'-DMINISP_CUDA_ARCHS=\\"{",".join(names)}\\"')
    levels = known_levels(cxx)
    table = shlex.quote(f"-DMINISP_LEVELS(X)={' '.join(f'X({level})' for level in levels)}")
    cxx_flags = " ".join([CXX_FLAGS, table, *(f"-DMINISP_HAS_{level}" for level in levels)])
    sources = sorted(SOURCES.resolve().glob("*.cpp"))
    linker = f"{cxx} -pthread " + ("-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared")
    gencode = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    gencode += f" -gencode=arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}"
    if nvcc:
        linker = f"{nvcc} -ccbin {cxx} {gencode} -Xcompiler -pthread -shared -cudart static"
        flags.append("-DMINISP_WITH_CUDA")
        sources += sorted(SOURCES.resolve().glob("*.cu"))
    rules = RULES.format(
        cxx=cxx,
        cxx_flags=cxx_flags,
        flags=" ".join(flags),
        nvcc=nvcc,
        gencode=gencode,
        linker=linker,
    )
    objects = [source.name + ".o" for source in sources]
    lines = [
        f"build {target}: {'cuda' if source.suffix == '.cu' else 'cxx'} {str(source).replace(' ', '$ ')}"
        for target, source in zip(objects, sources, strict=True)
    ]
    for level in levels:
        for source in sorted(SOURCES.resolve().glob("levels/*.cpp")):
            objects.append(f"{source.name}.{level}.o")
            lines.append(f"build {objects[-1]}: cxx {str(source).replace(' ', '$ ')}")
            lines.append(f"  level_flags = -DMINISP_LEVEL={level} {LEVELS[level]} {LEVEL_FLAGS}")
    lines.append(f"build {str(output).replace(' ', '$ ')}: link {' '.join(objects)}")
    return rules + "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Replaces setuptools' compile steps by one call of ninja in the build folder."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(output, self.distribution.get_version()))
        # The module, not the program: a virtual environment's programs are not on PATH unless it is activated.
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


setup(
    ext_modules=[Extension("minisp._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
