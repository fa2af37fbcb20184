"""How good checkpoints are damaged, and what it means that bad input is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from minisp import fast
from minisp.cli.app import app
from minisp.errors import MinispError

INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
OPTIONS: dict[str, Any] = {"window": 32, "num_windows": 4, "dtype": "float32"}

Change = Callable[[Path], object]
"""What is done to the folder of a good checkpoint of three shards."""


def config(**values: Any) -> Change:
    """Change config.json; `...` takes a key away."""

    def change(folder: Path) -> None:
        merged = json.loads((folder / "config.json").read_text()) | values
        kept = {key: value for key, value in merged.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def entry(name: str, shard: object) -> Change:
    """Change one entry of the index's map from tensor to shard."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return change


def tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor] | None) -> Change:
    """Replace a stored tensor by a function of itself, or take it away; a new name is added to the last shard."""

    def change(folder: Path) -> None:
        shard = json.loads((folder / INDEX).read_text())["weight_map"].get(name, SHARDS[-1])
        tensors = load_file(folder / shard)
        old = tensors.pop(name, torch.ones(4))
        if value is not None:
            tensors[name] = value(old)
        save_file(tensors, folder / shard, metadata={"format": "pt"})

    return change


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that copies a tensor with `value` as its first element."""
    return lambda old: torch.cat([torch.tensor([value]), old.flatten()[1:]]).view_as(old)


def file(name: str, content: str | bytes | Callable[[bytes], bytes] | None) -> Change:
    """Overwrite a file, or change it by a function of its bytes, or take it away."""

    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        elif callable(content):
            (folder / name).write_bytes(content((folder / name).read_bytes()))
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def only_pickles(folder: Path) -> None:
    """Leave no safetensors, only files that are named as pickled weights are."""
    for shard in SHARDS:
        (folder / shard).rename((folder / shard).with_suffix(".bin"))
    (folder / INDEX).unlink()


def assert_refused(folder: Path, text: Path, error: type[MinispError], says: str, there: Path, **options: Any) -> None:
    """The library raises exactly `error`, the command line exits with its code, and neither leaves anything behind.

    Args:
        folder: the checkpoint.
        text: what to calibrate on.
        error, says: class and message (a pattern in which a dot is any character).
        there: an empty folder to write to.
        **options: for `minify`, beside `OPTIONS`.
    """
    options = OPTIONS | options
    with pytest.raises(error, match=f"(?s){says}") as caught:
        fast.minify(folder, out=there / "out", calibration=text, **options)
    assert type(caught.value) is error
    assert list(there.iterdir()) == []

    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    command = ["minify", str(folder), "--out", str(there / "out"), "-c", str(text), *flags]
    # A terminal wide enough that no line of the message is broken.
    result = CliRunner().invoke(app, command, env={"COLUMNS": "2000"})
    assert result.exit_code == error.exit_code > 2
    assert result.stdout == ""
    assert error.__name__ in result.stderr and re.search(says, result.stderr, re.DOTALL)
    assert list(there.iterdir()) == []
