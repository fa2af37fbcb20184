"""A checkpoint is data: whatever a folder names or carries, none of its code runs and none of it reaches the result."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minisp import fast
from minisp.cli.app import app
from minisp.errors import CalibrationError, UnsupportedModelError
from minisp.models.skeleton import skeleton
from minisp.store.checkpoint import Checkpoint
from tests.damage import OPTIONS, config, file, tensor
from tests.tiny import save_checkpoint, tiny_model

CODE = ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py")


class Bomb:
    """Unpickling it touches a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A sound llama checkpoint that offers code for its config, model and tokenizer, and pickled weights besides."""
    folder = save_checkpoint(tmp_path / "hostile", tiny_model("llama"))
    marker = tmp_path / "marker"
    for name in CODE:
        (folder / name).write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    offered = {"AutoConfig": "configuration_evil.Evil"}
    offered |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    config(auto_map=offered)(folder)
    return folder


def test_the_fixture_would_notice(hostile: Path) -> None:
    exec((hostile / CODE[0]).read_text())
    assert (hostile.parent / "marker").exists()
    (hostile.parent / "marker").unlink()
    pickle.loads((hostile / "pytorch_model.bin").read_bytes())
    assert (hostile.parent / "marker").exists()


def test_no_code_of_a_checkpoint_runs_and_none_is_passed_on(hostile: Path) -> None:
    text = hostile.parent / "text.txt"
    text.write_text("a sentence of no consequence. " * 20)
    out = hostile.parent / "out"
    fast.plan(hostile, **OPTIONS)
    fast.minify(hostile, out=out, calibration=text, **OPTIONS)
    command = ["eval", str(hostile), "--text", str(text), "--window", "32", "--no-speed", "--max-windows", "1"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert not (hostile.parent / "marker").exists()
    assert not {path.name for path in out.iterdir()} & {*CODE, "pytorch_model.bin"}
    assert "evil" not in (out / "config.json").read_text()


def test_a_family_that_needs_its_own_code_is_refused(hostile: Path) -> None:
    config(model_type="evil")(hostile)
    with pytest.raises(UnsupportedModelError, match=r"a model type that transformers .* knows, got 'evil'"):
        fast.minify(hostile, out=hostile.parent / "out", **OPTIONS)
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["hostile"]


def test_a_tokenizer_that_needs_its_own_code_is_refused(hostile: Path) -> None:
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    file("tokenizer_config.json", json.dumps(settings))(hostile)
    with pytest.raises(CalibrationError, match=r"cannot load its tokenizer.*Pass tokens instead"):
        fast.minify(hostile, out=hostile.parent / "out", calibration=["some text"], **OPTIONS)
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["hostile"]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_does_not_choose_kernels(key: str, hostile: Path) -> None:
    config(**{key: "evil/kernels"})(hostile)
    assert skeleton(Checkpoint.open(hostile)).config._attn_implementation in ("eager", "sdpa")


def test_names_of_tensors_are_no_paths_and_no_terminal_commands(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", tiny_model("llama"), max_shard_size="20KB")
    text = tmp_path / "text.txt"
    text.write_text("a sentence of no consequence. " * 20)
    for name in ("../../escaped", "/escaped", "", "a\nb", "\x1b]0;owned\x07"):
        tensor(name, lambda old: old)(folder)
    before = set(tmp_path.rglob("*"))
    fast.minify(folder, out=tmp_path / "out", calibration=text, **OPTIONS)
    assert {path for path in tmp_path.rglob("*") if (tmp_path / "out") not in (path, *path.parents)} == before

    shutil.rmtree(tmp_path / "out")
    tensor("\x1b]0;owned\x07", lambda old: old * torch.nan)(folder)
    command = ["minify", str(folder), "--out", str(tmp_path / "out"), "-c", str(text), "--window", "32"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "2000"})
    assert result.exit_code == 5
    assert "tensor \\x1b]0;owned\\x07: expected finite values" in result.stderr
    assert "\x1b" not in result.stderr
