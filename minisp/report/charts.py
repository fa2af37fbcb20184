"""Small charts as SVG, drawn by hand: colours and fonts are the page's, by class, so that they follow its scheme.

Every chart is drawn at a width in pixels; a page holds one for wide screens and one for phones, for text that scales
with its picture is unreadable on one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 24, 36
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        label: what the values are.
        low, high: ends, low < high; both above 0 where `log`.
        log: places follow the logarithm.
        whole: labels stand at whole numbers alone.
    """

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        low, high = (log10(x) if self.log else float(x) for x in (self.low, self.high))
        # What has no logarithm lies at the end.
        place = (log10(value) if value > 0 else low) if self.log else value
        return min(1.0, max(0.0, (place - low) / (high - low)))

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most about so many values, with their labels."""
        if self.log:
            first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
            every = max(1, ceil((last - first + 1) / most))
            return [(10.0**power, f"10{str(power).translate(SUPERSCRIPTS)}") for power in range(first, last + 1, every)]
        step = _round_step(max((self.high - self.low) / most, 1.0 if self.whole else 0.0))
        count = range(ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9) + 1)
        return [(number * step, f"{number * step:,.10g}") for number in count]


def axis_for(label: str, values: Sequence[float], *, log: bool = False, zero: bool = False) -> Axis:
    """An axis with room for all finite values; `zero`: from 0 on. With `log`, values above 0 alone count."""
    shown = [x for x in values if isfinite(x) and (x > 0 or not log)] or [1.0]
    low, high = min(shown), max(shown)
    if log:
        # Whole decades, so that at least two have a label.
        low, high = 10.0 ** floor(log10(low)), 10.0 ** ceil(log10(high))
        return Axis(label, low, high if high > low else 10 * low, log=True)
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(label, 0.0 if zero else low - margin, high + margin)


@dataclass(frozen=True)
class Mark:
    """One thing that is drawn.

    Attributes:
        kind: `bar` from the x axis up; `line` through points; `dots`; `band` between two curves.
        style: class names.
        points: (x, y), or (x, y, y of the lower curve) for a band, in the units of the axes.
        titles: of bars and dots, what a pointer that rests on them is told; one for each point, or none.
    """

    kind: str
    style: str
    points: Sequence[tuple[float, ...]]
    titles: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A chart: axes and marks, the first at the bottom.

    Attributes:
        title: what it shows, for readers who do not see it.
    """

    title: str
    x: Axis
    y: Axis
    marks: Sequence[Mark]

    def svg(self, width: int, height: int = 240) -> Markup:
        """The chart in a box of so many pixels."""
        frame = _Frame(self.x, self.y, width, height)
        parts = [*frame.grid(), *(frame.draw(mark) for mark in self.marks)]
        head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
        return head.format(width, height, self.title) + Markup("").join(parts) + Markup("</svg>")


@dataclass(frozen=True)
class _Frame:
    x: Axis
    y: Axis
    width: int
    height: int

    def across(self, value: float) -> float:
        return LEFT + self.x.share(value) * (self.width - LEFT - RIGHT)

    def up(self, value: float) -> float:
        return self.height - BOTTOM - self.y.share(value) * (self.height - TOP - BOTTOM)

    def grid(self) -> list[Markup]:
        """Lines and labels of both axes."""
        floor_line, right = self.height - BOTTOM, self.width - RIGHT
        parts = [_text(4, 12, self.y.label, "name")]
        for value, label in self.y.ticks(5):
            y = self.up(value)
            parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>').format(LEFT, y, right))
            parts.append(_text(LEFT - 7, y + 4, label, "end"))
        parts.append(Markup('<path class="axis" d="M{:.1f} {:.1f}H{:.1f}"/>').format(LEFT, floor_line, right))
        for value, label in self.x.ticks(8 if self.width > 450 else 6):
            parts.append(_text(self.across(value), floor_line + 15, label, "middle"))
        return [*parts, _text((LEFT + right) / 2, self.height - 5, self.x.label, "middle name")]

    def draw(self, mark: Mark) -> Markup:
        if mark.kind == "bar":
            return Markup("").join(self._bar(mark, place) for place in range(len(mark.points)))
        if mark.kind == "dots":
            return Markup("").join(self._dot(mark, place) for place in range(len(mark.points)))
        there = [(self.across(p[0]), self.up(p[1])) for p in mark.points if isfinite(p[1])]
        if mark.kind == "band":
            there += [(self.across(p[0]), self.up(p[2])) for p in reversed(mark.points) if isfinite(p[2])]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in there)
        end = "Z" if mark.kind == "band" else ""
        return Markup('<path class="{} {}" d="M{}{}"/>').format(mark.kind, mark.style, line, end) if there else Markup()

    def _bar(self, mark: Mark, place: int) -> Markup:
        x, y, *_ = mark.points[place]
        # Three quarters of the room between two whole numbers.
        width = 0.75 * (self.width - LEFT - RIGHT) / (self.x.high - self.x.low)
        shape = Markup('<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')
        top, bottom = self.up(y), self.height - BOTTOM
        return shape.format(mark.style, self.across(x) - width / 2, top, width, bottom - top, _title(mark, place))

    def _dot(self, mark: Mark, place: int) -> Markup:
        x, y, *_ = mark.points[place]
        if not isfinite(y):
            return Markup()
        shape = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3">{}</circle>')
        return shape.format(mark.style, self.across(x), self.up(y), _title(mark, place))


def _title(mark: Mark, place: int) -> Markup:
    return Markup("<title>{}</title>").format(mark.titles[place]) if mark.titles else Markup()


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, escape(text))


def _round_step(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is no smaller."""
    power: float = 10.0 ** floor(log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))
