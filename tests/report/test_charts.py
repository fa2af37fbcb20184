"""Charts: ticks are round and inside, marks stand where their values are, and labels are text."""

import math
import re
from xml.etree import ElementTree

import pytest

from minisp.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Mark, axis_for

LINE = [(0.0, 0.5), (1.0, 0.25), (2.0, math.nan), (3.0, 1.0)]


def drawn(*marks: Mark, y: Axis | None = None, label: str = "layer") -> ElementTree.Element:
    chart = Chart(f"a <chart> of {label}", Axis(label, 0, 4), y or Axis("value", 0, 1), marks)
    return ElementTree.fromstring(chart.svg(400, 200))


@pytest.mark.parametrize(
    ("axis", "most", "values"),
    [
        (Axis("x", 0, 1), 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Axis("x", -0.6, 2.6, whole=True), 8, [0, 1, 2]),
        (Axis("x", -0.6, 29.6, whole=True), 8, [0, 5, 10, 15, 20, 25]),
        (Axis("x", 0.031, 0.078), 5, [0.04, 0.05, 0.06, 0.07]),
        (Axis("x", 1e-6, 1e-2, log=True), 5, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]),
        (Axis("x", 1e-9, 1e3, log=True), 5, [1e-9, 1e-6, 1e-3, 1.0, 1e3]),
    ],
)
def test_ticks_are_round_and_inside(axis: Axis, most: int, values: list[float]) -> None:
    assert [value for value, _ in axis.ticks(most)] == pytest.approx(values)


def test_labels_of_ticks() -> None:
    assert [label for _, label in Axis("x", 0, 1800).ticks(4)] == ["0", "500", "1,000", "1,500"]
    assert [label for _, label in Axis("x", 1e-2, 1.0, log=True).ticks(5)] == ["10⁻²", "10⁻¹", "10⁰"]


def test_an_axis_has_room_for_all_that_is_finite() -> None:
    axis = axis_for("x", [0.3, math.nan, 0.7, math.inf])
    assert axis.low < 0.3 and 0.7 < axis.high < 1
    assert axis_for("x", [0.3], zero=True).low == 0
    assert (axis_for("x", [3e-4, 0.02, 0.0], log=True).low, axis_for("x", [3e-4, 0.02], log=True).high) == (1e-4, 0.1)
    for values in ([], [math.nan], [0.0], [5.0]):
        for log in (False, True):
            assert axis_for("x", values, log=log).low < axis_for("x", values, log=log).high


def test_bars_stand_on_the_axis_and_end_at_their_values() -> None:
    (bar,) = drawn(Mark("bar", "fill0", [(2, 0.25)], ["two"])).iter("rect")
    place = {name: float(bar.attrib[name]) for name in ("x", "y", "width", "height")}
    floor, height, width = 200 - BOTTOM, 200 - BOTTOM - TOP, 400 - LEFT - RIGHT
    assert place["y"] == pytest.approx(floor - 0.25 * height, abs=0.1)
    assert place["y"] + place["height"] == pytest.approx(floor, abs=0.1)
    assert place["x"] + place["width"] / 2 == pytest.approx(LEFT + width / 2, abs=0.1)
    assert bar.findtext("title") == "two"


def test_dots_and_lines_leave_out_what_is_not_finite() -> None:
    found = drawn(Mark("dots", "fill0", LINE), Mark("line", "line0", LINE))
    assert len(list(found.iter("circle"))) == 3
    (line,) = (path for path in found.iter("path") if "line0" in path.attrib["class"])
    places = [tuple(map(float, point.split())) for point in re.split("[ML]", line.attrib["d"])[1:]]
    heights = [y for _, y in places]
    assert len(places) == 3 and heights[2] < heights[0] < heights[1]
    assert not [p for p in drawn(Mark("line", "line0", [(0, math.nan)])).iter("path") if "line0" in p.attrib["class"]]


def test_a_band_is_closed_between_its_curves() -> None:
    found = drawn(Mark("band", "fill0", [(0, 0.8, 0.2), (4, 0.6, 0.4)]))
    (band,) = (path for path in found.iter("path") if "band" in path.attrib["class"])
    assert band.attrib["d"].count("L") == 3 and band.attrib["d"].endswith("Z")


def test_a_logarithmic_axis_is_one_of_decades() -> None:
    axis = Axis("y", 1e-4, 1.0, log=True)
    assert [axis.share(value) for value in (1e-4, 1e-3, 1e-2, 1.0, 0.0)] == pytest.approx([0, 0.25, 0.5, 1, 0])


def test_labels_are_text() -> None:
    found = drawn(Mark("dots", "fill0", [(1, 0.5)], ["<b>&"]), label='<script>"')
    assert found.attrib["aria-label"] == 'a <chart> of <script>"'
    assert '<script>"' in [text.text for text in found.iter("text")]
    assert [title.text for title in found.iter("title")] == ["<b>&"]
