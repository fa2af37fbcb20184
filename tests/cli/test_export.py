"""`minisp export`: what it prints, which exit code it returns, and that its targets are the library's."""

import json
from pathlib import Path
from typing import get_args

import pytest
from click.testing import Result
from typer.testing import CliRunner

from minisp.cli.app import EXPORT_EXAMPLES, Target, app
from minisp.errors import OutputError
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


def minify(model: Path, *arguments: object) -> Result:
    options = ["--keep", "0.5", "--window", "16", "--num-windows", "4", "--dtype", "float32", "--generic", "0"]
    text = model.parent / "text.txt"
    text.write_text("the 12345 the end of it. " * 40)
    command = ["minify", model, *options, "-c", text, *arguments]
    return CliRunner().invoke(app, [*map(str, command)], env={"COLUMNS": "2000"})


def test_minify_exports_what_it_has_written(model: Path, there: Path) -> None:
    done = minify(model, "--out", there / "small", "--export", "gguf")
    assert done.exit_code == 0, done.stderr
    assert f"Then for a server: {there / 'small.gguf'}" in done.stderr
    assert f"gguf: {there / 'small.gguf'}" in done.stdout
    alone = run(there / "small", "--to", "gguf", "--out", there / "alone.gguf")
    assert alone.exit_code == 0, alone.stderr
    assert (there / "small.gguf").read_bytes() == (there / "alone.gguf").read_bytes()

    as_json = minify(model, "--out", there / "other", "--export", "padded", "--json")
    assert as_json.exit_code == 0, as_json.stderr
    assert json.loads(as_json.stdout)["export"]["out"] == str(there / "other-padded")
    assert (there / "other-padded" / MANIFEST_NAME).is_file()


def test_minify_refuses_before_it_runs_what_the_target_cannot_express(model: Path, there: Path) -> None:
    refused = minify(model, "--out", there / "small", "--export", "nemotron-nas")
    assert refused.exit_code == 4 and "--alignment 256" in refused.stderr and refused.stdout == ""
    planned = CliRunner().invoke(app, ["plan", str(model), "--window", "16", "--export", "hf"])
    assert planned.exit_code == 4 and "--widths uniform" in " ".join(planned.stderr.split())
    (there / "small.gguf").write_text("data")
    taken = minify(model, "--out", there / "small", "--export", "gguf")
    assert taken.exit_code == 8 and "expected a new file, got a file" in taken.stderr
    assert [path.name for path in there.iterdir()] == ["small.gguf"]


def test_a_failed_export_says_that_the_result_is_complete(
    model: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OutputError("Output: disk full.")

    monkeypatch.setattr("minisp.cli.exporting.export", fails)
    done = minify(model, "--out", there / "small", "--export", "padded")
    assert done.exit_code == 8
    assert "disk full" in done.stderr and f"minisp export {there / 'small'} --to padded" in done.stderr
    assert (there / "small" / MANIFEST_NAME).is_file()
