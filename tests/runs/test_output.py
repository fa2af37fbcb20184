"""Whatever happens while a result is written, nothing stands at the output path but a complete checkpoint."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import minisp
from minisp import fast
from minisp.cli.app import app
from minisp.errors import CheckpointError, OutputError
from minisp.export import folder as folder_module
from minisp.export.tensors import module_entries
from minisp.store.checkpoint import Checkpoint
from minisp.store.writer import INDEX_NAME, MANIFEST_NAME, MARKER, output_folder, write_tensors
from tests import faults
from tests.damage import assert_refused
from tests.tiny import save_checkpoint, tiny_model

PLAIN = {"window": 32, "num_windows": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_model("llama"))


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, bytes]]:
    """The steps of an undisturbed run, and the files that it writes."""
    out = tmp_path_factory.mktemp("clean") / "out"
    names = faults.run(source, out, lambda number, name: None)
    return names, contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def full_disk() -> Exception:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link", "device"])
def test_an_output_path_that_is_taken_is_refused_and_left_alone(
    kind: str, source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    if kind == "folder":
        out.mkdir()
        (out / "precious").write_text("data")
    elif kind == "file":
        out.write_text("data")
    elif kind == "device":
        out = Path("/dev/null")
    else:
        out.symlink_to(tmp_path / ("empty" if kind == "link" else "missing"))
    got = {"folder": "one with content", "file": "a file", "device": "a file"}.get(kind, "a symbolic link")
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    with pytest.raises(OutputError, match=f"expected a new or empty folder, got {got}. Choose another path"):
        fast.minify(source, out=out, calibration=text, **PLAIN)
    command = ["minify", str(source), "--out", str(out), "-c", str(text), "--window", "32"]
    assert CliRunner().invoke(app, command).exit_code == OutputError.exit_code
    assert {path: path.lstat().st_mtime for path in tmp_path.rglob("*")} == {p: s.st_mtime for p, s in before.items()}


@pytest.mark.parametrize("name", ["file/out", "x" * 300, "x" * 250, "nul\0byte"])
def test_an_output_path_that_cannot_be_made_is_refused(name: str, source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("data")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"no (scratch )?folder can be made"):
        fast.minify(source, out=tmp_path / name, calibration=text, **PLAIN)
    assert sorted(tmp_path.iterdir()) == before


def test_a_parent_that_cannot_be_written_is_refused(
    source: Path, text: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever runs the tests may be allowed to write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_refused(source, text, OutputError, r"expected a writable parent folder, got .*Choose another", there)


def test_a_disk_that_is_too_small_is_refused_before_the_sweep(
    source: Path, text: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    monkeypatch.setattr(fast, "saliency_sweep", None)
    assert_refused(source, text, OutputError, r"expected .* of free disk, got .*Free some space", there)


def test_an_empty_folder_is_filled_and_an_old_partial_one_replaced(
    source: Path, there: Path, clean: tuple[list[str], dict[str, bytes]]
) -> None:
    (there / "out").mkdir()
    (there / "out.partial").mkdir()
    for name in ("model.safetensors", MARKER):
        (there / "out.partial" / name).write_text("from a run that was killed")
    faults.run(source, there / "out", lambda number, name: None)
    assert contents(there / "out") == clean[1]
    assert list(there.iterdir()) == [there / "out"]


def test_what_someone_else_keeps_under_the_partial_name_is_refused(source: Path, there: Path) -> None:
    (there / "out.partial").mkdir()
    (there / "out.partial" / "thesis.txt").write_text("words")
    with pytest.raises(OutputError, match=r"got something of that name that no earlier run left behind"):
        fast.minify(source, out=there / "out", calibration=faults.WINDOWS, **PLAIN)
    assert (there / "out.partial" / "thesis.txt").read_text() == "words"


def test_two_runs_cannot_write_one_output(there: Path) -> None:
    with output_folder(there / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(OutputError, match="but another run does"), output_folder(there / "out"):
            pass
    assert contents(there / "out") == {"file": b"first"}


def test_a_disk_that_fills_up_at_any_step_leaves_what_a_resumed_run_ends_with(
    source: Path, tmp_path: Path, clean: tuple[list[str], dict[str, bytes]]
) -> None:
    names, files = clean
    kinds = {
        "scratch folder",
        "identity",
        "record",
        "waiting tensor",
        "output folder",
        "tensor",
        "text",
        "copy",
        "rename",
    }
    assert kinds <= set(names)
    # The last step makes the name of the finished folder durable; there is nothing to undo there.
    struck = faults.first_and_last(names)[:-1]
    assert len(struck) >= 10
    for deadly in struck:
        there = tmp_path / str(deadly)
        there.mkdir()

        def strike(number: int, name: str, deadly: int = deadly) -> None:
            if number == deadly:
                raise full_disk()

        with pytest.raises(OutputError, match=r"the disk is full|No space left"):
            faults.run(source, there / "out", strike)
        assert {path.name for path in there.iterdir()} <= {".out.scratch"}, names[deadly]
        faults.run(source, there / "out", lambda number, name: None, resume=True)
        assert contents(there / "out") == files, names[deadly]
        assert list(there.iterdir()) == [there / "out"]


def test_a_module_in_memory_leaves_nothing_on_a_full_disk(there: Path) -> None:
    def strike(number: int, name: str) -> None:
        if name == "tensor":
            raise full_disk()

    with faults.steps(strike), pytest.raises(OutputError, match="the disk is full"):
        fast.minify(tiny_model("llama"), out=there / "out", calibration=faults.WINDOWS, window=32, num_windows=4)
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("kind", ["checkpoint", "module"])
def test_the_manifest_has_the_digest_of_every_file_and_no_weight_is_read_again(
    kind: str, source: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    hashing = folder_module.sha256
    monkeypatch.setattr(folder_module, "sha256", lambda path: read.append(path.name) or hashing(path))
    model = source if kind == "checkpoint" else tiny_model("llama")
    fast.minify(model, out=there / "out", calibration=faults.WINDOWS, window=32, num_windows=4, dtype="float32")
    files = contents(there / "out")
    manifest = json.loads(files.pop(MANIFEST_NAME))
    assert manifest["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert "config.json" in read and not [name for name in read if name.endswith(".safetensors")]


def test_digests_are_those_of_every_shard_whatever_the_pieces(there: Path) -> None:
    tensors = [(name, torch.rand(rows, 8)) for name, rows in (("a", 5), ("b", 0), ("c", 7), ("d", 1))]
    pieces = [(name, part) for name, tensor in tensors for part in tensor.split(2)]
    digests = write_tensors(there, module_entries(tensors), pieces, max_shard_bytes=200)
    files = contents(there)
    del files[INDEX_NAME]
    assert len(files) > 1
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block, the operating system itself refuses to let any file of this process grow beyond `size`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "where"), [(6_000, "Scratch folder"), (40_000, "could not be written")])
def test_real_writes_that_fail_can_be_resumed(
    size: int, where: str, source: Path, there: Path, clean: tuple[list[str], dict[str, bytes]]
) -> None:
    # Gram matrices of 48 × 48 float32 exceed the first limit, the weights the second.
    with largest_file(size), pytest.raises(OutputError, match=rf"{where}.*File too large"):
        fast.minify(source, out=there / "out", calibration=faults.WINDOWS, **faults.OPTIONS)
    assert not (there / "out").exists()
    faults.run(source, there / "out", lambda number, name: None, resume=True)
    assert contents(there / "out") == clean[1]


@pytest.mark.parametrize("phase", ["forward", "saliency", "refit sweep"])
def test_an_interrupted_run_can_be_resumed(
    phase: str, source: Path, there: Path, clean: tuple[list[str], dict[str, bytes]]
) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name.startswith(phase):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast.minify(source, out=there / "out", calibration=faults.WINDOWS, progress=interrupt, **faults.OPTIONS)
    assert [path.name for path in there.iterdir()] == [".out.scratch"]
    with pytest.raises(OutputError, match=r"got what an earlier run left\. Continue that run by --resume"):
        fast.minify(source, out=there / "out", calibration=faults.WINDOWS, **faults.OPTIONS)
    faults.run(source, there / "out", lambda number, name: None, resume=True)
    assert contents(there / "out") == clean[1]


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_loads_and_can_be_resumed(
    source: Path, tmp_path: Path, clean: tuple[list[str], dict[str, bytes]]
) -> None:
    names, files = clean
    program = f"import runpy; runpy.run_path({faults.__file__!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(Path(minisp.__file__).parents[1])}
    command = [sys.executable, "-c", program, str(source), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == names
    assert result["killed"] == faults.first_and_last(names)

    for step in result["killed"]:
        out = tmp_path / str(step) / "out"
        if step > names.index("rename"):
            assert contents(out) == files
            continue
        assert not out.exists(), names[step]
        with pytest.raises(CheckpointError):
            Checkpoint.open(out)
        with pytest.raises(OSError, match="out"):
            AutoModelForCausalLM.from_pretrained(out)
        faults.run(source, out, lambda number, name: None, resume=True)
        assert contents(out) == files, names[step]
        assert list(out.parent.iterdir()) == [out]
