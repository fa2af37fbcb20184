"""`minisp check`: what it counts, and that a pattern which does not hold is no success."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from minisp import fast
from minisp.cli.app import app
from tests.tiny import save_checkpoint, tiny_model
from tests.toys import windows

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.* calibration tokens are few:UserWarning"),
]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    source = save_checkpoint(folder / "dense", tiny_model("gpt2"))
    options = {"method": "sparsegpt", "pattern": "2:4", "keep": 0.5, "calibration": windows(4, 16)}
    fast.minify(source, out=folder / "out", dtype="float32", **options)
    return folder / "out"


def test_a_pattern_that_holds(pruned: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(pruned), "--pattern", "2:4", "--zeros", "0.5", "--json"])
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert (2 * values["zeros"], values["broken"]) == (values["weights"], 0)
    assert {found["path"] for found in values["maps"]} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    shown = CliRunner().invoke(app, ["check", str(pruned), "--pattern", "2:4"]).stdout
    assert "50.0%" in shown and "mlp.c_fc" in shown


def test_one_weight_too_many_is_found_and_named(pruned: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in pruned.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    # GPT-2 stores inputs first: groups go along them.
    tensors[name][:3, 0] = torch.tensor([1.0, 1.0, 1.0])
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(app, ["check", str(broken), "--pattern", "2:4"])
    assert result.exit_code == 5
    assert "1 groups that break it, the first of them in Layer 1, mlp.c_fc" in " ".join(result.stderr.split())


def test_too_few_zeros_are_no_success(pruned: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(pruned), "--zeros", "0.6"])
    assert result.exit_code == 5
    assert "at least 60.0% zeros" in " ".join(result.stderr.split())
