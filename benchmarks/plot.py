"""Figures from the result files: `python benchmarks/plot.py [FOLDER]` draws a PNG beside each that has one to draw.

What a file does not hold is not drawn, and what failed or was not measured has no bar. Bars are medians of runs; thin
lines reach from the fastest to the slowest run. A benchmark draws its results in a function of its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_end_to_end
import minify_cpu
import ridge
from drawing import STYLE, plt
from harness import machine_line
from matplotlib.figure import Figure

Data = dict[str, Any]


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


# The start of a result file's name → who draws it.
KINDS: dict[str, Callable[[Data], Figure | None]] = {
    "minify_cpu": minify_cpu.figure, "ridge": ridge.figure, "gpu": gpu_end_to_end.figure, "quality": plot_quality
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
