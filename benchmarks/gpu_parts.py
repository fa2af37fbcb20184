"""The parts of gpu_suite.py that measure the machine and a whole layer, and the command that runs any part.

    python benchmarks/gpu_parts.py PART... --result FOLDER [--rehearse]

Every part is a generator that yields all of its figures so far whenever there are more, so that a part that runs out of
time keeps what it has.
Times are [p20, p50, p80] in seconds as `gpu_bench.Bench.race` takes them.
"""

import argparse
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gpu_end_to_end
import gpu_operations
import harness
import torch
from gpu_bench import Bench, Figures, line
from gpu_end_to_end import ONE_SWEEP, in_memory, llama_config
from torch import nn

from minisp.fast import minify
from minisp.kernels import gram as gram_kernel

# What a kernel is, by its name; the first that matches.
KINDS = {
    "minisp": r"minisp::|^(gram|cross|add_partials|mirror|activation|rms_norm|rotate)\w*_kernel",
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm)|splitk",
    "copies": r"memcpy|memset|aten::copy_",
}


def ceilings(bench: Bench) -> Iterator[Figures]:
    """What the machine can do. Published for an H100 SXM: 3.35 TB/s, 989 TFLOP/s bf16, 64 GB/s each way over PCIe 5;
    expect 90 %, 80 % and 80 % of it. Disks: what 70B in a small memory is bound by.
    """
    big = torch.empty(bench.shapes(2**30, 2**12), dtype=torch.uint8, device=bench.device)
    size = bench.shapes(2**28, 2**10)
    begin = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=not bench.rehearsal)
    figures: Figures = {"pinning_bytes_per_s": size / (time.perf_counter() - begin)}
    other, device_part = torch.empty_like(big), big[:size]
    figures |= {
        "copy_bytes_per_s": 2 * big.numel() / bench.seconds(lambda: other.copy_(big)),
        "h2d_bytes_per_s": size / bench.seconds(lambda: device_part.copy_(host, non_blocking=True)),
        "d2h_bytes_per_s": size / bench.seconds(lambda: host.copy_(device_part, non_blocking=True)),
    }
    n = bench.shapes(8192, 16)
    for name, dtype in {"bf16": bench.half, "tf32": torch.float32, "fp32": torch.float32}.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
        figures[f"{name}_flops"] = 2 * n**3 / bench.seconds(partial(torch.mm, a, b))
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = " / ".join(f"{figures[f'{name}_flops'] / 1e12:.0f}" for name in ("bf16", "tf32", "fp32"))
    ways = " / ".join(f"{figures[f'{way}_bytes_per_s'] / 1e9:.0f}" for way in ("h2d", "d2h", "pinning"))
    figures["summary"] = [
        line("copy", f"{figures['copy_bytes_per_s'] / 1e12:.2f} TB/s"),
        line("bf16 / tf32 / fp32 GEMM", f"{rates} TFLOP/s"),
        line("to / from the device / page-locking", f"{ways} GB/s"),
    ]
    yield figures
    for folder in dict.fromkeys((tempfile.gettempdir(), "/dev/shm")):
        file_size = bench.shapes(2**31, 2**12)
        # In a container, /dev/shm often has room for 64 MB.
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * file_size:
            figures |= disk_rates(folder, file_size)
            written, read = (figures[f"{folder} {way}_bytes_per_s"] / 1e9 for way in ("write", "read"))
            figures["summary"].append(line(f"{folder}, written / read", f"{written:.1f} / {read:.1f} GB/s"))
            yield figures


def disk_rates(folder: str, size: int) -> Figures:
    """Bytes per second of writing a file until it is durable, and of reading it back without the system's copy."""
    block = os.urandom(min(size, 2**24))
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(len(block)):
            pass
        seconds = time.perf_counter() - begin
    return {f"{folder} write_bytes_per_s": size / written, f"{folder} read_bytes_per_s": size / seconds}


def accumulation(bench: Bench) -> Iterator[Figures]:
    """A million tokens into one G: the diagonal's bias from truncating tensor cores should stay below 1e-4. One
    accumulator sums all 16384 tokens of a launch, for neither width leaves a GPU programs to split them among (528 and
    1176 tiles of the kernel with pointers, 600 of the one with descriptors, which serves the second width where there
    is one): −2e-5 a launch, which does not grow with their number.
    """
    tokens, launches, every = bench.shapes((16384, 64, 6), (32, 2, 6))
    rows, summary = [], []
    for width in bench.shapes((gram_kernel.NARROW, 6144), (48,)):
        matrix = torch.zeros(width, width, device=bench.device)
        exact = torch.zeros(len(range(0, width, every)), dtype=torch.float64, device=bench.device)
        for _ in range(launches):
            x = torch.randn(tokens, width, device=bench.device, dtype=bench.half)
            gram_kernel.gram_update_(matrix, x)
            exact += x[:, ::every].double().square().sum(0)
        errors = matrix.diagonal()[::every].double() / exact - 1
        row = {"m": width, "T": tokens * launches, "bias": float(errors.mean()), "worst": float(errors.abs().max())}
        rows.append(row)
        summary.append(line(f"bias of the diagonal, m = {width}", f"{row['bias']:.1e}, worst {row['worst']:.1e}"))
        yield {"rows": rows, "summary": summary}


def layer(bench: Bench) -> Iterator[Figures]:
    """Where the time of one 7B-shaped layer goes: one sweep and its refit under torch's profiler, milliseconds by kind
    of kernel. Expected of 8192 tokens and one layer, forward and backward: products 2.6 TFLOP at 680, 3.9 ms, and Gram
    1.0 TFLOP, 2.1 ms; attention 0.33 TFLOP, 1.3 ms; norms, rotary and residuals 90 bytes a hidden element where they
    are fused, 1.2 ms, and 380, 4.9 ms, where transformers' eager ones run; activation 0.7 ms. Beside them the head of
    32000 tokens, 2.6 ms, and one solve.
    """
    windows = torch.randint(0, 100, bench.shapes((4, 2048), (4, 16)), generator=torch.Generator().manual_seed(0))
    config = llama_config(bench)
    config.num_hidden_layers = 1
    found: Figures = {}

    def profiled(model: nn.Module) -> dict[str, float]:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [] if bench.rehearsal else [torch.profiler.ProfilerActivity.CUDA]
        with warnings.catch_warnings():
            # The windows are few for a refit that anyone would use.
            warnings.simplefilter("ignore")
            with torch.profiler.profile(activities=kinds) as profile:
                report = minify(model, keep=0.8, calibration=windows, progress=lambda *_: None, **ONE_SWEEP)
                bench.synchronize()
        found["kernels"] = kernels_of(profile, bench)
        return report.seconds

    # Once for what is compiled and set up at first.
    in_memory(bench, config, profiled)
    found["phases"] = in_memory(bench, config, profiled)["phases"]
    by_kind: dict[str, float] = {}
    for row in found["kernels"]:
        by_kind[row["kind"]] = by_kind.get(row["kind"], 0.0) + row["milliseconds"]
    found |= {"milliseconds": by_kind, "kernels": found["kernels"][:40]}
    text = ", ".join(f"{kind} {spent:.1f}" for kind, spent in sorted(by_kind.items()))
    yield found | {"summary": [line("one layer, ms", text)]}


def kernels_of(profile: torch.profiler.profile, bench: Bench) -> list[Figures]:
    """Milliseconds, calls and kind of every kernel, the longest first; in a rehearsal of every operation."""
    rows = []
    for event in profile.key_averages():
        spent = event.self_cpu_time_total if bench.rehearsal else event.self_device_time_total
        # An operation of the host has the time of the kernels that it launched, which have events of their own.
        if spent and (bench.rehearsal or (event.device_type.name == "CUDA" and not event.is_user_annotation)):
            kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key, re.IGNORECASE)), "others")
            rows.append({"name": event.key[:80], "kind": kind, "calls": event.count, "milliseconds": spent / 1e3})
    return sorted(rows, key=lambda row: -row["milliseconds"])


FUNCTIONS: dict[str, Callable[[Bench], Iterator[Figures]]] = {
    "ceilings": ceilings,
    **{part: partial(gpu_operations.operation, part) for part in gpu_operations.OPERATIONS},
    "ridge": gpu_operations.systems,
    "layer": layer,
    "accumulation": accumulation,
}


def main() -> None:
    """Run parts one after another; what each has found so far is written whenever there is more."""
    parser = argparse.ArgumentParser(description="Parts of the GPU suite.")
    parser.add_argument("parts", nargs="+", choices=[*FUNCTIONS, *gpu_end_to_end.PARTS])
    parser.add_argument("--result", type=Path, required=True, help="folder for PART.json")
    parser.add_argument("--checkpoint", type=Path, help="the 7B-shaped checkpoint, for the runs from disk")
    parser.add_argument("--out", type=Path, help="folder that a run from disk writes, new")
    parser.add_argument("--scratch", type=Path, help="folder for what waits in a run from disk")
    parser.add_argument("--rehearse", action="store_true", help="small, on a CPU: figures mean nothing")
    args = parser.parse_args()
    bench = Bench(args.rehearse)
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("GPU suite: expected a CUDA device, found none.")
    for part in args.parts:
        if part in FUNCTIONS:
            found = FUNCTIONS[part](bench)
        else:
            found = gpu_end_to_end.run(part, bench, args.checkpoint, args.out / part, args.scratch)
        harness.say(part)
        for figures in found:
            harness.write_whole(args.result / f"{part}.json", figures)
        harness.print_table(part, ["", ""], [(row["name"], row["text"]) for row in figures["summary"]])


if __name__ == "__main__":
    main()
