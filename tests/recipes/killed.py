"""Builds that are killed at random moments, each of them started again; run as a program:

python killed.py RECIPE PARENT KILLS    prints {"killed": [...], "same": [...]}; build k writes to PARENT/k

Every build is a process of its own, which dies by SIGKILL after a random share of the time that a whole build takes;
`killed` says after how many seconds, and `same` whether the second build ended with the bytes of one that nobody
disturbed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

import torch

from minisp.recipes.build import build
from minisp.report.figures import plot_layers  # noqa: F401  # What every child would otherwise import anew.
from minisp.store.hub import load_tokenizer


def main(recipe: Path, parent: Path, kills: int) -> None:
    """Kill and continue, again and again."""
    torch.set_num_threads(1)
    # Nothing is computed before the forks: a child inherits no threads.
    load_tokenizer(recipe.parent / "llama")
    began = time.monotonic()
    assert not _dies(recipe, parent / "whole", None)
    whole = time.monotonic() - began
    wanted = _contents(parent / "whole")
    moments = random.Random(0)
    killed, same = [], []
    while len(killed) < kills:
        out, delay = parent / str(len(killed)), whole * moments.random()
        if _dies(recipe, out, delay):
            killed.append(delay)
            assert not _dies(recipe, out, None)
            same.append(_contents(out) == wanted and not out.with_name(f".{out.name}.build").exists())
        shutil.rmtree(out)
    print(json.dumps({"killed": killed, "same": same}))


def _dies(recipe: Path, out: Path, delay: float | None) -> bool:
    """Build in a process of its own; whether it was killed, after so many seconds, before it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            build(recipe, out)
            status = 0
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"a build failed by itself ({status})"
    return os.WIFSIGNALED(status)


def _contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
