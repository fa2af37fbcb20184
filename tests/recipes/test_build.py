"""`build`: one output or none, gates, the same bytes, and what a second call does."""

import fcntl
import json
import math
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minisp import fast
from minisp.cli.app import app
from minisp.errors import CalibrationError, ConfigError, GateError, OutputError, UnsupportedModelError
from minisp.recipes import build as building
from minisp.recipes.build import build
from minisp.recipes.recipe import MANIFEST_NAME
from minisp.store.checkpoint import Checkpoint
from tests.export.checkpoints import byte_tokenizer
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
source: llama
name: small
budget: {keep: 0.8}
calibration: [{source: cal.txt}]
method: {window: 32, num_windows: 6, dtype: float32, generic: 0}
export: [{to: padded}]
gates:
  max_bytes: 1MB
  max_parameters: 20k
  max_perplexity_ratio: {test.txt: 3}
  window: 32
  max_windows: 2
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    """A folder with a recipe and all that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "llama").exists():
        tiny_model("llama", vocab_size=300).save_pretrained(folder / "llama")
        byte_tokenizer().save_pretrained(folder / "llama")
        (folder / "cal.txt").write_text("a sentence of no consequence, then another one. " * 30)
        (folder / "test.txt").write_text("held out words of some consequence; and then others. " * 10)
    (folder / "r.yaml").write_text(text)
    return folder / "r.yaml"


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe in a folder of its own, built."""
    recipe = write(tmp_path_factory.mktemp("built"))
    assert not build(recipe).unchanged
    return recipe


def test_the_output_is_complete_and_its_manifest_true(built: Path) -> None:
    out = built.with_suffix("")
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST_NAME, "small", "small-padded"]
    # Nothing else is left beside it.
    assert sorted(path.name for path in built.parent.iterdir()) == ["cal.txt", "llama", "r", "r.yaml", "test.txt"]
    found = contents(out)
    del found[MANIFEST_NAME]
    assert manifest["outputs"] == found and "small-padded/model.safetensors" in found
    for place in ("source/model.safetensors", "source/config.json", "source/tokenizer.json", "calibration/cal.txt"):
        kind, name = place.split("/")
        path = built.parent / ("llama" if kind == "source" else "") / name
        assert manifest["inputs"][place] == sha256(path.read_bytes()).hexdigest()
    assert manifest["inputs"]["gates/test.txt"] == sha256((built.parent / "test.txt").read_bytes()).hexdigest()
    assert set(manifest["versions"]) == {"minisp", "python", "torch", "transformers"} and manifest["seed"] == 0
    gates = {gate["gate"]: gate for gate in manifest["gates"]}
    assert all(gate["holds"] for gate in gates.values())
    assert gates["max_bytes"]["value"] == (out / "small/model.safetensors").stat().st_size
    ratio = gates["max_perplexity_ratio"]
    assert ratio["value"] == pytest.approx(ratio["after"] / ratio["before"]) and ratio["text"] == "test.txt"
    assert str(built.parent) not in (out / MANIFEST_NAME).read_text()


def test_the_same_recipe_gives_the_same_bytes_elsewhere(built: Path, tmp_path: Path) -> None:
    again = build(write(tmp_path / "elsewhere"), tmp_path / "r")
    assert not again.unchanged
    assert contents(tmp_path / "r") == contents(built.with_suffix(""))


def test_a_second_call_does_nothing_and_says_so(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.with_suffix("").rglob("*")}
    monkeypatch.setattr(fast, "minify", None)
    again = build(built)
    assert again.unchanged and "nothing was done" in again.lines()[0]
    assert {path: path.stat().st_mtime_ns for path in built.with_suffix("").rglob("*")} == before
    shown = CliRunner().invoke(app, ["build", str(built), "--json"])
    assert shown.exit_code == 0
    values = json.loads(shown.stdout)
    assert values["unchanged"] is True and values["built"] is True and values["out"] == str(built.with_suffix(""))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda recipe: recipe.write_text(RECIPE.replace("keep: 0.8", "keep: 0.7")), "other values of recipe.budget"),
        (lambda recipe: (recipe.parent / "cal.txt").write_text("x" * 999), "other values of inputs.calibration/cal.tx"),
        (lambda recipe: (recipe.with_suffix("") / "small/config.json").write_text("{}"), "small/config.json"),
        (lambda recipe: (recipe.with_suffix("") / "small/config.json").unlink(), "small/config.json"),
        (lambda recipe: (recipe.with_suffix("") / "more.txt").touch(), "more.txt"),
    ],
)
def test_what_has_changed_since_is_refused_and_named(change: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    recipe = write(tmp_path / "a", RECIPE.replace("export: [{to: padded}]\n", "").split("gates:")[0])
    build(recipe)
    change(recipe)
    after = contents(recipe.with_suffix(""))
    with pytest.raises(OutputError, match=says):
        build(recipe)
    assert contents(recipe.with_suffix("")) == after


@pytest.mark.parametrize(
    ("old", "new", "gate", "reached"),
    [
        ("max_bytes: 1MB", "max_bytes: 10KB", "max_bytes", "its perplexity was not measured"),
        ("max_parameters: 20k", "max_parameters: 100", "max_parameters", "its perplexity was not measured"),
        ("test.txt: 3", "test.txt: 0.01", "max_perplexity_ratio", "nothing was exported"),
    ],
)
def test_a_gate_that_fails_has_its_exit_code_and_leaves_nothing(
    old: str, new: str, gate: str, reached: str, tmp_path: Path
) -> None:
    recipe = write(tmp_path, RECIPE.replace(old, new))
    before = sorted(path.name for path in tmp_path.iterdir())
    failed = CliRunner().invoke(app, ["build", str(recipe), "--json"], env={"COLUMNS": "2000"})
    assert failed.exit_code == GateError.exit_code == 11
    assert f"ate {gate}" in failed.stderr and "expected at most" in failed.stderr and reached in failed.stderr
    facts = json.loads(failed.stdout)
    assert facts["built"] is False and reached in facts["reached"]
    assert [one["gate"] for one in facts["gates"] if not one["holds"]] == [gate]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_can_be_known_before_the_run_is_refused_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "minify", None)

    def refused(kind: type[Exception], old: str, new: str, says: str) -> None:
        with pytest.raises(kind, match=says):
            build(write(tmp_path / "a", RECIPE.replace(old, new)))
        assert not (tmp_path / "a/r").exists() and not (tmp_path / "a/.r.build").exists()

    refused(UnsupportedModelError, "to: padded", "to: hf", "expected layers of one width")
    refused(CalibrationError, "source: cal.txt", "source: none.txt", "Expected a text file, got")
    refused(ConfigError, "test.txt: 3", "cal.txt: 3", "expected texts that do not calibrate, got cal.txt")
    refused(CalibrationError, "window: 32\n", "window: 60000\n", "window")
    refused(ConfigError, "keep: 0.8", "target_params: 10", "target_params")
    refused(ConfigError, "test.txt: 3", "builtin:poems: 3", "builtin:documentation")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(ConfigError, "", "", "expected one process")


def test_a_target_is_a_budget_and_is_never_exceeded(tmp_path: Path) -> None:
    recipe = write(tmp_path, RECIPE.replace("keep: 0.8", "target_params: 17000").replace("max_parameters: 20k", ""))
    build(recipe)
    shapes = Checkpoint.open(tmp_path / "r/small").tensors.values()
    count = sum(math.prod(place.shape) for place in shapes)
    assert 0.9 * 17000 < count <= 17000


def test_a_failed_export_keeps_the_model_and_other_exports_go_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutputError("Output: the disk is full.")

    recipe = write(tmp_path / "a", RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(building, "export", full)
        with pytest.raises(OutputError, match="disk is full"):
            build(recipe)
    assert not recipe.with_suffix("").exists() and (tmp_path / "a/.r.build").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(fast, "minify", None)
        build(recipe)
    assert contents(recipe.with_suffix("")) == contents(built.with_suffix(""))
    assert not (tmp_path / "a/.r.build").exists()
    # Of another model nothing is taken over.
    with monkeypatch.context() as patch:
        patch.setattr(building, "export", full)
        with pytest.raises(OutputError):
            build(recipe, tmp_path / "b")
        write(tmp_path / "a", RECIPE.replace("keep: 0.8", "keep: 0.7"))
        patch.setattr(fast, "minify", lambda *_, **__: full())
        with pytest.raises(OutputError):
            build(recipe, tmp_path / "b")
    assert list((tmp_path / ".b.build/parts").iterdir()) == []


def test_two_builds_of_one_output_do_not_meet(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    (tmp_path / ".r.build").mkdir()
    descriptor = os.open(tmp_path / ".r.build", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another process builds there"):
        build(recipe)
    os.close(descriptor)
    assert not build(recipe).unchanged


def test_the_command_prints_a_schema_or_wants_a_recipe() -> None:
    schema = CliRunner().invoke(app, ["build", "--schema"])
    assert schema.exit_code == 0 and json.loads(schema.stdout)["title"] == "Recipe"
    assert CliRunner().invoke(app, ["build"]).exit_code == 2
