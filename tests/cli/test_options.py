"""Options that the records of the configuration give the commands."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minisp.cli.app import app
from tests.tiny import save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny-llama", tiny_model("llama", num_key_value_heads=2))


@pytest.mark.parametrize(
    ("words", "structures"),
    [
        ((), ["mlp"]),
        (("attention",), ["attention"]),
        (("mlp,attention",), ["mlp", "attention"]),
        (("mlp", "attention"), ["mlp", "attention"]),
    ],
)
def test_structures_are_listed_or_the_option_is_repeated(
    words: tuple[str, ...], structures: list[str], model: Path
) -> None:
    options = [part for word in words for part in ("--structures", word)]
    result = CliRunner().invoke(app, ["plan", str(model), "--window=32", "--json", *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["config"]["structures"] == structures


@pytest.mark.parametrize("words", [("mlp", "mlp"), ("mlp,mlp",), ("mlp,heads",), ("",)])
def test_a_structure_twice_or_unknown_is_refused(words: tuple[str, ...], model: Path) -> None:
    options = [part for word in words for part in ("--structures", word)]
    result = CliRunner().invoke(app, ["plan", str(model), "--window=32", *options])
    assert result.exit_code == 3 and "structures: expected a tuple" in result.stderr
