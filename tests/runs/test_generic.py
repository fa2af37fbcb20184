"""Generic text through whole runs: what joins the user's text, who writes it, and when it is written again."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from minisp import fast
from minisp.phases import calibrate
from minisp.report.report import MinifyReport
from tests.tiny import save_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = ["".join(f"sentence {i} of no consequence, then another one. " for i in range(40))]
OPTIONS: dict[str, Any] = {"keep": 0.7, "num_windows": 16, "window": 32, "dtype": "float32"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny-llama", tiny_model("llama"))


def minify(*arguments: Any, **options: Any) -> MinifyReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fast.minify(*arguments, **{**OPTIONS, **options})


def sources(report: MinifyReport) -> dict[str, int]:
    """What the windows are from → how many."""
    lines = [line for line in report.calibration if " of 32 tokens from " in line and "not the" not in line]
    return {line.split(" from ", 1)[1]: int(line.split(" ", 1)[0]) for line in lines}


WRITTEN = "text that the model wrote itself (generic)"
DOCUMENTATION = "the documentation that comes with Python (generic)"
CODE = "the source code that comes with Python (generic)"


def test_a_quarter_is_generic_by_default(source: Path, tmp_path: Path) -> None:
    report = minify(source, out=tmp_path / "out", calibration=TEXT)
    assert sources(report) == {"the given documents": 12, WRITTEN: 2, DOCUMENTATION: 1, CODE: 1}
    assert report.calibration[-1].startswith("the model wrote by 32 openings of texts")
    card = (tmp_path / "out" / "README.md").read_text()
    assert WRITTEN in card and "openings of texts" in card


def test_none_is_generic_where_it_is_turned_off_or_windows_are_given(source: Path, tmp_path: Path) -> None:
    assert sources(minify(source, out=tmp_path / "a", calibration=TEXT, generic=0.0)) == {"the given documents": 16}
    windows = torch.randint(3, 60, (16, 32))
    assert sources(minify(source, out=tmp_path / "b", calibration=windows)) == {"the given tokens": 16}
    asked = minify(source, out=tmp_path / "c", calibration=windows, generic=0.5)
    assert sources(asked) == {"the given tokens": 8, WRITTEN: 4, DOCUMENTATION: 2, CODE: 2}


def test_a_model_that_is_not_whole_in_memory_writes_none(source: Path, tmp_path: Path) -> None:
    report = minify(source, out=tmp_path / "out", calibration=TEXT, segment=1)
    assert sources(report) == {"the given documents": 12, DOCUMENTATION: 2, CODE: 2}
    assert not fast.plan(source, **OPTIONS, segment=1).writes_text
    assert fast.plan(source, **OPTIONS).writes_text


def test_a_checkpoint_writes_what_the_same_model_in_memory_writes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    writes = calibrate.write_windows

    def kept(*arguments: Any, **options: Any) -> Any:
        written.append(writes(*arguments, **options))
        return written[-1]

    monkeypatch.setattr(calibrate, "write_windows", kept)
    from minisp.store.hub import load_tokenizer

    minify(source, out=tmp_path / "a", calibration=TEXT)
    minify(tiny_model("llama"), calibration=TEXT, tokenizer=load_tokenizer(source))
    assert torch.equal(written[0], written[1])


def test_what_was_written_is_not_written_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    writes = calibrate.write_windows

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options["num_windows"])
        return writes(*arguments, **options)

    monkeypatch.setattr(calibrate, "write_windows", counted)
    first = minify(source, out=tmp_path / "a", calibration=TEXT, scratch=str(tmp_path / "work"))
    again = minify(source, out=tmp_path / "b", calibration=TEXT, scratch=str(tmp_path / "work"), reuse=True, keep=0.6)
    assert calls == [2]
    assert again.calibration_fingerprint == first.calibration_fingerprint
    assert again.calibration == first.calibration


def test_text_that_an_earlier_run_wrote_is_not_described_where_none_joins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped when the model has written, and goes on without generic text."""
    work = tmp_path / "work"
    with monkeypatch.context() as patched:
        patched.setattr(calibrate, "narrowness", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            minify(source, out=tmp_path / "a", calibration=TEXT, scratch=str(work))
    assert (work / "written.data").exists() and not (work / "windows.data").exists()
    report = minify(source, out=tmp_path / "b", calibration=TEXT, scratch=str(work), resume=True, generic=0.0)
    assert sources(report) == {"the given documents": 16}
    assert not any("wrote" in line for line in report.calibration)
