"""The figures, as far as they go without a GPU: no invented result is ever committed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def gpu_result() -> dict[str, Any]:
    """The shape of what gpu_suite.py writes; the numbers mean nothing."""
    parts: dict[str, Any] = {
        "ceilings": {"status": 0, "figures": {"bf16_flops": 7e14, "summary": [{"name": "copy", "text": "3 TB/s"}]}},
        "end_to_end": {"status": 0, "figures": {"seconds": 20.0}},
        "capped_8": {"status": 0, "figures": {"seconds": 50.0, "gigabytes": 8}},
        "naive": {"status": 0, "figures": {"seconds": None, "error": "out of memory"}},
        "ridge": {"status": "stopped after 60 s"},
    }
    return {"machine": {"gpu": "Imaginary 100", "torch": "0"}, "parts": parts}


@pytest.mark.parametrize("missing", [(), ("ceilings",), ("capped_8", "naive")])
def test_figures_of_a_gpu_result(script: Any, tmp_path: Path, missing: tuple[str, ...]) -> None:
    result = gpu_result()
    for part in missing:
        result["parts"][part] = {"status": 1}
    (tmp_path / "gpu_imaginary-100.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text("{}")
    (path,) = script("plot").plot_folder(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = script("gpu_end_to_end").figure(result).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert ("minisp, 8 GB" in labels, "naive: out of memory" in labels) == (missing != ("capped_8", "naive"),) * 2


def test_what_ran_out_of_memory_has_no_bar(script: Any) -> None:
    (axes,) = script("gpu_end_to_end").figure(gpu_result()).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["minisp", "minisp, 8 GB", "naive: out of memory"]
    assert [patch.get_width() for patch in axes.patches] == [20.0, 50.0, 0.0]
    assert all(text.get_text() != "0" for text in axes.texts)


def test_the_gpu_table_names_what_failed_and_what_was_found(script: Any) -> None:
    lines = script("gpu_suite").table(gpu_result()).splitlines()
    assert "|  | copy | 3 TB/s |" in lines
    assert "| ridge | FAILED (stopped after 60 s) |  |" in lines and "| ceilings | ok |  |" in lines


def test_nothing_measured_gives_no_figure(script: Any, tmp_path: Path) -> None:
    result = gpu_result()
    result["parts"] = {"build": {"status": 1}}
    (tmp_path / "gpu_imaginary-100.json").write_text(json.dumps(result))
    assert script("plot").plot_folder(tmp_path) == []


def test_every_committed_result_can_be_drawn_and_has_its_figure(script: Any, tmp_path: Path) -> None:
    plot = script("plot")
    kinds = tuple(f"{kind}_" for kind in plot.KINDS)
    sources = [path for path in RESULTS.glob("*.json") if path.name.startswith(kinds)]
    assert sources
    for path in sources:
        shutil.copy(path, tmp_path)
    drawn = {path.name for path in plot.plot_folder(tmp_path)}
    assert drawn == {path.name for path in RESULTS.glob("*.png")} == {path.with_suffix(".png").name for path in sources}


def test_the_quality_figure_has_a_panel_for_each_domain_and_a_line_for_each_method(script: Any) -> None:
    def cell(place: int, keep: float, text: float) -> dict[str, Any]:
        return {"place": place, "keep": keep, "perplexity": {"text": text, "code": 2 * text}}

    rows = {"80% FLAP": cell(2, 0.8, 15.0), "80% minisp: + refit": cell(7, 0.8, 12.0)}
    rows["90% minisp: + refit"] = cell(7, 0.9, 11.0)
    data = {"machine": {"cpu": "a", "cores": 2, "torch": "x", "gpu": None}, "dense": {"text": 10.0, "code": 10.0}}
    panels = script("plot").plot_quality({**data, "rows": rows}).axes
    assert [axes.get_title() for axes in panels] == ["text", "code"]
    lines = {line.get_label(): line.get_xydata().round(6).tolist() for line in panels[1].get_lines()}
    assert lines == {"FLAP": [[80, 3.0]], "minisp: + refit": [[80, 2.4], [90, 2.2]]}
