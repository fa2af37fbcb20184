"""All result files as tables: `python benchmarks/tables.py` writes benchmarks/RESULTS.md anew.

Nothing in RESULTS.md is written by hand; what a file does not hold is an empty cell. A benchmark makes the table of its
results in a function of its own.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crash
import gpu_suite
import memory
import minify_cpu
import quantised
import ridge
import serving
import serving_speed
import sparse_quality
from harness import machine_line
from harness import markdown as table

HERE = Path(__file__).parent
TARGET = HERE / "RESULTS.md"
HEAD = """# Results

Written by `python benchmarks/tables.py` from the files in `results/`; what each was measured on stands in its head, and
how, in the script that it is named after. Ratios of perplexity are to the dense model's, less is better.
"""
Data = dict[str, Any]


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


# The start of a result file's name → who makes its tables.
KINDS: dict[str, Callable[[Data], str | Iterator[str]]] = {
    "quality": quality, "peers": peers, "ablation": ablation, "blend": blend, "downstream_offline": downstream_offline,
    "minify_cpu": minify_cpu.table, "memory": memory.table, "crash": crash.table, "ridge": ridge.table,
    "gpu": gpu_suite.table, "serving_speed": serving_speed.table, "serving": serving.table,
    "quantised": quantised.table, "sparse_quality": sparse_quality.table,
}  # fmt: skip


def _ratios(values: Data, dense: Data) -> str:
    found = [values[domain] / value for domain, value in dense.items()]
    return " · ".join(f"{ratio:.3f}" if ratio < 100 else f"{ratio:.0f}" for ratio in found)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


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
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render(HERE / "results"), "utf-8")
    print(TARGET)
