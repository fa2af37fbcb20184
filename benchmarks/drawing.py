"""What the figures of all benchmarks share: colours, style, and bars with their range."""

import statistics
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["OURS", "OURS_LIGHT", "STYLE", "THEIRS", "THEIRS_LIGHT", "bars", "plt"]

OURS, OURS_LIGHT, THEIRS, THEIRS_LIGHT = "#1f5fa8", "#7fb0e0", "#8a8a8a", "#c4c4c4"
STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
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
