"""Figures from the result files: minify_cpu_*, quality_*, ridge_* and gpu_*.json become a PNG beside each.

    python benchmarks/plot.py [FOLDER]      # by default benchmarks/results

What crash.py and memory.py found is not drawn, and of gpu_suite.py only the Gram update, the saliency pass and the
whole runs of one sweep are.
What a file does not hold is not drawn, and what failed or was not measured has no bar. Bars are medians of runs, or of
timings; thin lines reach from the fastest to the slowest run (on a GPU from the 20th to the 80th percentile).
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import machine_line

OURS, OURS_LIGHT, THEIRS, THEIRS_LIGHT = "#1f5fa8", "#7fb0e0", "#8a8a8a", "#c4c4c4"
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
Data = dict[str, Any]
# Contenders of gpu_parts.py in the order and the colours of all figures.
GPU_COLORS = {
    "minisp": OURS,
    "addmm to float32": THEIRS,
    "bf16 matmul": THEIRS_LIGHT,
    "float32 of tools": "#e0b070",
    "torch.compile": THEIRS,
    "op by op": THEIRS_LIGHT,
    "autograd with a hook": "#e0b070",
}


def bars(axes: Axes, names: Sequence[str], values: Sequence[Sequence[float]], colors: Sequence[str], unit: str) -> None:
    """Horizontal bars of the medians of `values`, with their range and the number at the end, first name on top."""
    middle = [statistics.median(v) for v in values]
    reach = [[m - min(v) for m, v in zip(middle, values, strict=True)]]
    reach.append([max(v) - m for m, v in zip(middle, values, strict=True)])
    places = range(len(names))
    # What was not measured has a place and no number.
    axes.barh(places, middle, xerr=reach, color=colors, height=0.62, error_kw={"elinewidth": 1, "ecolor": "0.25"})
    for place, value, top in zip(places, middle, map(max, values), strict=True):
        if value:
            axes.annotate(f"{value:.3g}", (max(value, top), place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.16 * max(map(max, values)))
    axes.tick_params(axis="y", length=0)


def plot_minify(data: Data) -> Figure:
    """minify_cpu.py: quality, time and memory of each contender."""
    contenders = data["contenders"]
    names = [c["name"].replace("ours", "minisp") for c in contenders]
    colors = [OURS if name.startswith("minisp") else THEIRS for name in names]
    titles = {"perplexity": "Text", "foreign_perplexity": "Documentation"}
    measured = [key for key in titles if f"dense_{key}" in data]
    size = (3.2 * (len(measured) + 2), 2.7)
    figure, (*qualities, time, memory) = plt.subplots(
        1, len(measured) + 2, figsize=size, layout="constrained", sharey=True
    )
    for axes, key in zip(qualities, measured, strict=True):
        ratios = [[c[key] / data[f"dense_{key}"]] for c in contenders]
        bars(axes, names, ratios, colors, "perplexity / dense model's")
        axes.axvline(1, color="0.25", linewidth=1, linestyle=":")
        axes.set_title(titles[key])
    bars(time, names, [c["minify_seconds"] for c in contenders], colors, "seconds")
    bars(memory, names, [[p / 1e9 for p in c["peak_rss_bytes"]] for c in contenders], colors, "GB, peak of the process")
    # Shared axes are inverted once for each panel.
    time.set_ylim(len(names) - 0.5, -0.5)
    settings = data["settings"]
    for axes, title in ((time, "Time"), (memory, "Memory")):
        axes.set_title(title)
    figure.supxlabel(
        f"Less is better. {settings['keep']:.0%} of the units kept, {settings['windows']} windows of "
        f"{settings['window']} tokens; {machine_line(data)}",
        fontsize=8.5,
        color="0.35",
    )
    return figure


def plot_ridge(data: Data) -> Figure:
    """ridge.py: speed of the solver relative to torch's Cholesky, and memory beside the matrix, per size."""
    found = {(s["n"], s["dtype"], s["name"]): s for s in data["solves"]}
    sizes = sorted({(n, dtype) for n, dtype, _ in found}, key=lambda size: (size[1], size[0]))
    labels = [f"{n}\n{dtype}" for n, dtype in sizes]
    styles = {
        "torch cholesky": THEIRS,
        "torch solve": THEIRS_LIGHT,
        "ours": OURS,
        "ours with checks": OURS_LIGHT,
    }
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    for number, (name, color) in enumerate(styles.items()):
        rows = [(place, found[n, dtype, name]) for place, (n, dtype) in enumerate(sizes) if (n, dtype, name) in found]
        offsets = [place + (number - 1.5) * 0.2 for place, _ in rows]
        base = [statistics.median(found[s["n"], s["dtype"], "torch cholesky"]["seconds"]) for _, s in rows]
        label = name.replace("ours", "minisp")
        ratios = [b / statistics.median(s["seconds"]) for b, (_, s) in zip(base, rows, strict=True)]
        speed.bar(offsets, ratios, 0.18, color=color, label=label)
        memory.bar(offsets, [s["extra_bytes"] / s["gram_bytes"] for _, s in rows], 0.18, color=color, label=label)
    speed.axhline(1, color="0.25", linewidth=1, linestyle=":")
    speed.set_title("Speed, torch's Cholesky = 1 (more is better)")
    memory.set_title("Memory beside the matrix, in matrices (less is better)")
    for axes in (speed, memory):
        axes.set_xticks(range(len(sizes)), labels)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("size of the system")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel(machine_line(data), fontsize=8.5, color="0.35")
    return figure


def plot_quality(data: Data) -> Figure:
    """Perplexity over the dense model's against the share of units kept, a panel for each domain."""
    domains = list(data["dense"])
    lines: dict[str, list[Data]] = {}
    for key, cell in data["rows"].items():
        lines.setdefault(key.split(" ", 1)[1], []).append(cell)
    figure, panels = plt.subplots(1, len(domains), figsize=(3.7 * len(domains), 4.4))
    # A method has its place in the table, and with it colour and marker, whatever else a file holds.
    colors = [
        "0.6",
        "#b07d2b",
        "#d1495b",
        "#7a5195",
        "#2e8b57",
        "black",
        *plt.colormaps["Blues"]([0.35, 0.55, 0.75, 1.0]),
    ]
    for name, cells in sorted(lines.items(), key=lambda line: line[1][0]["place"]):
        place = cells[0]["place"]
        color, marker = colors[place], "sv^Dx*oooo"[place]
        ordered = sorted(cells, key=lambda cell: cell["keep"])
        for axes, domain in zip(panels, domains, strict=True):
            kept, ratios = [100 * c["keep"] for c in ordered], [_ratio(data, c, domain) for c in ordered]
            axes.plot(kept, ratios, "-" if marker == "o" else "--", color=color, marker=marker, ms=4, label=name)
    for axes, domain in zip(panels, domains, strict=True):
        ours = [_ratio(data, cell, domain) for name, cells in lines.items() if "minisp" in name for cell in cells]
        top = max(1.5, min(max(ours), 12))
        axes.set(title=domain, xlabel="MLP units kept, %", yscale="log", ylim=(1, 1.1 * top))
        ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 5, 8, 12) if tick <= 1.1 * top]
        axes.set_yticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("perplexity / dense (less is better)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), ncols=4, loc="lower center", fontsize=8.5, bbox_to_anchor=(0.5, 0.03)
    )
    about = f"minisp: + correction is the default. What is above the axes is cut off. {machine_line(data)}"
    figure.text(0.01, 0.01, about, fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    return figure


def _ratio(data: Data, cell: Data, domain: str) -> float:
    return float(cell["perplexity"][domain] / data["dense"][domain])


def plot_gpu(data: Data) -> Figure | None:
    """gpu_suite.py: the Gram update, the saliency pass and the whole run; panels of parts that have figures."""
    figures = {name: part["figures"] for name, part in data["parts"].items() if "figures" in part}
    ceilings = figures.get("ceilings", {})
    panels: list[Callable[[Axes], None]] = []
    if "gram" in figures:
        panels.append(lambda axes: _gram_panel(axes, figures["gram"]["rows"], ceilings.get("bf16_flops")))
    if "saliency" in figures:
        panels.append(lambda axes: _saliency_panel(axes, figures["saliency"]["rows"], ceilings.get("copy_bytes_per_s")))
    order = ("end_to_end", "from_disk", "capped_24", "capped_12", "capped_8", "naive", "naive_tf32")
    runs = {name: figures[name] for name in order if name in figures}
    if any(run["seconds"] for run in runs.values()):
        panels.append(lambda axes: _runs_panel(axes, runs))
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), layout="constrained", squeeze=False)
    for panel, place in zip(panels, axes[0], strict=True):
        panel(place)
    figure.supxlabel(machine_line(data), fontsize=8.5, color="0.35")
    return figure


def _gram_panel(axes: Axes, rows: Sequence[Data], ceiling: float | None) -> None:
    """Useful TFLOP/s, Tm² operations over the time, per width at the number of tokens nearest 8192."""
    tokens = min({row["T"] for row in rows}, key=lambda t: abs(t - 8192))
    rows = [row for row in rows if row["T"] == tokens]
    _grouped(axes, rows, lambda row, time: row["T"] * row["m"] ** 2 / time / 1e12)
    if ceiling:
        # Half of a GEMM's operations are useful here.
        axes.axhline(ceiling / 2e12, color="0.25", linewidth=1, linestyle=":", label="a full GEMM at its ceiling")
    axes.set(ylabel="useful TFLOP/s", xlabel=f"width m, {tokens} tokens", title="Gram update (more is better)")
    axes.legend(fontsize=7.5, ncols=2, loc="upper left")


def _saliency_panel(axes: Axes, rows: Sequence[Data], ceiling: float | None) -> None:
    """Terabytes per second of the 12 bytes per element that are needed."""
    _grouped(axes, rows, lambda row, time: 12 * row["T"] * row["m"] / time / 1e12)
    if ceiling:
        axes.axhline(ceiling / 1e12, color="0.25", linewidth=1, linestyle=":", label="copy, measured")
    axes.set(ylabel="needed TB/s", xlabel="width m", title="Saliency pass (more is better)")
    axes.legend(fontsize=7.5, ncols=2, loc="upper left")


def _grouped(axes: Axes, rows: Sequence[Data], value: Callable[[Data, float], float]) -> None:
    """A group of bars per row, one for each contender that was timed: (p20, p50, p80) seconds each."""
    names = [name for name in GPU_COLORS if any(row.get(name) for row in rows)]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        timed = [(place, row) for place, row in enumerate(rows) if row.get(name)]
        heights = [value(row, row[name][1]) for _, row in timed]
        low = [h - value(row, row[name][2]) for h, (_, row) in zip(heights, timed, strict=True)]
        high = [value(row, row[name][0]) - h for h, (_, row) in zip(heights, timed, strict=True)]
        offsets = [place + (number - (len(names) - 1) / 2) * width for place, _ in timed]
        axes.bar(
            offsets,
            heights,
            0.92 * width,
            yerr=[low, high],
            color=GPU_COLORS[name],
            label=name,
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(rows)), [str(row["m"]) for row in rows])
    axes.tick_params(axis="x", length=0)
    # Room for the legend.
    axes.set_ylim(0, 1.5 * axes.get_ylim()[1])


def _runs_panel(axes: Axes, runs: dict[str, Data]) -> None:
    """Seconds end to end; a run that found no room is named, without a bar."""
    words = {"end_to_end": "minisp", "from_disk": "minisp, defaults, from disk"}
    words |= {"naive": "naive", "naive_tf32": "naive, TF32"}
    names, values = [], []
    for name, run in runs.items():
        words[name] = words.get(name) or f"minisp, {run.get('gigabytes', name.removeprefix('capped_'))} GB"
        names.append(words[name] if run["seconds"] else f"{words[name]}: out of memory")
        values.append([run["seconds"] or 0.0])
    bars(axes, names, values, [THEIRS if name.startswith("naive") else OURS for name in runs], "seconds")
    axes.set_title("7B, 128 windows of 2048 (less is better)")


KINDS: dict[str, Callable[[Data], Figure | None]] = {
    "minify_cpu": plot_minify, "quality": plot_quality, "ridge": plot_ridge, "gpu": plot_gpu
}  # fmt: skip


def plot_folder(folder: Path) -> list[Path]:
    """Draw every result file of a known kind in `folder`; the PNG files written."""
    written = []
    for source in sorted(folder.glob("*.json")):
        draw = next((function for kind, function in KINDS.items() if source.name.startswith(f"{kind}_")), None)
        if draw is None:
            continue
        with plt.rc_context(STYLE):
            figure = draw(json.loads(source.read_text("utf-8")))
            if figure is not None:
                figure.savefig(source.with_suffix(".png"), dpi=130, metadata={"Software": None})
                plt.close(figure)
                written.append(source.with_suffix(".png"))
    return written


def main() -> None:
    """Draw and name what was drawn."""
    parser = argparse.ArgumentParser(description="Figures from benchmark results.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    for path in plot_folder(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
