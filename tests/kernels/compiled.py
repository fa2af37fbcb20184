"""What the compilers make of `shipped()` for every GPU generation: registers, stack, shared memory, instructions.

    python -m tests.kernels.compiled [--write]      # from the root; with --write: to compiled.csv, the golden table

Needs no GPU: Triton compiles for one that is not there, and its PTX and cuobjdump, which comes with it, say what came
out. A kernel that spills registers to memory is slow; one that asks for more shared memory than a launch may have is
refused.
"""

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.shipped import CAPABILITIES, Shipped, shipped

# Bytes of shared memory that one launch may ask for, and what drives the matrix units in PTX, by compute capability.
SHARED_LIMIT = dict(zip(CAPABILITIES, (166912, 101376, 232448, 232448, 101376), strict=True))
MATRIX_UNIT = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
# Registers of a multiprocessor of sm_90, which the programs that run on it at once share.
REGISTERS = 65536
# Rows of `Row`, after a line that names the version of Triton that compiled them.
GOLDEN = Path(__file__).with_name("compiled.csv")


@dataclass(frozen=True)
class Row:
    """What the compiler made of it for one GPU: per thread registers, bytes of stack; per program bytes of shared."""

    name: str
    capability: int
    warps: int
    registers: int
    stack: int
    shared: int


def compile_one(number: int, capability: int) -> tuple[Row, str]:
    """Compile entry `number` of `shipped()` for a GPU; what came out, and its PTX."""
    entry = shipped()[number]
    signature = entry.signature | dict.fromkeys(entry.constants, "constexpr")
    attrs = {(entry.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in entry.aligned}
    attrs = {place: hint for place, hint in attrs.items() if entry.kernel.arg_names[place[0]] not in entry.constants}
    source = ASTSource(entry.kernel, signature, entry.constants, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=entry.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (re.search(rf"{word}:(\d+)", usage) for word in ("REG", "STACK"))
    assert registers and stack, usage
    warps, shared = entry.options["num_warps"], compiled.metadata.shared
    row = Row(entry.name, capability, warps, int(registers[1]), int(stack[1]), shared)
    return row, compiled.asm["ptx"]


def faults(entry: Shipped, row: Row, ptx: str) -> list[str]:
    """What is wrong with a compiled kernel; empty where nothing is."""
    needs = [word.format(matrix=MATRIX_UNIT[row.capability]) for word in entry.needs]
    return [
        # Registers spill to the stack.
        *([f"a stack of {row.stack} bytes"] if row.stack else []),
        *([f"{row.shared} bytes of shared memory"] if row.shared > SHARED_LIMIT[row.capability] else []),
        *(f"no {word}" for word in needs if word not in ptx),
        *(
            [f"{row.registers} registers, too many for {entry.at_once} programs at once"]
            if row.capability == 90 and entry.at_once * row.warps * 32 * row.registers > REGISTERS
            else []
        ),
        *(f"{word} where there must be none" for word in entry.forbids if word in ptx),
    ]


def compile_all(numbers: Sequence[int]) -> list[tuple[Row, list[str]]]:
    """Rows and faults of these entries of `shipped()` for all their GPUs, on all cores."""
    everything = shipped()
    jobs = [(n, capability) for n in numbers for capability in everything[n].capabilities]
    # Fresh processes: a forked one would inherit the locks of this one's threads.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(_row_and_faults, *zip(*jobs, strict=True), chunksize=8))


def _row_and_faults(number: int, capability: int) -> tuple[Row, list[str]]:
    row, ptx = compile_one(number, capability)
    return row, faults(shipped()[number], row, ptx)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a table of rows that this version of Triton compiled."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        stream.write(f"# triton {triton.__version__}\n")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows(vars(row).values() for row in rows)


def read(path: Path) -> tuple[str, dict[tuple[str, int], Row]]:
    """The version of Triton that compiled a table, and its rows by name and compute capability."""
    with path.open(newline="", encoding="utf-8") as stream:
        version = stream.readline().removeprefix("# triton ").strip()
        rows = [Row(row.pop("name"), **{key: int(cell) for key, cell in row.items()}) for row in csv.DictReader(stream)]
    return version, {(row.name, row.capability): row for row in rows}


def main() -> None:
    """Compile everything and write the table if asked; fail, saying of which, where a kernel is not as it should be."""
    parser = argparse.ArgumentParser(description="What the compilers make of the Triton kernels.")
    parser.add_argument("--write", type=Path, nargs="?", const=GOLDEN, help="a table; by default the golden one")
    args = parser.parse_args()
    results = compile_all(range(len(shipped())))
    if args.write:
        write(args.write, [row for row, _ in results])
    wrong = [f"{row.name}, sm_{row.capability}: {', '.join(found)}" for row, found in results if found]
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{len(results)} compilations, nothing wrong")


if __name__ == "__main__":
    main()
