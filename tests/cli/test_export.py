"""`minisp export`: what it prints, which exit code it returns, and that its targets are the library's."""

import json
from pathlib import Path
from typing import get_args

import pytest
from click.testing import Result
from typer.testing import CliRunner

from minisp.cli.app import EXPORT_EXAMPLES, Target, app
from minisp.export.targets import TARGETS
from minisp.store.writer import MANIFEST_NAME
from tests.export.checkpoints import WIDTHS, byte_tokenizer, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "2000"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny[b]"
    write_checkpoint(folder, "llama", tokenizer=byte_tokenizer())
    return folder


def test_every_target_has_a_name_and_an_example() -> None:
    assert set(get_args(Target)) == set(TARGETS)
    assert all(f"--to {target} " in EXPORT_EXAMPLES for target in TARGETS)


def test_a_table_or_json_or_nothing(model: Path, there: Path) -> None:
    table = run(model, "--to", "padded", "--out", there / "a")
    assert table.exit_code == 0, table.stderr
    assert "tiny[b] to padded" in table.stdout and "16 to 48" in table.stdout and str(there / "a") in table.stdout
    assert (there / "a" / MANIFEST_NAME).is_file()

    as_json = run(model, "--to", "gguf", "--dtype", "f16", "--out", there / "b.gguf", "--json")
    assert as_json.exit_code == 0, as_json.stderr
    expected = {"source": str(model), "target": "gguf", "out": str(there / "b.gguf"), "widths": list(WIDTHS)}
    assert json.loads(as_json.stdout) == {**expected, "bytes": (there / "b.gguf").stat().st_size}

    quiet = run(model, "--to", "hf-per-layer", "--out", there / "c", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--to", "hf"), 4, "UnsupportedModelError"),
        (("--to", "padded", "--dtype", "f16"), 3, "Option dtype"),
        (("--to", "gguf", "--dtype", "q4_k"), 3, "expected one of f32, f16, bf16, q8_0"),
        (("--to", "onnx"), 2, "onnx"),
    ],
)
def test_what_is_refused_has_its_exit_code_and_leaves_nothing(
    arguments: tuple[str, ...], code: int, says: str, model: Path, there: Path
) -> None:
    refused = run(model, *arguments, "--out", there / "out")
    assert refused.exit_code == code and refused.stdout == ""
    assert says in refused.stderr
    assert list(there.iterdir()) == []
