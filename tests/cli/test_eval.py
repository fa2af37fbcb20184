"""`minisp eval`: one model or two, one text or several, and what it says while it works."""

import json
import math
from functools import partial
from pathlib import Path

import pytest

from minisp.evaluate import measure, speed
from minisp.report import progress as progress_module
from minisp.report.progress import progress_bar
from tests.cli.test_app import SMALL, run
from tests.tiny import WIDTH, save_checkpoint, tiny_model

BRIEF = ("--window", "32", "--max-windows", "3", "--no-speed", "--questions", "0", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny-llama", tiny_model("llama"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("narrow") / "narrow", tiny_model("llama", intermediate_size=24))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of two texts of 640 tokens each, which is 20 windows of 32; and a file that is no text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "prose.txt").write_text(
        "".join(f"sentence {i} of no consequence, then another. " for i in range(16))[:640]
    )
    rows = [json.dumps({"text": "3.14159 26535 89793 + 2.71828 = " * 20})]
    (folder / "digits.jsonl").write_text("\n".join(rows))
    (folder / "notes.md").write_text("no text")
    return folder


def test_eval_states_protocol_and_result(model: Path, texts: Path, tmp_path: Path) -> None:
    flags = ("--text", texts / "prose.txt", "--window", "32", "--max-windows", "3", "--no-speed", "--dtype", "float32")
    table = run("eval", model, *flags)
    assert table.exit_code == 0
    assert "perplexity, prose.txt" in table.stdout
    assert "93 tokens scored in 3 windows of 32, stride 32" in table.stdout
    # Unlike domains, and a multiple-choice check, stand beside it.
    for other in ("documentation", "code"):
        assert f"perplexity, {other}" in table.stdout and f"right continuations, {other}" in table.stdout

    found = json.loads(run("eval", model, *flags, "--json").stdout)
    measured = found["perplexity"]["prose.txt"]
    assert (measured["num_windows"], measured["num_tokens"], measured["window"]) == (3, 3 * 31, 32)
    assert f"{measured['value']:.2f}" in table.stdout
    assert found["bytes"] == (model / "model.safetensors").stat().st_size
    assert found["parameters"] == tiny_model("llama").num_parameters()
    assert found["throughput"] is None
    assert {c["num_questions"] for c in found["choices"].values()} == {26, 100}
    bare = json.loads(run("eval", model, *flags, "--no-builtin", "--questions", "0", "--json").stdout)
    assert list(bare["perplexity"]) == ["prose.txt"] and bare["choices"] == {}

    out = tmp_path / "smaller"
    assert (
        run("minify", model, "--keep", "0.7", "--out", out, "-c", texts / "prose.txt", *SMALL, "--quiet").exit_code == 0
    )
    smaller = json.loads(run("eval", out, *flags, "--json").stdout)
    assert smaller["parameters"] < found["parameters"] and smaller["bytes"] < found["bytes"]
    assert smaller["perplexity"]["prose.txt"]["value"] != measured["value"]


def test_eval_of_two_models_is_side_by_side(
    model: Path, narrow: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = partial(speed.throughput, generation=speed.Generation(8, 2), budget=0.0)
    monkeypatch.setattr(measure, "throughput", brief)
    flags = (
        "--text",
        texts / "prose.txt",
        "--window",
        "32",
        "--max-windows",
        "3",
        "--no-builtin",
        "--dtype",
        "float32",
    )
    table = run("eval", model, narrow, *flags)
    assert table.exit_code == 0, table.stderr
    for expected in (
        "Side by side",
        str(model),
        str(narrow),
        "perplexity, prose.txt",
        "decode tokens/s",
        "both in memory",
    ):
        assert expected in table.stdout
    found = json.loads(run("eval", model, narrow, *flags, "--json").stdout)
    assert [found[name]["parameters"] for name in ("first", "second")] == [
        tiny_model("llama", intermediate_size=size).num_parameters() for size in (WIDTH, 24)
    ]
    for kind in ("prefill", "decode"):
        ratio = found["ratios"][kind]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["pairs"] == 7
        assert ratio["within_noise"] is (ratio["low"] <= 1 <= ratio["high"])
    silent = json.loads(run("eval", model, model, *flags, "--no-speed", "--json").stdout)
    assert silent["ratios"] == {} and silent["first"] | {"perplexity": 0} == silent["second"] | {"perplexity": 0}


def test_several_texts_have_a_row_each_and_a_geometric_mean(model: Path, narrow: Path, texts: Path) -> None:
    flags = ("--text", texts, *BRIEF)
    found = json.loads(run("eval", model, narrow, *flags, "--no-builtin", "--json").stdout)
    assert list(found["first"]["perplexity"]) == list(found["perplexity_ratios"]) == ["digits.jsonl", "prose.txt"]
    values = [
        [found[name]["perplexity"][text]["value"] for text in found["perplexity_ratios"]]
        for name in ("first", "second")
    ]
    ratios = [second / first for first, second in zip(*values, strict=True)]
    assert list(found["perplexity_ratios"].values()) == pytest.approx(ratios, rel=1e-9)
    assert ratios[0] != ratios[1]
    assert found["geometric_mean_perplexity_ratio"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]), rel=1e-9)

    table = run("eval", model, narrow, *flags, "--no-builtin").stdout
    last = [line for line in table.splitlines() if "│" in line][-1]
    assert "perplexity ratio, geometric mean of 2 texts" in last
    assert f"{found['geometric_mean_perplexity_ratio']:.3f}" in last
    assert "geometric mean of 4 texts" in run("eval", model, narrow, *flags).stdout
    one = run("eval", model, narrow, "--text", texts / "prose.txt", *BRIEF, "--no-builtin").stdout
    assert "perplexity, prose.txt" in one and "geometric mean" not in one
    alone = run("eval", model, *flags, "--no-builtin").stdout
    assert "perplexity, digits.jsonl" in alone and "perplexity, prose.txt" in alone and "geometric mean" not in alone


def test_what_is_wrong_with_any_text_is_told_before_a_model_is_loaded(
    model: Path, narrow: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load_any", None)
    (texts / "brief.txt").write_text("ten tokens")
    for models in ((model,), (model, narrow)):
        refused = run("eval", *models, "--text", texts, *BRIEF)
        assert refused.exit_code == 6 and refused.stdout == ""
        assert "Text brief.txt: Expected at least one window of 32 tokens, got 10 tokens" in refused.stderr
    few_positions = save_checkpoint(texts / "few", tiny_model("llama", max_position_embeddings=16))
    refused = run("eval", model, few_positions, "--text", texts / "prose.txt", *BRIEF)
    assert refused.exit_code == 6 and "Expected windows of 2 to 16 tokens" in refused.stderr
    refused = run("eval", model, "--text", texts / "prose.txt", *BRIEF, "--stride", "33")
    assert refused.exit_code == 3 and "Expected a stride in [1, 32]" in refused.stderr


def test_without_a_terminal_phases_are_lines_on_standard_error(model: Path, texts: Path) -> None:
    flags = ("--text", texts, *BRIEF[:5], "--questions", "4", "--no-builtin", "--dtype", "float32")
    plain = run("eval", model, *flags)
    assert plain.stderr.splitlines() == [
        "loading: 0 of 1",
        "perplexity of tiny-llama, digits.jsonl: 1 of 3",
        "right continuations of tiny-llama, digits.jsonl: 0 of 2",
    ]
    assert run("eval", model, *flags, "--json").stderr == ""
    assert run("eval", model, *flags, "--quiet").output == ""


def test_a_long_phase_has_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    with progress_bar(lines=True) as progress:
        for step in range(1, 8):
            progress(f"refit sweep, layer {step}", step, 7)
            now += 10
        progress("[b]writing", 1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "refit sweep, layer 1: 1 of 7",
        "refit sweep, layer 4: 4 of 7",
        "refit sweep, layer 7: 7 of 7",
        "[b]writing: 1 of 1",
    ]
    # The library says nothing unasked.
    with progress_bar() as progress:
        progress("refit sweep", 1, 1)
    assert capsys.readouterr().err == ""
