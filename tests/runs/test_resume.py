"""Scratch folders: what a run leaves is used by the right run only, and gives the same bits."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minisp import fast
from minisp.cli.app import app
from minisp.errors import ConfigError, OutputError
from minisp.phases import sweep, trials
from minisp.ranks import Ranks
from minisp.resources import Resources
from minisp.store import tiers
from minisp.store.claim import open_scratch
from tests.tiny import LAYERS, save_checkpoint, tiny_model

WINDOWS = torch.arange(128).reshape(4, 32) * 37 % 64
OPTIONS: dict[str, Any] = {"dtype": "float32", "segment": 1, "batch": 1, "allocation": "measured"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_model("llama"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def run(source: Path, out: Path, **options: Any) -> Any:
    return fast.minify(source, out=out, **{"calibration": WINDOWS, **OPTIONS, **options})


def test_statistics_are_reused_for_other_ratios_without_a_sweep(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    run(source, tmp_path / "a", keep=0.6, scratch=str(work))
    run(source, tmp_path / "fresh", keep=0.8, damping=0.1)
    monkeypatch.setattr(sweep, "_run_backward", None)
    reused = run(
        source, tmp_path / "b", keep=0.8, damping=0.1, scratch=str(work), reuse=True, calibration=None, window=32,
        num_windows=4,
    )  # fmt: skip
    assert weights(tmp_path / "b") == weights(tmp_path / "fresh") != weights(tmp_path / "a")
    assert reused.calibration == ("4 windows of 32 tokens from the given tokens",)
    left = sorted(path.name for path in work.iterdir())
    assert [name for name in left if name.endswith(".data")] == [
        *(f"statistics_{layer:04d}_mlp.data" for layer in range(LAYERS)),
        "windows.data",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resume": True, "keep": 0.7}, r"got another one: keep was 0\.6, is 0\.7.*statistics alone by --reuse"),
        ({"reuse": True, "dtype": "bfloat16"}, r"got another one: dtype was 'float32', is 'bfloat16'"),
        ({"reuse": True, "calibration": WINDOWS.flip(0)}, "Calibration text: expected that of the earlier run"),
        ({}, "expected an empty one, got what an earlier run left"),
    ],
)
def test_what_another_run_left_is_refused(options: dict[str, Any], says: str, source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "a", keep=0.6, scratch=str(tmp_path / "work"))
    before = sorted((tmp_path / "work").iterdir())
    with pytest.raises(OutputError, match=says):
        run(source, tmp_path / "b", **{"keep": 0.6, "scratch": str(tmp_path / "work"), **options})
    assert sorted((tmp_path / "work").iterdir()) == before
    assert not (tmp_path / "b").exists()


def test_a_changed_source_is_another_run(source: Path, tmp_path: Path) -> None:
    copy = save_checkpoint(tmp_path / "model", tiny_model("llama"))
    run(copy, tmp_path / "a", scratch=str(tmp_path / "work"))
    save_checkpoint(copy, tiny_model("llama", seed=1))
    with pytest.raises(OutputError, match="got another one: files changed at"):
        run(copy, tmp_path / "b", scratch=str(tmp_path / "work"), reuse=True)


def test_nothing_to_reuse_is_an_error_and_nothing_to_resume_is_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"expected statistics of an earlier run \(--reuse\), found none"):
        run(source, tmp_path / "a", scratch=str(tmp_path / "work"), reuse=True)
    run(source, tmp_path / "a", resume=True)
    for name in ("resume", "reuse"):
        with pytest.raises(ConfigError, match=f"Option {name}: expected a checkpoint on disk and an output folder"):
            fast.minify(tiny_model("llama"), calibration=WINDOWS, **{name: True})


def test_a_model_that_stays_in_memory_cannot_be_resumed_but_reused(source: Path, tmp_path: Path) -> None:
    work, options = str(tmp_path / "work"), {"calibration": WINDOWS, "dtype": "float32", "batch": 1}

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase.startswith("refit sweep, layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast.minify(source, scratch=work, progress=interrupt, **options)
    with pytest.raises(ConfigError, match="Option resume: expected a checkpoint on disk and an output folder"):
        fast.minify(source, scratch=work, resume=True, **options)
    report = fast.minify(source, scratch=work, reuse=True, **options)
    widths = [layer.mlp.up_proj.out_features for layer in report.model.model.layers]
    assert widths == [layer.kept for layer in report.layers] and sum(widths) < LAYERS * 48


def test_trial_cuts_go_on_behind_the_last_layer_that_was_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "whole")
    monkeypatch.setattr(tiers, "SAVE_SECONDS", 0.0)
    interrupted(source, tmp_path / "out", "trial cuts")
    assert [path.name for path in (tmp_path / ".out.scratch").glob("trials*.json")] == ["trials_0002.json"]
    tried: list[int] = []
    cut = trials._trial_weight
    monkeypatch.setattr(trials, "_trial_weight", lambda s, part, *a: (tried.append(part.layer), cut(s, part, *a))[1])
    run(source, tmp_path / "out", resume=True)
    assert tried == [2]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_an_empty_hidden_folder_of_the_user_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".work").mkdir()
    with pytest.raises(OutputError, match="found none"):
        run(source, tmp_path / "out", scratch=str(tmp_path / ".work"), reuse=True)
    assert (tmp_path / ".work").is_dir()


def interrupted(source: Path, out: Path, at: str, **options: Any) -> None:
    """A run that stops when the phase `at` has made its second step."""
    steps = 0

    def interrupt(phase: str, done: int, total: int) -> None:
        nonlocal steps
        steps += phase.startswith(at)
        if steps == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, progress=interrupt, **options)


@pytest.mark.parametrize("refit", [{}, {"correct_drift": False}, {"refit_on": "pruned"}])
@pytest.mark.parametrize("segment", [1, 2, LAYERS])
def test_a_run_resumes_with_other_segments_to_the_same_bits(
    segment: int, refit: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "whole", **refit)
    for at in ("saliency, layers 1", "trial cuts", "refit" if "correct_drift" in refit else "refit sweep, layer 1"):
        out = tmp_path / at
        interrupted(source, out, at, **refit)
        run(source, out, **refit, segment=segment, resume=True)
        assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.parametrize("segment", [1, LAYERS])
def test_a_sweep_over_the_first_segment_goes_on_in_its_middle(
    segment: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "whole", segment=segment)
    out, phase = tmp_path / "out", f"saliency, layers 0-{segment - 1}"
    monkeypatch.setattr(tiers, "SAVE_SECONDS", 0.0)
    passed = 0
    backward = sweep._forward_backward

    def counted(*arguments: Any) -> Any:
        nonlocal passed
        passed += 1
        return backward(*arguments)

    def interrupt(at: str, done: int, total: int) -> None:
        # Told about three of four windows, and the third one's sums not yet kept.
        if at == phase and done == total - segment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, segment=segment, progress=interrupt)
    kept = [path.name for path in (tmp_path / ".out.scratch").glob("partial_*.json")]
    assert sorted(kept) == ["partial_0000.json", "partial_0001.json"]
    monkeypatch.setattr(sweep, "_forward_backward", counted)
    run(source, out, segment=segment, resume=True)
    assert passed == 2
    assert weights(out) == weights(tmp_path / "whole")


def test_a_damaged_record_is_computed_anew(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", correct_drift=False)
    interrupted(source, tmp_path / "out", "refit", correct_drift=False)
    torn = tmp_path / ".out.scratch" / "statistics_0001_mlp.data"
    data = bytearray(torn.read_bytes())
    data[len(data) // 2] ^= 1
    torn.write_bytes(data)
    with pytest.warns(UserWarning, match="statistics_0001_mlp is damaged; statistics_0001_mlp will be computed anew"):
        run(source, tmp_path / "out", correct_drift=False, resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_statistics_of_a_text_that_is_lost_serve_no_other_text(source: Path, tmp_path: Path) -> None:
    work, other = str(tmp_path / "work"), WINDOWS.flip(0, 1)
    run(source, tmp_path / "a", scratch=work)
    run(source, tmp_path / "fresh", calibration=other)
    with pytest.raises(OutputError, match="expected that of the earlier run"):
        run(source, tmp_path / "b", calibration=other, scratch=work, reuse=True)
    torn = tmp_path / "work" / "windows.data"
    torn.write_bytes(bytes(len(torn.read_bytes())))
    with pytest.warns(UserWarning, match="windows is damaged; everything will be computed anew"):
        run(source, tmp_path / "b", calibration=other, scratch=work, reuse=True)
    assert weights(tmp_path / "b") == weights(tmp_path / "fresh") != weights(tmp_path / "a")


def test_a_disk_that_is_full_at_the_lock_is_a_typed_error(source: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(OutputError, match="expected room for what waits between the phases"):
            run(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_cannot_share_a_folder(source: Path, tmp_path: Path) -> None:
    resources = Resources(scratch=str(tmp_path / "work"))
    with (
        open_scratch(None, resources, None, Ranks()),
        pytest.raises(OutputError, match=rf"expected to be its only user, but process {os.getpid()} has it"),
    ):
        run(source, tmp_path / "out", scratch=str(tmp_path / "work"), resume=True)
    run(source, tmp_path / "out", scratch=str(tmp_path / "work"))


def test_a_folder_of_someone_else_keeps_its_files(source: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    names = ("precious.data", "precious.json", "run.json", "lock", "result.json", "result.data")
    for name in names:
        (tmp_path / "work" / name).write_text("[1]")
    for options in ({}, {"reuse": True}, {"resume": True}):
        out = tmp_path / ("out" + "".join(options))
        run(source, out, scratch=str(tmp_path / "work"), **options)
        assert all((tmp_path / "work" / name).read_text() == "[1]" for name in names)


def test_a_folder_that_is_refused_stays_as_it_is(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(source, tmp_path / "a", scratch=str(work))
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    with pytest.raises(OutputError, match="got what an earlier run left"):
        fast.minify(tiny_model("llama"), out=tmp_path / "b", calibration=WINDOWS, scratch=str(work))
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    interrupted(source, tmp_path / "c", "saliency, layers 2")
    hidden = tmp_path / ".c.scratch"
    left = sorted(path.name for path in hidden.iterdir())
    with pytest.raises(OutputError, match="got what an earlier run left"):
        run(source, tmp_path / "c")
    assert sorted(path.name for path in hidden.iterdir()) == left
    with pytest.raises(ConfigError, match="expected a folder apart from the output"):
        run(source, tmp_path / "d", scratch=str(tmp_path / "d" / "work"))


@pytest.mark.parametrize(
    ("step", "says"), [("decide", "{folder}: the same command with --resume"), ("plan", "was left.")]
)
def test_an_interrupted_command_names_the_folder_if_something_waits_there(
    step: str, says: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fast, step, interrupt)
    text = tmp_path / "text.txt"
    text.write_text("abc " * 500)
    command = ["minify", str(source), "--out", str(tmp_path / "out"), "-c", str(text), "--window", "32", "--quiet"]
    result = CliRunner(env={"COLUMNS": "2000"}).invoke(app, command)
    assert result.exit_code == 130
    assert says.format(folder=tmp_path / ".out.scratch") in result.stderr.replace("\n", "")


def test_auto_and_what_it_was_resolved_to_are_one_run(source: Path, tmp_path: Path) -> None:
    auto: dict[str, Any] = {"device": "auto", "dtype": "auto", "batch": None, "scratch": str(tmp_path / "work")}
    first = run(source, tmp_path / "a", keep=0.6, **auto)
    named = {"device": first.plan.device, "dtype": first.plan.dtype, "batch": first.plan.batch}
    run(source, tmp_path / "b", keep=0.6, **{**auto, **named}, reuse=True)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
