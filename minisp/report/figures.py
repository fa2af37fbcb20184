"""The figure of a run: sizes and residuals by layer."""

from pathlib import Path
from typing import Any

from minisp.models.structures import UNITS
from minisp.report.report import MinifyReport


def plot_layers(report: MinifyReport, path: Path) -> None:
    """Draw sizes and residuals by layer into a PNG; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {(x.layer, UNITS[x.structure]): x.damping_curve for x in report.layers if x.damping_curve}
    names = list(report.plan.units)
    rows = len(names) + (2 if curves else 1)
    figure, axes = plt.subplots(rows, 1, figsize=(8, 2.5 * rows), layout="constrained")
    for axis, name in zip(axes, names, strict=False):
        _draw_sizes(axis, report, name)
    axes[0].set_title(
        f"{report.plan.model}: {report.parameters / report.plan.parameters:.0%} of the parameters left", loc="left"
    )
    middle = axes[len(names)]
    for place, name in enumerate(names):
        mine = [layer for layer in report.layers if layer.structure == name]
        for key, label, style in (("residual_sliced", "sliced", "o:"), ("residual", "refitted", "o-")):
            # A layer that lost nothing has no residual: a gap, which the axis explains.
            values = [getattr(layer, key) if layer.kept < layer.width else float("nan") for layer in mine]
            words = label if len(names) == 1 else f"{UNITS[name]}, {label}"
            middle.plot([layer.layer for layer in mine], values, style, color=f"C{place}", label=words)
    middle.set(xlabel="layer", ylabel="relative residual\n(of layers that were cut)", xlim=axes[0].get_xlim())
    middle.set_ylim(bottom=0)
    middle.legend()
    if curves:
        _draw_curves(axes[-1], curves, matplotlib.colormaps["viridis"])
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _draw_sizes(axis: Any, report: MinifyReport, name: str) -> None:
    mine = [layer for layer in report.layers if layer.structure == name]
    index = [layer.layer for layer in mine]
    axis.bar(index, [layer.width for layer in mine], color="0.88", label="before")
    kept = sum(layer.kept for layer in mine) / sum(layer.width for layer in mine)
    axis.bar(index, [layer.kept for layer in mine], color="tab:blue", label=f"kept: {kept:.0%}")
    axis.set_ylabel(UNITS[name])
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _draw_curves(axis: Any, curves: dict[tuple[int, str], Any], colours: Any) -> None:
    """What was tried to choose each layer's damping."""
    last = max(layer for layer, _ in curves)
    for (layer, units), curve in curves.items():
        dampings, errors = zip(*curve, strict=True)
        shades = [error / min(errors) for error in errors]
        axis.semilogx(dampings, shades, ".-", color=colours(layer / max(1, last)), label=f"layer {layer}, {units}")
    axis.set(xlabel="damping λ", ylabel="cross-validated error\nover its minimum")
    axis.legend(fontsize=6, ncols=3, loc="upper left")
