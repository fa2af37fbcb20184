"""All result files as tables: `python benchmarks/tables.py` writes benchmarks/RESULTS.md anew.

Nothing in RESULTS.md is written by hand; what a file does not hold is an empty cell. What was measured on a GPU is not
among it: `gpu_suite.py` prints its own figures.
"""

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGET = HERE / "RESULTS.md"
HEAD = """# Results

Written by `python benchmarks/tables.py` from the files in `results/`; what each was measured on stands in its head, and
how, in the script that it is named after. Ratios of perplexity are to the dense model's, less is better.
"""
Data = dict[str, Any]

# One form of every Triton kernel; kernel_table.csv has all of them.
KERNELS = {
    "gram bf16 aligned": "Gram, bfloat16",
    "gram bf16 by descriptors": "Gram, bfloat16, by descriptors",
    "gram fp32 ieee aligned": "Gram, float32 (IEEE)",
    "cross bf16 aligned": "cross product, bfloat16",
    "saliency bf16 silu gated": "saliency, SiLU, gated, bfloat16",
    "activation bf16 silu gated": "activation, SiLU, gated, bfloat16",
    "cross entropy bf16": "cross entropy, bfloat16",
}
GENERATIONS = ("80", "89", "90", "100", "120")


def machine_line(data: Data) -> str:
    """The machine in one line."""
    machine = data["machine"]
    name = machine["gpu"] or f"{machine['cpu'].replace('(R)', '')}, {machine['cores']} cores"
    return f"{name}, torch {machine['torch']}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def by_keep(found: Data, show: Callable[[Data], str]) -> str:
    """A table of rows named "KEEP% METHOD": methods against the share of the units that they keep."""
    cells = {(key.split("% ", 1)[1], cell["keep"]): cell for key, cell in found.items()}
    names = dict.fromkeys(name for name, _ in sorted(cells, key=lambda key: cells[key]["place"]))
    keeps = sorted({keep for _, keep in cells}, reverse=True)
    columns = ["units kept", *(f"{keep:.0%}" for keep in keeps)]
    rows = ([name, *(show(cells[name, keep]) if (name, keep) in cells else "" for keep in keeps)] for name in names)
    return table(columns, rows)


def quality(data: Data) -> Iterator[str]:
    """quality.py: a table of ratios and one of what they cost, methods against the share kept."""
    dense = data["dense"]
    spent = f"{data['seconds']:.0f} s" if data["seconds"] else "not timed"
    yield f"Calibrated on {data['tokens']:,} tokens; statistics {spent}. Perplexity of the dense model: "
    yield ", ".join(f"{domain} {value:.3f}" for domain, value in dense.items()) + ".\n\n"
    yield " · ".join(dense) + ":\n\n"
    yield by_keep(data["rows"], lambda cell: _ratios(cell["perplexity"], dense))
    yield "\nSeconds beside the statistics · MiB at most beside the dense model:\n\n"
    yield by_keep(data["rows"], lambda cell: f"{_seconds(cell['seconds'])} · {cell['peak_bytes'] >> 20}")


def peers(data: Data) -> Iterator[str]:
    """peers.py: a table of ratios, and one of what they cost and of how the result loads."""
    dense, done = data["dense"]["perplexity"], {key: row for key, row in data["rows"].items() if "error" not in row}
    yield f"Calibrated on {data['tokens']:,} tokens. Perplexity of the dense model: "
    yield ", ".join(f"{domain} {value:.3f}" for domain, value in dense.items()) + ".\n\n"
    yield " · ".join(dense) + ":\n\n"
    yield by_keep(done, lambda row: _ratios(row["perplexity"], dense))
    yield "\nSeconds of pruning · MiB at most of the whole process · million parameters · loads with:\n\n"
    yield by_keep(
        done,
        lambda row: " · ".join(
            (_seconds(row["seconds"]), str(row["peak_bytes"] >> 20), f"{row['parameters'] / 1e6:.1f}", row["loads"])
        ),
    )
    yield from (f"\n{key} failed: {row['error']}\n" for key, row in data["rows"].items() if "error" in row)


def ablation(data: Data) -> Iterator[str]:
    """ablation.py: one row an idea."""
    dense = data["dense"]
    yield table(["kept, idea", " · ".join(dense)], ([key, _ratios(cell, dense)] for key, cell in data["rows"].items()))


def minify_cpu(data: Data) -> Iterator[str]:
    """minify_cpu.py: quality, time and memory of whole processes, ratios to the faster naive contender."""
    measured = {"text": "perplexity", "documentation": "foreign_perplexity"}
    measured = {domain: key for domain, key in measured.items() if f"dense_{key}" in data}
    settings, base = data["settings"], opponent(data)
    yield f"{settings['keep']:.0%} kept, {settings['windows']} windows of {settings['window']} tokens; "
    yield "interleaved runs: median (fastest–slowest). "
    yield f"Speed and memory are ratios to {base['name']}" if base else "No opponent was measured beside them"
    yield ". Disturbance is the share of the machine that others used meanwhile.\n\n"
    columns = [
        "",
        " · ".join(measured),
        "minify, seconds",
        "speed",
        "peak of the process",
        "memory",
        "runs",
        "disturbance",
    ]
    rows = []
    for one in data["contenders"]:
        name = one["name"] + ("" if one["name"].startswith("naive") else f", {one['options']['dtype']}")
        ratios = " · ".join(f"{one[key] / data[f'dense_{key}']:.3f}" for key in measured.values())
        peak, speed, memory = statistics.median(one["peak_rss_bytes"]), "", ""
        if base:
            speed = f"×{statistics.median(base['minify_seconds']) / statistics.median(one['minify_seconds']):.2f}"
            memory = f"{peak / statistics.median(base['peak_rss_bytes']):.2f}"
        last = [len(one["minify_seconds"]), f"{max(one['disturbance']):.1%}"]
        rows.append([name, ratios, _spread(one["minify_seconds"]), speed, f"{peak / 1e9:.2f} GB", memory, *last])
    yield table(columns, rows)
    yield from (f"\n{note}\n" for note in data.get("notes", []))


def opponent(data: Data) -> Data | None:
    """Of a minify_cpu file: the naive contender with the fewest seconds; None where none was measured."""
    naives = [one for one in data["contenders"] if one["name"].startswith("naive")]
    return min(naives, key=lambda one: statistics.median(one["minify_seconds"]), default=None)


def memory(data: Data) -> Iterator[str]:
    """memory.py: planned and measured, and what streaming costs."""
    columns = ["limit", "planned", "peak of the process", "segments", "seconds"]
    yield f"{data['windows']} windows of {data['window']} tokens.\n\n"
    yield table(
        columns,
        (
            [
                run["limit"] if run["limit_bytes"] else "none",
                *(f"{run[key] / 1e9:.2f} GB" for key in ("planned_bytes", "peak_bytes")),
                run["segments"],
                f"{run['wall_seconds']:.0f}",
            ]
            for run in data["limits"]
        ),
    )
    same = len({run["weights"] for run in data["limits"]}) == 1
    yield f"\nThe results are {'the same bytes' if same else 'not the same'}."
    if data.get("streaming"):
        seconds = data["streaming"]["seconds"]
        yield " Sweeps, seconds: " + ", ".join(f"{name} {_spread(values)}" for name, values in seconds.items()) + "."
    yield "\n"


def crash(data: Data) -> Iterator[str]:
    """crash.py: processes killed at random moments."""
    parts = {name: part for name, part in data.items() if isinstance(part, dict) and "kills" in part}
    rows = ([name, part["kills"], part["resumed"]] for name, part in parts.items())
    yield table(["inputs", "killed", "of these, resumed from records"], rows)


def ridge(data: Data) -> Iterator[str]:
    """ridge.py: solvers by size; speed against torch's Cholesky, memory in multiples of the Gram matrix."""
    found = {(s["dtype"], s["n"], s["d"], s["name"]): s for s in data["solves"]}
    columns = ["n, d, solver", "seconds", "speed", "memory", "backward error"]
    rows = []
    for (dtype, n, d, name), solve in sorted(found.items()):
        base = statistics.median(found[dtype, n, d, "torch cholesky"]["seconds"])
        speed = f"×{base / statistics.median(solve['seconds']):.2f}"
        share = f"{solve['extra_bytes'] / solve['gram_bytes']:.2f}"
        who = f"{n}, {d}, {dtype}, {name.replace('ours', 'minisp')}"
        rows.append([who, _spread(solve["seconds"], 3), speed, share, f"{solve['backward_error']:.1e}"])
    yield table(columns, rows)


def kernels(source: Path) -> Iterator[str]:
    """kernel_table.py: registers a thread / KB of shared memory a program."""
    with source.open(encoding="utf-8", newline="") as stream:
        found = {(row["name"], row["capability"]): row for row in csv.DictReader(stream)}
    rows = []
    for name, words in KERNELS.items():
        cells = [found.get((name, capability)) for capability in GENERATIONS]
        rows.append([words, *(f"{c['registers']} / {int(c['shared']) // 1024}" if c else "–" for c in cells)])
    yield f"Registers a thread / KB of shared memory a program; {len(found)} compilations in all.\n\n"
    yield table(["", *(f"sm_{capability}" for capability in GENERATIONS)], rows)


def downstream_offline(data: Data) -> Iterator[str]:
    """downstream_offline.py: right answers by task and model."""
    yield "Right answers in %, with their 95 % interval; of the others the difference to the first model, with its own "
    yield "interval, * where 0 lies outside. Tasks on which the first model is at chance have no share in the mean. "
    yield f"Seed {data['seed']}, items {data['items']}.\n\n"
    yield table(["task", "items", "chance", *data["seconds"]], downstream_rows(data))
    yield f"\nSeconds: {', '.join(f'{name} {seconds:.0f}' for name, seconds in data['seconds'].items())}.\n"


def downstream_rows(data: Data) -> list[list[str]]:
    """One row per task, a column per model: right answers with their interval, or with the difference to the first."""
    rows = []
    for name, task in data["tasks"].items():
        left_out = "" if task["counts"] else ", at chance"
        rows.append([f"{name}{left_out}", str(task["items"]), f"{task['chance']:.0%}", *_answered(task["models"])])
    counted = sum(task["counts"] for task in data["tasks"].values())
    return [*rows, [f"mean of {counted} tasks", "", "", *_answered(data["mean"])]] if counted else rows


def _answered(models: Data) -> Iterator[str]:
    """In per cent: right answers; of the first model their interval, of the others the difference, with its own."""
    for place, model in enumerate(models.values()):
        low, high = (100 * edge for edge in model["difference_interval" if place else "interval"])
        shown = f"{100 * model['accuracy']:.1f}"
        star = "" if low <= 0 <= high else " *"
        change = f"{shown}, {100 * model['difference']:+.1f} ({low:+.1f} to {high:+.1f}){star}"
        yield change if place else f"{shown} ({low:.0f}–{high:.0f})"


def blend(data: Data) -> Iterator[str]:
    """blend.py: what a model is calibrated on beside a text, one row a mixture."""
    dense = data["dense"]
    yield "Windows of 512 tokens from each source; ratios of perplexity on a text like the first source and on domains "
    yield "that no source covers.\n\n"
    rows = ([key, _ratios(cell, dense)] for key, cell in data["rows"].items())
    yield table(["kept, kind of row: windows", " · ".join(dense)], rows)
    yield from (f"\n{note}\n" for note in data.get("notes", []))


KINDS = {
    function.__name__: function
    for function in (quality, peers, ablation, blend, minify_cpu, memory, crash, ridge, downstream_offline)
}


def _ratios(values: Data, dense: Data) -> str:
    found = [values[domain] / value for domain, value in dense.items()]
    return " · ".join(f"{ratio:.3f}" if ratio < 100 else f"{ratio:.0f}" for ratio in found)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def render(folder: Path) -> str:
    """The whole page."""
    parts = [HEAD]
    for source in sorted(folder.glob("*.json")):
        kind = next((kind for kind in KINDS if source.name.startswith(f"{kind}_")), None)
        if kind is None:
            continue
        data = json.loads(source.read_text("utf-8"))
        parts.append(f"## {source.stem}\n\n{machine_line(data)}.\n\n{''.join(KINDS[kind](data))}")
        if source.with_suffix(".png").exists():
            parts.append(f"![{source.stem}](results/{source.stem}.png)\n")
    compiled = folder / "kernel_table.csv"
    if compiled.exists():
        parts.append(f"## kernel_table\n\n{''.join(kernels(compiled))}")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render(HERE / "results"), "utf-8")
    print(TARGET)
