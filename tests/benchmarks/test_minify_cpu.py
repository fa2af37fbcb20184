"""The CPU benchmark against the paper's recipe: who is the opponent, who is left out, and what the floor counts."""

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


def contender(script: Any, name: str, seconds: list[float], repeats: int = 3) -> Any:
    made = script("contenders").Contender(name, {}, repeats)
    made.minify_seconds = seconds
    return made


def test_the_opponent_is_the_faster_of_the_naive_ones(script: Any) -> None:
    names = ["ours", "naive bfloat16", "naive float32"]
    for seconds, expected in (([1, 9, 5], "naive float32"), ([1, 5, 9], "naive bfloat16")):
        rows = [contender(script, name, [own]) for name, own in zip(names, seconds, strict=True)]
        assert script("contenders").opponent(rows).name == expected
        data = {"contenders": [{"name": row.name, "minify_seconds": row.minify_seconds} for row in rows]}
        assert script("tables").opponent(data)["name"] == expected
    assert script("tables").opponent({"contenders": [{"name": "ours", "minify_seconds": [1.0]}]}) is None


@pytest.mark.parametrize(
    ("seconds", "repeats", "says"),
    [
        ((2.0, 1.0), {"naive bfloat16": 3, "naive float32": 3, "ours": 3}, None),
        ((3.1, 1.0), {"naive bfloat16": 1, "naive float32": 3, "ours": 3}, "one run only: one window takes ×3.1"),
        ((60.0, 1.0), {"naive float32": 3, "ours": 3}, r"not run: one window takes ×60.0 the seconds of naive float32"),
        ((1.0, 3.5), {"naive bfloat16": 3, "naive float32": 1, "ours": 3}, "naive float32: one run only"),
    ],
)
def test_a_naive_one_that_is_no_opponent_runs_once_or_not_and_it_is_said(
    script: Any, seconds: tuple[float, float], repeats: dict[str, int], says: str | None
) -> None:
    rows = [contender(script, name, []) for name in ("naive bfloat16", "naive float32", "ours")]
    probes = dict(zip(("naive bfloat16", "naive float32"), seconds, strict=True))
    left, notes = script("contenders").judged(rows, probes, 32)
    assert {row.name: row.repeats for row in left} == repeats
    assert (says in notes[0]) if says else notes == []


def test_the_floor_of_the_defaults_is_the_recipe_and_trials_and_correction(script: Any) -> None:
    config = SimpleNamespace(
        hidden_size=8, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=40, head_dim=4,
    )  # fmt: skip
    found = script("minify_floor").work(config, 64, 256, 0.5)
    mlp, attention = 3 * 8 * 24, 2 * 8 * 4 * 3
    layers, head, products = 3 * (mlp + attention), 8 * 40, 2 * 3 * 256 * 8
    tokens, trials, heals = 64 * 256, 2048, 32 * 256
    recipe = tokens * (4 * (layers + head) + 3 * products + 3 * 24**2)
    assert found["recipe"].own * 1e9 == pytest.approx(recipe)
    # Four passes of all layers: the dense model's, and of three layers, two and one; a head at every second token.
    trying = trials * ((2 * layers + products) * (1 + 2) + 4 * 2 * head / 2)
    cut = 3 * (mlp / 2 + attention)
    # The cut model once, its Gram matrices, the cross products, and the product that stands for another passage.
    correcting = heals * (2 * cut + products + 3 * (12**2 + 4 * 12 * 8))
    assert found["defaults"].own * 1e9 == pytest.approx(recipe + trying + correcting)
    assert found["naive"].own * 1e9 == pytest.approx(tokens * (6 * (layers + head) + 3 * products))
    assert found["naive"].seconds(1e9, 1e9) > found["recipe"].seconds(1e9, 1e9)


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
    page = "".join(script("tables").minify_cpu(data))
    assert "ratios to naive float32" in page and "naive bfloat16: not run: reason." in page
    assert "| ours, the defaults, float32 | 1.100 | 5.5 (5.5–5.5) | ×2.00 | 1.00 GB | 0.25 | 1 | 1.0% |" in page
