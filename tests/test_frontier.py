"""Sweeps over ratios: one calibration serves all, a killed one goes on, and a gate chooses on text of its own."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minisp import fast, frontier
from minisp.cli.app import app
from minisp.errors import ConfigError, GateError, OutputError
from minisp.evaluate.measure import Protocol
from minisp.phases import sweep as sweeps
from tests.tiny import POSITIONS, save_checkpoint, tiny_model
from tests.toys import windows

FEW = "ignore:.* calibration tokens are few:UserWarning"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(FEW)]
IDS = windows(6, 16)
LETTERS = "abcdefghijklmnopqrstuvwxyz ,."
TEXTS = {
    name: "".join(LETTERS[i % len(LETTERS)] for i in windows(1, 1000, seed=seed)[0].tolist())
    for name, seed in (("a", 5), ("b", 6))
}
KEEPS = (0.9, 0.6, 0.3)
PROTOCOL = Protocol(window=POSITIONS, max_windows=4)
OPTIONS: dict[str, Any] = {"calibration": IDS, "texts": TEXTS, "protocol": PROTOCOL, "dtype": "float32", "alignment": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_model("llama"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_every_ratio_is_what_minify_gives_alone_from_one_sweep(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = 0
    backward = sweeps._run_backward

    def counted(*arguments: Any) -> Any:
        nonlocal swept
        swept += 1
        return backward(*arguments)

    monkeypatch.setattr(sweeps, "_run_backward", counted)
    found = frontier.sweep(source, out=tmp_path / "out", keeps=KEEPS, **OPTIONS)
    assert swept == 1
    alone = {name: OPTIONS[name] for name in ("calibration", "dtype", "alignment")}
    for rung in found.rungs:
        fast.minify(source, out=tmp_path / f"alone-{rung.keep}", keep=rung.keep, **alone)
        assert weights(rung.folder) == weights(tmp_path / f"alone-{rung.keep}")
    sizes = [rung.compared.second.bytes for rung in found.rungs]
    assert sizes == sorted(sizes, reverse=True) and found.dense.bytes > sizes[0]
    rows = list(csv.DictReader((tmp_path / "out" / "frontier.csv").open()))
    assert [float(row["keep"]) for row in rows] == list(KEEPS)
    assert float(rows[1]["mean ratio"]) == pytest.approx(found.rungs[1].ratio)
    assert json.loads((tmp_path / "out" / "frontier.json").read_text())["chosen"] is None
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 1000
    assert not (tmp_path / "out" / ".statistics").exists()


@pytest.mark.parametrize("at", [1, 9, 20])
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bytes(at: int, source: Path, tmp_path: Path) -> None:
    whole = frontier.sweep(source, out=tmp_path / "whole", keeps=KEEPS, **OPTIONS)
    told = 0

    def interrupt(phase: str, done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frontier.sweep(source, out=tmp_path / "out", keeps=KEEPS, progress=interrupt, **OPTIONS)
    again = frontier.sweep(source, out=tmp_path / "out", keeps=KEEPS, **OPTIONS)
    for one, other in zip(whole.rungs, again.rungs, strict=True):
        assert weights(one.folder) == weights(other.folder)
        assert one.ratio == other.ratio


def test_a_gate_chooses_the_smallest_that_holds_on_both_halves(source: Path, tmp_path: Path) -> None:
    free = frontier.sweep(source, out=tmp_path / "free", keeps=KEEPS, **OPTIONS)
    ratios = sorted(rung.ratio for rung in free.rungs)
    found = frontier.sweep(source, out=tmp_path / "out", keeps=KEEPS, gate=10 * ratios[-1], **OPTIONS)
    assert found.chosen is not None and found.chosen.keep == min(KEEPS)
    assert found.confirmed is not None and found.confirmed != found.chosen.ratio
    # The halves that chose are the beginnings of the texts.
    assert found.dense.perplexity["a"].num_tokens <= free.dense.perplexity["a"].num_tokens
    middle = (min(r.ratio for r in found.rungs) + max(r.ratio for r in found.rungs)) / 2
    some = frontier.sweep(source, out=tmp_path / "out", keeps=KEEPS, gate=max(1.0, middle), **OPTIONS)
    assert some.chosen is not None and some.chosen.ratio <= middle and some.confirmed <= middle


def test_a_gate_that_none_holds_is_an_error_that_says_how_far_they_are(source: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"at most 1 times .* none of 1: the best is keep 0.3 with .*results stay"):
        frontier.sweep(source, out=tmp_path / "out", keeps=(0.3,), gate=1.0, **OPTIONS)
    assert (tmp_path / "out" / "keep-0.3" / "minisp.json").is_file()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keeps": ()}, "different ratios between 0 and 1"),
        ({"keeps": (0.5, 0.5)}, "different ratios"),
        ({"keeps": (1.0,)}, "different ratios"),
        ({"gate": 0.5}, "at least 1, got 0.5"),
        ({"keep": 0.5}, "expected no keep"),
        ({"method": "surgeon"}, "expected method taylor"),
        ({"target_params": "9k"}, "expected no target_params"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused(
    options: dict[str, Any], expected: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        frontier.sweep(source, out=tmp_path / "out", **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_another_sweep_s_folder_is_refused(source: Path, tmp_path: Path) -> None:
    frontier.sweep(source, out=tmp_path / "out", keeps=(0.5,), **OPTIONS)
    with pytest.raises(OutputError, match="same model, text and options"):
        frontier.sweep(source, out=tmp_path / "out", keeps=(0.5,), **{**OPTIONS, "calibration": windows(6, 16, seed=9)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(OutputError, match="new or empty"):
        frontier.sweep(source, out=tmp_path / "other", keeps=(0.5,), **OPTIONS)


def test_the_command(source: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXTS["a"])
    arguments = ["sweep", source, "--out", out, "--text", text, "-c", text, "--keep", 0.8, "--keep", 0.5]
    own = ["--window", 32, "--num-windows", 8, "--window-of-text", POSITIONS, "--generic", 0, "--json"]
    result = CliRunner().invoke(app, [str(x) for x in (*arguments, *own, "--max-ppl-ratio", 50)])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [rung["keep"] for rung in values["rungs"]] == [0.8, 0.5] and values["chosen"] == 0.5
    held = min(rung["geometric_mean_perplexity_ratio"] for rung in values["rungs"])
    refused = CliRunner().invoke(app, [str(x) for x in (*arguments, *own, "--max-ppl-ratio", max(1.0, held - 0.01))])
    assert refused.exit_code == (11 if held > 1.01 else 0)
