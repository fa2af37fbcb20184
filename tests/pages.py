"""Tables of measurements on the pages of README and docs, and what their cells have to say.

A table that shows measurements has a comment above it that names its result files:

    <!-- FILE: DETAIL -->        or        <!-- FILE, FILE -->        or        <!-- by hand -->

Labels of rows and columns are the keys of the result file, where "minisp" stands for the file's "ours". Every cell is
computed from the file and compared.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Keys of minify_cpu's contenders by the domain that they were measured on.
MEASURED_ON = {"text": "perplexity", "documentation": "foreign_perplexity"}

Data = dict[str, Any]
Cells = dict[tuple[str, str], str]
"""(label of the row, label of the column) → what the cell has to say."""


@dataclass(frozen=True)
class Table:
    """A Markdown table: the comment above it, labels of columns, and rows, each of which begins with its label."""

    marker: str | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(text: str) -> Iterator[Table]:
    """The tables of a page, in order."""
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if re.fullmatch(r"\|(:?-+:?\|)+", line.replace(" ", "")):
            above = next((past for past in reversed(lines[: place - 1]) if past.strip()), "")
            marker = re.fullmatch(r"<!-- (.*) -->", above)
            end = next((i for i in range(place, len(lines)) if not lines[i].startswith("|")), len(lines))
            columns, *rows = (_cells(row) for row in [lines[place - 1], *lines[place + 1 : end]])
            yield Table(marker[1] if marker else None, columns, rows)


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|").strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def expected(table: Table) -> Cells:
    """What the cells of a marked table have to say, by the result files that its marker names."""
    names, _, detail = (table.marker or "").partition(": ")
    files = [json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8")) for name in names.split(", ")]
    makers: dict[str, Callable[..., Cells]] = {
        "quality": _by_method,
        "peers": _by_method,
        "ablation": _ideas,
        "blend": _ideas,
        "minify_cpu": _contenders,
        "memory": _limits,
        "crash": _kills,
        "ridge": _solves,
        "serving_speed": _faster,
        "serving": _served,
        "quantised": _quantised,
        "sparse_quality": _zeros,
    }
    maker = next(maker for kind, maker in makers.items() if names.startswith(f"{kind}_"))
    return maker(table, files, detail)


def differences(table: Table) -> list[str]:
    """The cells of a marked table that say something else than its result files."""
    known = expected(table)
    found = []
    for label, *cells in table.rows:
        for column, cell in zip(table.columns[1:], cells, strict=True):
            wanted = known.get((label, column), "nothing")
            if cell != wanted:
                found.append(f"{label}, {column}: {cell}, but {table.marker} holds {wanted}")
    return found


def _by_method(table: Table, files: Sequence[Data], detail: str) -> Cells:
    """Methods against the share kept, a ratio for each domain of `detail`; or, of one method, that share by domain."""
    (data,) = files
    dense = data["dense"].get("perplexity", data["dense"])
    rows = {tuple(key.split("% ", 1)): row["perplexity"] for key, row in data["rows"].items() if "error" not in row}
    if any(method == detail for _, method in rows):
        named = {column.lower().replace(" ", "_"): column for column in table.columns[1:]}
        return {
            (f"{keep} %", named[domain]): _ratio(found[domain] / dense[domain])
            for (keep, method), found in rows.items()
            for domain in named
            if method == detail
        }
    return {
        (method, f"{keep} %"): " · ".join(_ratio(found[domain] / dense[domain]) for domain in detail.split(" · "))
        for (keep, method), found in rows.items()
    }


def _zeros(table: Table, files: Sequence[Data], detail: str) -> Cells:
    """Patterns of zeros and methods, by domain."""
    dense = {name: value for data in files for name, value in data["dense"].items()}
    rows = {label: row["perplexity"] for data in files for label, row in data["rows"].items()}
    named = {column.lower().replace(" ", "_"): column for column in table.columns[1:]}
    return {
        (label, named[domain]): _ratio(found[domain] / dense[domain])
        for label, found in rows.items()
        for domain in named
    }


def _ideas(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    share, domains = re.match(r"\d+ %", table.columns[0])[0], table.columns[1]  # type: ignore[index]
    return {
        (key.removeprefix(f"{share.replace(' ', '')} "), domains): " · ".join(
            _ratio(row[domain] / data["dense"][domain]) for domain in domains.split(" · ")
        )
        for key, row in data["rows"].items()
    }


def _contenders(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    middle = statistics.median
    if detail == "seconds":
        return {
            (one["name"].replace("ours", "minisp"), phase): f"{middle(run[phase] for run in one['phases']):.0f}"
            for one in data["contenders"]
            for phase in (one["phases"][0] if one.get("phases") else ())
        }
    base = min(
        (one for one in data["contenders"] if one["name"].startswith("naive")),
        key=lambda one: middle(one["minify_seconds"]),
        default=None,
    )
    cells: Cells = {}
    for one in data["contenders"]:
        seconds, peak = one["minify_seconds"], middle(one["peak_rss_bytes"])
        shown = {"minify, seconds": _spread(seconds, 1), "peak of the process": f"{peak / 1e9:.2f} GB"}
        domains = table.columns[1].split(" · ")
        keys = [MEASURED_ON[domain] for domain in domains]
        shown[table.columns[1]] = " · ".join(_ratio(one[key] / data[f"dense_{key}"]) for key in keys)
        if base is not None:
            shown["speed"] = f"×{middle(base['minify_seconds']) / middle(seconds):.2f}"
            shown["memory"] = f"{peak / middle(base['peak_rss_bytes']):.2f}"
        cells |= {(one["name"].replace("ours", "minisp"), column): cell for column, cell in shown.items()}
    return cells


def _limits(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    if detail:
        return {(name, table.columns[1]): _spread(found, 1) for name, found in data[detail]["seconds"].items()}
    cells: Cells = {}
    for run in data["limits"]:
        shown = {
            "planned": f"{run['planned_bytes'] / 1e9:.2f} GB",
            "peak of the process": f"{run['peak_bytes'] / 1e9:.2f} GB",
            "segments": f"{run['segments']}",
            "seconds": f"{run['wall_seconds']:.0f}",
        }
        cells |= {(run["limit"] if run["limit_bytes"] else "none", column): cell for column, cell in shown.items()}
    return cells


def _kills(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    parts = {name: part for name, part in data.items() if isinstance(part, dict) and "kills" in part}
    columns = {"killed": "kills", "of these, resumed from records": "resumed"}
    return {(name, column): str(part[key]) for name, part in parts.items() for column, key in columns.items()}


def _solves(table: Table, files: Sequence[Data], detail: str) -> Cells:
    found = {
        (f"{solve['n']}, {solve['d']}, {solve['dtype']}", solve["name"].replace("ours", "minisp")): solve
        for data in files
        for solve in data["solves"]
    }
    cells: Cells = {}
    for (size, name), solve in found.items():
        base = statistics.median(found[size, "torch cholesky"]["seconds"])
        cells[size, f"speed, {name}"] = f"×{base / statistics.median(solve['seconds']):.2f}"
        cells[size, f"memory, {name}"] = f"{solve['extra_bytes'] / solve['gram_bytes']:.2f}"
    return cells


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _served(table: Table, files: Sequence[Any], detail: str) -> Cells:
    """What llama.cpp gave on each file."""
    rows = files[0]["rows"]
    size, equal, largest = table.columns[1:]
    cells: Cells = {}
    for row in rows:
        label = f"{row['model']}, {row['dtype']}"
        cells[label, size] = f"{row['bytes'] / 1e6:.1f}"
        cells[label, equal] = f"{row['tokens equal']} of {row['tokens']}"
        cells[label, largest] = f"{row['largest difference of a log-probability']:.1g}"
    return cells


def _quantised(table: Table, files: Sequence[Any], detail: str) -> Cells:
    """Types against models, or with a detail ("prefill" or "decode") how fast llama.cpp is with them."""
    (data,) = files
    cells: Cells = {}
    if detail:
        for key, rates in data["speed"]["rates"].items():
            model, kind = key.split(", ")
            cells[kind, model] = _spread(rates[detail], 0)
        return cells
    dense = data["rows"]["dense, bf16"]["perplexity"]
    models, kinds = zip(*(key.split(", ") for key in data["rows"]), strict=True)
    cells = {(kind, model): "–" for kind in kinds for model in models}
    for key, row in data["rows"].items():
        model, kind = key.split(", ")
        cells[kind, model] = f"{_ratio(row['perplexity'] / dense)} · {row['bytes'] / 1e6:.0f}"
    return cells


def _faster(table: Table, files: Sequence[Any], detail: str) -> Cells:
    """How many times faster a pruned model is in each reader, and where the floor is."""
    (data,) = files
    cells = {("floor", part): f"×{ratio:.2f}" for part, ratio in data["floor"].items()}
    for reader, found in data["readers"].items():
        for part, ratios in found["ratios"].items():
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            cells[reader, part] = f"×{middle:.2f} ({low:.2f}–{high:.2f})"
    return cells
