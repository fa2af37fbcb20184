"""A result as one page of HTML: everything that it needs is in it, and nothing is asked for from elsewhere.

Whatever a folder says, its names and descriptions included, is text: the template escapes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from minisp.config import MinifyConfig
from minisp.report.panels import COLOURS, NARROW, WIDE, panels, units
from minisp.report.report import load_line
from minisp.report.result import RunRecord, WrittenResult
from minisp.units import megabytes, millions

TEMPLATE = "page.html.jinja"
NOT_ZERO = "weights that are not 0"


@dataclass(frozen=True)
class Sample:
    """How models go on from a prompt: (name of the model, its text) each."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """Before and after: as shown, and the ratio of the two."""

    label: str
    before: str
    after: str
    ratio: float


def result_page(result: WrittenResult, samples: Sequence[Sample] = ()) -> str:
    """The page of a result, with texts that models wrote where there are some."""
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            result=result,
            samples=samples,
            rows=rows(result),
            tiles=_tiles(result),
            panels=panels(result),
            options=_options(result),
            units=units,
            load_line=load_line(str(result.folder), needs_code=result.needs_code),
            bars=_bars(result.run) if result.run else {},
            sizes=(WIDE, NARROW),
            colours=COLOURS,
        )
    )


def environment() -> Environment:
    """Where the template is found and how it is filled: every value is escaped, and none may be missing."""
    found = Environment(
        loader=PackageLoader("minisp.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"megabytes": megabytes, "seconds": _seconds}
    return found


def rows(result: WrittenResult) -> list[Row]:
    """The table of before and after."""
    found = []
    for name in dict.fromkeys(layer.structure for layer in result.layers):
        mine = [layer for layer in result.layers if layer.structure == name]
        width, kept = sum(layer.width for layer in mine), sum(layer.kept for layer in mine)
        found.append(Row(units(name), f"{width:,}", f"{kept:,}", kept / width))
    if result.maps:
        weights = max(1, sum(x.weights for x in result.maps))
        rest = weights - sum(x.zeros for x in result.maps)
        found.append(Row(NOT_ZERO, f"{weights:,}", f"{rest:,}", rest / weights))
    for label, (before, after), shown in (
        ("parameters", result.parameters, millions),
        ("weights on disk", result.bytes, megabytes),
    ):
        found.append(Row(label, shown(before), shown(after), after / before))
    return found


def _tiles(result: WrittenResult) -> list[tuple[str, str]]:
    """(figure, what it is): what a reader looks for first."""
    left = {row.label: f"of the {row.label} left" for row in rows(result)} | {NOT_ZERO: "of the weights are not 0"}
    tiles = [(f"{row.ratio:.1%}", left[row.label]) for row in rows(result)]
    cut = [layer for layer in result.layers if layer.kept < layer.width]
    if cut:
        sliced, refitted = (
            sum(getattr(layer, name) for layer in cut) / len(cut) for name in ("residual_sliced", "residual")
        )
        tiles.append((f"{refitted:.3f}", f"mean residual after the refit; {sliced:.3f} by slicing alone"))
    if result.run:
        total = sum(phase.seconds for phase in result.run.phases)
        tiles.append((_seconds(total), "from loading to writing"))
    return tiles


def _options(result: WrittenResult) -> list[tuple[str, str, bool]]:
    """Name, value, and whether it is another one than the default."""
    defaults = MinifyConfig().as_dict()
    shown = []
    for name, value in result.config.items():
        default = defaults.get(name)
        # JSON has no tuples.
        default = list(default) if isinstance(default, tuple) else default
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown.append((str(name), text, value != default))
    return shown


def _bars(run: RunRecord) -> dict[str, Any]:
    """For each kind of figure of a run, the largest one, which the bars are relative to."""
    times = [x for phase in run.phases for x in (phase.seconds, phase.expected_seconds) if x]
    sizes = [x for phase in run.phases for x in (phase.memory, phase.planned_memory) if x]
    return {"time": max(times, default=1.0), "memory": max(sizes, default=1)}


def _seconds(value: float) -> str:
    """A time for people: 0.4 s, 12.3 s, 4 min 5 s."""
    if value < 90:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
