"""The parts of gpu_suite.py that measure attention and a whole layer: see gpu_parts.py."""

import re
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from gpu_bench import Bench, Contenders, Figures, line, ratio
from gpu_end_to_end import ONE_SWEEP, in_memory, llama_config
from torch import Tensor, nn
from torch.nn import functional

from minisp import ops
from minisp.fast import minify

# What a kernel is, by its name; the first that matches.
KINDS = {
    "minisp": r"minisp::|^(gram|cross|add_partials|mirror|activation|rms_norm|rotate)\w*_kernel",
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm)|splitk",
    "copies": r"memcpy|memset|aten::copy_",
}


def attention(bench: Bench) -> Iterator[Figures]:
    """Causal attention forward and backward as minisp asks for it, against keys and values repeated for every head and
    against torch's mathematics one by one. Floor: 2·B·H·L²·D FLOPs forward, 2.5 times as many backward. Expected, from
    published rates of flash attention: 320 TFLOP/s forward and 250 backward in 16 bits; in float32, which flash
    attention does not take, some 20, and no (L, L) matrix where queries share keys: the peak of memory says so.
    """
    rows, summary = [], []
    batch, length, dim = bench.shapes((4, 2048, 128), (1, 16, 8))
    for heads, groups in bench.shapes(((32, 32), (32, 8), (64, 8)), ((4, 2),)):
        for dtype in (bench.half, torch.float32):
            sides = [bench.randn(batch, h, length, dim, dtype=dtype).requires_grad_() for h in (heads, groups, groups)]
            row: Figures = {"H": heads, "H_kv": groups, "L": length, "dtype": str(dtype).removeprefix("torch.")}
            bench.free()
            _through(ops.causal_attention(*sides, dim**-0.5), sides)
            row["peak_bytes"] = bench.peak_bytes()
            row |= bench.race(_attention_contenders(sides, heads // groups))
            rows.append(row)
            if row["minisp"]:
                rate = 7 * batch * heads * length**2 * dim / row["minisp"][1] / 1e12
                text = f"{rate:.0f} TFLOP/s, {ratio(row, 'repeated')}, peak {row['peak_bytes'] / 1e9:.2f} GB"
                summary.append(line(f"attention, {heads} heads on {groups}, {row['dtype']}", text))
            yield {"rows": rows, "summary": summary}


def _through(out: Tensor, sides: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, sides, torch.ones_like(out))


def _attention_contenders(sides: list[Tensor], group: int) -> Contenders:
    query, key, value = sides
    scale = query.shape[-1] ** -0.5

    def repeated() -> object:
        wide = (side.repeat_interleave(group, 1) for side in (key, value))
        out = functional.scaled_dot_product_attention(query, *wide, is_causal=True, scale=scale)
        return _through(out, sides)

    return {
        "minisp": lambda: _through(ops.causal_attention(query, key, value, scale), sides),
        "minisp, forward": partial(torch.no_grad()(ops.causal_attention), query, key, value, scale),
        "repeated": repeated,
    }


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
