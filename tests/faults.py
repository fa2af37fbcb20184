"""Disks that fill up and processes that die at a chosen step of writing, for tests of what is left behind.

Run as a program, it minifies a checkpoint again and again, each time in a process that kills itself at another step:
    python faults.py SOURCE PARENT    prints {"steps": [...], "killed": [...]}; run k writes to PARENT/k/out
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from minisp import fast
from minisp.export import folder
from minisp.store import records, writer
from minisp.store.files import tensor_bytes
from minisp.store.hub import load_tokenizer

# 4 windows of 32 tokens that hold every token of a vocabulary of 64; one layer at a time, as for a large model.
WINDOWS = torch.arange(128).reshape(4, 32) * 37 % 64
OPTIONS: dict[str, Any] = {"window": 32, "num_windows": 4, "dtype": "float32", "segment": 1, "keep": 0.6}


@contextmanager
def steps(strike: Callable[[int, str], None]) -> Iterator[list[str]]:
    """Within the block, `strike(number, name)` is called at every step of writing a checkpoint; yields their names.

    A strike comes before its step, but for tensors: there half of the bytes are in the file already. Steps of the
    writing threads are numbered as they come.
    """
    happened: list[str] = []

    def step(name: str) -> None:
        happened.append(name)
        strike(len(happened) - 1, name)

    def before(name: str, function: Any, concerns: Callable[..., bool] = lambda *_, **__: True) -> Any:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            if concerns(*args, **kwargs):
                step(name)
            return function(*args, **kwargs)

        return stepping

    def halving(function: Any, name: str) -> Any:
        """Writes the first half of a tensor's bytes, strikes, and writes it all."""

        def stepping(handle: Any, tensor: Any) -> Any:
            place = handle.tell()
            handle.write(tensor_bytes(tensor.contiguous())[: tensor.nbytes // 2])
            handle.flush()
            step(name)
            handle.seek(place)
            return function(handle, tensor)

        return stepping

    def in_output(path: Any, *_: Any, **__: Any) -> bool:
        return ".partial" in str(path)

    def in_scratch(path: Any, *_: Any, **__: Any) -> bool:
        return ".scratch" in str(path)

    text = before("text", Path.write_text, in_output)
    replacements = [
        (Path, "mkdir", before("output folder", before("scratch folder", Path.mkdir, in_scratch), in_output)),
        (Path, "write_text", before("identity", text, in_scratch)),
        (os, "rename", before("rename", before("record", os.rename, in_scratch), in_output)),
        (records, "write_tensor", halving(records.write_tensor, "waiting tensor")),
        (writer, "write_tensor", halving(writer.write_tensor, "tensor")),
        (shutil, "copyfile", before("copy", shutil.copyfile)),
        (writer, "_sync", before("sync", writer._sync)),
        # Drawing takes longer than everything else here; to the disk it is a file like any other.
        (folder, "plot_layers", lambda report, path: path.write_text("a picture")),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(patch.object(owner, name, replacement))
        yield happened


def first_and_last(names: list[str]) -> list[int]:
    """Of every kind of step the first and the last one."""
    return sorted({place for name in names for place in (names.index(name), len(names) - 1 - names[::-1].index(name))})


def run(source: Path, out: Path, strike: Callable[[int, str], None], **options: Any) -> list[str]:
    """Minify `source` into `out`, struck as `steps` says."""
    with steps(strike) as happened:
        fast.minify(source, out=out, calibration=WINDOWS, **OPTIONS, **options)
    return happened


def _main(source: Path, parent: Path) -> None:
    torch.set_num_threads(1)
    # What every child would otherwise import anew. Nothing is computed before the forks: a child inherits no threads.
    fast.plan(source, **OPTIONS)
    load_tokenizer(source)
    names = _in_child(source, parent / "clean" / "out", None)
    killed = [place for place in first_and_last(names) if _in_child(source, parent / str(place) / "out", place) is None]
    print(json.dumps({"steps": names, "killed": killed}))


def _in_child(source: Path, out: Path, deadly: int | None) -> Any:
    """The steps of a run in a process of its own; None if the process was killed at the deadly one."""

    def strike(number: int, name: str) -> None:
        if number == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    out.parent.mkdir(parents=True)
    record = out.parent.with_suffix(".steps")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            record.write_text(json.dumps(run(source, out, strike)))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    return json.loads(record.read_text())


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
