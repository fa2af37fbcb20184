"""The CPU benchmark against the paper's recipe: who is the opponent, in which order all run, what the page says."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_opponent_is_the_faster_of_the_naive_ones(script: Any) -> None:
    names = ["ours", "naive bfloat16", "naive float32"]
    for seconds, expected in (([1, 9, 5], "naive float32"), ([1, 5, 9], "naive bfloat16")):
        rows = [{"name": name, "minify_seconds": [own]} for name, own in zip(names, seconds, strict=True)]
        assert script("minify_cpu").opponent({"contenders": rows})["name"] == expected
    assert script("minify_cpu").opponent({"contenders": [{"name": "ours", "minify_seconds": [1.0]}]}) is None


@pytest.mark.parametrize(
    ("own", "only", "names"),
    [
        ("float32", None, ["naive float32", "ours, paper's recipe", "ours, the defaults"]),
        ("bfloat16", None, ["naive bfloat16", "naive float32", "ours, paper's recipe", "ours, the defaults"]),
        ("bfloat16", ["float32", "defaults"], ["naive float32", "ours, the defaults"]),
    ],
)
def test_naive_bfloat16_is_an_opponent_where_minisp_takes_bfloat16_too(
    script: Any, own: str, only: list[str] | None, names: list[str]
) -> None:
    rows = script("minify_cpu").make_contenders(SimpleNamespace(batch=4, only=only), own)
    assert [row["name"] for row in rows] == names
    assert {row["options"]["dtype"] for row in rows if row["name"].startswith("ours")} == {own}


def test_rounds_alternate_and_only_the_first_evaluates(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = script("minify_cpu"), []

    def run(contender: Any, args: Any, *, evaluate: bool) -> SimpleNamespace:
        calls.append((contender["name"], evaluate))
        kept = [[0, 1, 2, 3]] if contender["name"].startswith("naive") else [[0, 1, 2, 7]]
        seconds = {"loading": 5.0, "calibration": 2.0, "refit": 1.0}
        found = {"seconds": seconds, "kept": kept, "perplexity": 9.0}
        return SimpleNamespace(output=found, peak_rss=2**30, disturbance=0.5)

    monkeypatch.setattr(module, "run_contender", run)
    rows = module.make_contenders(SimpleNamespace(batch=4, only=["naive", "defaults"]), "float32")
    module.run_all(rows, SimpleNamespace(repeats=2), ["perplexity"])
    one, other = "naive float32", "ours, the defaults"
    assert calls == [(one, True), (other, True), (other, False), (one, False)]
    # Loading is nobody's time.
    assert rows[1]["minify_seconds"] == [3.0, 3.0] and rows[1]["peak_rss_bytes"] == [2**30] * 2
    assert [row["units_kept_as_first"] for row in rows] == [1.0, 0.75]
    assert (rows[0]["perplexity"], rows[0]["widths"]) == (9.0, [4])


def test_the_page_names_the_opponent_the_runs_and_what_was_left_out(script: Any) -> None:
    def row(name: str, seconds: list[float], peak: float) -> dict[str, Any]:
        same = {"disturbance": [0.01], "options": {"dtype": "float32"}, "perplexity": 11.0}
        return {"name": name, "minify_seconds": seconds, "peak_rss_bytes": [peak], **same}

    data = {
        "settings": {"keep": 0.8, "windows": 32, "window": 512},
        "dense_perplexity": 10.0,
        "notes": ["naive bfloat16: not run: reason."],
        "contenders": [row("naive float32", [10.0, 12.0, 11.0], 4e9), row("ours, the defaults", [5.5], 1e9)],
    }
    page = "".join(script("minify_cpu").table(data))
    assert "ratios to naive float32" in page and "naive bfloat16: not run: reason." in page
    assert "| ours, the defaults, float32 | 1.100 | 5.5 (5.5–5.5) | ×2.00 | 1.00 GB | 0.25 | 1 | 1.0% |" in page
