"""The figures of a result's page: what each one shows, its legend, and how to read it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minisp.models.structures import UNITS
from minisp.report.charts import Axis, Chart, Mark, axis_for
from minisp.report.report import MapReport, StructureReport
from minisp.report.result import WrittenResult

WIDE, NARROW = 540, 340
# Of lines and dots; the page has as many.
COLOURS = 8
MISSING = float("nan")


@dataclass(frozen=True)
class Panel:
    """A figure.

    Attributes:
        legend: (class names of a swatch, what it stands for).
        caption: how to read it.
    """

    title: str
    chart: Chart
    legend: Sequence[tuple[str, str]]
    caption: str


def panels(result: WrittenResult) -> list[Panel]:
    """The figures of a result, in the order of the page."""
    layers = result.layers
    names = list(dict.fromkeys(layer.structure for layer in layers))
    found = [_widths(name, _of(layers, name)) for name in names]
    by_costs = result.config.get("method") == "surgeon"
    found += [_saliency(name, _of(layers, name), by_costs=by_costs) for name in names]
    refitted = [name for name in names if any(x.kept < x.width for x in _of(layers, name))]
    if refitted:
        found += _fits(layers, refitted)
    if result.maps:
        found.append(_zeros(result.maps))
    return found


def _fits(layers: Sequence[StructureReport], names: Sequence[str]) -> Iterator[Panel]:
    """How the refits went."""
    yield _residuals(layers, names)
    corrected = [name for name in names if any(x.drift_explained for x in _of(layers, name))]
    if corrected:
        yield _drift(layers, corrected)
    if any(layer.damping_curve for layer in layers):
        yield _damping(layers, names)
        yield _curves(layers)


def units(name: str) -> str:
    """What a person calls the units of a kind of structure."""
    return UNITS.get(name, name)


def _colour(name: str) -> int:
    """The same for a kind of structure in every figure."""
    return list(UNITS).index(name) if name in UNITS else len(UNITS)


def _of(layers: Sequence[StructureReport], name: str) -> list[StructureReport]:
    return [layer for layer in layers if layer.structure == name]


def _layer_axis(layers: Sequence[StructureReport] | Sequence[MapReport]) -> Axis:
    last = max(layer.layer for layer in layers)
    return Axis("layer", -0.6, last + 0.6, whole=True)


def _widths(name: str, layers: Sequence[StructureReport]) -> Panel:
    kept, width = sum(x.kept for x in layers), sum(x.width for x in layers)
    words = [f"layer {x.layer}: {x.kept:,} of {x.width:,} kept ({x.kept / x.width:.0%})" for x in layers]
    marks = [
        Mark("bar", "gone", [(x.layer, x.width) for x in layers], words),
        Mark("bar", "fill0", [(x.layer, x.kept) for x in layers], words),
    ]
    most = max(x.width for x in layers)
    chart = Chart(f"{units(name)} by layer", _layer_axis(layers), Axis(units(name), 0, 1.05 * most, whole=True), marks)
    return Panel(
        f"{units(name)[0].upper()}{units(name)[1:]} by layer",
        chart,
        [("fill0", f"kept: {kept:,} of {width:,}"), ("gone", "cut")],
        "Every layer keeps the units that are worth most. Where layers differ, one budget was shared out among them.",
    )


def _saliency(name: str, layers: Sequence[StructureReport], *, by_costs: bool) -> Panel:
    bands = {(1, 5): "fill0 light", (2, 4): "fill0 middle"}
    values = [value for x in layers for value in x.saliency.quantiles[1:6]]
    cut = [x.saliency.highest_cut or MISSING for x in layers]
    marks = [
        Mark("band", style, [(x.layer, x.saliency.quantiles[high], x.saliency.quantiles[low]) for x in layers])
        for (low, high), style in bands.items()
    ]
    marks.append(Mark("line", "line0", [(x.layer, x.saliency.quantiles[3]) for x in layers]))
    words = [f"layer {x.layer}: {x.saliency.lost:.2%} of the saliency cut" for x in layers]
    marks.append(Mark("dots", "fill1", [(x.layer, value) for x, value in zip(layers, cut, strict=True)], words))
    return Panel(
        f"Saliency of {units(name)}",
        Chart(
            f"Saliency of {units(name)} by layer",
            _layer_axis(layers),
            axis_for("saliency per token", [*values, *cut], log=True),
            marks,
        ),
        [
            ("line0", "median"),
            ("fill0 middle", "half of the units"),
            ("fill0 light", "90 % of them"),
            ("fill1 round", "largest that was cut"),
        ],
        "What the loss would feel if a unit went, on a logarithmic scale. "
        + (
            "The Surgeon chose by costs of its own, so units on both sides of the dots went."
            if by_costs
            else "Units below the dots went. A layer whose dot lies high in its band lost much of what it had."
        ),
    )


def _residuals(layers: Sequence[StructureReport], names: Sequence[str]) -> Panel:
    marks, legend, values = [], [], []
    for name in names:
        mine = _of(layers, name)
        for key, words, dash in (("residual_sliced", "sliced", "dashed"), ("residual", "refitted", "")):
            # A layer that lost nothing has no residual: a gap.
            points = [(x.layer, getattr(x, key) if x.kept < x.width else MISSING) for x in mine]
            values += [value for _, value in points]
            told = [f"layer {x}: {value:.3f} {words}" for x, value in points]
            marks += [
                Mark("line", f"line{_colour(name)} {dash}", points),
                Mark("dots", f"fill{_colour(name)}", points, told),
            ]
            legend.append((f"line{_colour(name)} {dash}", words if len(names) == 1 else f"{units(name)}, {words}"))
    return Panel(
        "Residual of each layer",
        Chart("Residual by layer", _layer_axis(layers), axis_for("relative residual", values, zero=True), marks),
        legend,
        "How far a layer's output on the calibration text is from what it was, relative to its size. The gap between "
        "the curves is what the refit won back.",
    )


def _drift(layers: Sequence[StructureReport], names: Sequence[str]) -> Panel:
    marks = []
    for name in names:
        mine = _of(layers, name)
        points = [(x.layer, x.drift_explained) for x in mine]
        told = [f"layer {x.layer}: {x.drift_explained:.2%}" for x in mine]
        marks += [Mark("line", f"line{_colour(name)}", points), Mark("dots", f"fill{_colour(name)}", points, told)]
    values = [x.drift_explained for x in layers if x.structure in names]
    return Panel(
        "Drift that each layer took over",
        Chart(
            "Share of the drift explained, by layer",
            _layer_axis(layers),
            axis_for("share of the drift", values, zero=True),
            marks,
        ),
        [(f"line{_colour(name)}", units(name)) for name in names],
        "Behind each layer the pruned model's states differ from the dense one's. This is the share of that difference "
        "that the layer's correction took away.",
    )


def _damping(layers: Sequence[StructureReport], names: Sequence[str]) -> Panel:
    marks, values = [], []
    for name in names:
        mine = [x for x in _of(layers, name) if x.kept < x.width]
        points = [(x.layer, x.damping) for x in mine]
        values += [x.damping for x in mine]
        marks.append(Mark("dots", f"fill{_colour(name)}", points, [f"layer {x.layer}: λ {x.damping:g}" for x in mine]))
    return Panel(
        "Damping of each refit",
        Chart("Damping by layer", _layer_axis(layers), axis_for("damping λ", values, log=True), marks),
        [(f"fill{_colour(name)} round", units(name)) for name in names],
        "The ridge λ, relative to the mean diagonal of the Gram matrix, as it was chosen for each layer.",
    )


def _curves(layers: Sequence[StructureReport]) -> Panel:
    last = max(1, *(x.layer for x in layers))
    marks, values, dampings = [], [], []
    for x in layers:
        if x.damping_curve:
            least = min(error for _, error in x.damping_curve) or 1.0
            points = [(damping, error / least) for damping, error in x.damping_curve]
            dampings += [damping for damping, _ in points]
            values += [error for _, error in points]
            marks.append(Mark("line", f"shade{4 * x.layer // (last + 1)} thin", points))
    return Panel(
        "What was tried to choose the damping",
        Chart(
            "Cross-validated error by damping",
            axis_for("damping λ", dampings, log=True),
            axis_for("error over its minimum", values),
            marks,
        ),
        [("shade0", "first quarter of the layers"), ("shade1", "second"), ("shade2", "third"), ("shade3", "last")],
        "The error that generalised cross-validation expects, one curve for each layer. Each took its lowest point.",
    )


def _zeros(maps: Sequence[MapReport]) -> Panel:
    paths = list(dict.fromkeys(x.path for x in maps))
    marks = []
    for place, path in enumerate(paths):
        mine = [x for x in maps if x.path == path]
        points = [(x.layer, x.share) for x in mine]
        told = [f"layer {x.layer}, {path}: {x.zeros:,} of {x.weights:,} weights are 0" for x in mine]
        marks += [
            Mark("line", f"line{place % COLOURS} thin", points),
            Mark("dots", f"fill{place % COLOURS}", points, told),
        ]
    values = [x.share for x in maps]
    return Panel(
        "Zeros in the linear maps",
        Chart(
            "Share of zeros by layer",
            _layer_axis(maps),
            axis_for("share of weights that are 0", values, zero=True),
            marks,
        ),
        [(f"line{place % COLOURS}", path) for place, path in enumerate(paths)],
        f"The pattern is {maps[0].pattern}. The model keeps its shape: what is 0 is stored as 0.",
    )
