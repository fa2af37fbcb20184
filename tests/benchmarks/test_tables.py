"""The page of results: made from the result files alone, and up to date with those that are committed."""

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(script: Any) -> Any:
    return script("tables")


def test_the_committed_page_says_what_the_result_files_hold(tables: Any) -> None:
    assert tables.TARGET.read_text("utf-8") == tables.render(BENCHMARKS / "results"), "run: python benchmarks/tables.py"


def test_every_result_file_is_on_the_page(tables: Any) -> None:
    page = tables.render(BENCHMARKS / "results")
    for source in (BENCHMARKS / "results").glob("*.json"):
        assert f"## {source.stem}\n" in page or source.name.startswith("gpu_")


def test_a_row_that_was_not_measured_is_an_empty_cell(tables: Any) -> None:
    def cell(place: int, keep: float, value: float) -> dict[str, Any]:
        return {"place": place, "keep": keep, "seconds": None, "peak_bytes": 3 << 20, "perplexity": {"text": value}}

    rows = {"50% FLAP": cell(2, 0.5, 30.0), "90% FLAP": cell(2, 0.9, 11.0), "90% ours": cell(9, 0.9, 10.5)}
    page = "".join(tables.quality({"tokens": 1000, "seconds": None, "dense": {"text": 10.0}, "rows": rows}))
    assert "| FLAP | 1.100 | 3.000 |" in page
    assert "| ours | 1.050 |  |" in page
    assert "| ours | – · 3 |  |" in page
    assert "1,000 tokens; statistics not timed" in page


def test_results_that_differ_are_called_so(tables: Any) -> None:
    run = {"limit": "0", "limit_bytes": 0, "planned_bytes": 2e9, "peak_bytes": 1e9, "segments": 1, "wall_seconds": 8.0}
    data = {"windows": 4, "window": 128, "limits": [{**run, "weights": "a"}, {**run, "weights": "b"}]}
    assert "not the same" in "".join(tables.memory.table(data))
    data["limits"][1]["weights"] = "a"
    assert "the same bytes" in "".join(tables.memory.table(data))
