"""An environment of its own for every peer of peers.py, below ~/.cache/minisp/peers, built once per list of packages.

Looked at and not in the table, because they cannot take part (versions are those that were looked at):

- nvidia-modelopt 0.47.0: `prune` knows FastNAS, for vision models, and Minitron, for Megatron-Core models; puzzletron
  is a search for Llama 3.1 on GPUs, which the package calls a proof of concept.
- llmcompressor 0.14.0.1: SparseGPT, Wanda and magnitude set weights to zero, no matrix gets smaller; REAP drops
  experts.
- neural-compressor 3.10 quantises; angelslim 0.5.0 quantises and makes attention sparse: neither cuts an MLP.
- torch-kirigami 0.2.1: its Taylor score is that of Torch-Pruning; its OSSCAR is an example for vision models.
- lobotomizer 0.2.0: row norms of weights, for chains of linear maps, which a gated MLP is not.
- tinyedgellm 0.1.0: heads of GPT-2 by random scores; units are set to zero. ptblop 0.4.0: whole blocks, chosen by hand.
- SliceGPT and LLM-Pruner are repositories without a package.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import harness

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
COMMON = ("-c", str(CONSTRAINTS), "torch", "transformers", "accelerate", "safetensors")

# Environment → the arguments of every `pip install`, one after the other. minisp's peers run beside the same torch and
# transformers as minisp, where they can. fmchisel wants llm-compressor 0.5.1, which knows transformers 4 alone; its own
# upper limit on torch is passed over (--no-deps), so that all peers compute with the same torch.
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "optipfair": ((*COMMON, "optipfair==0.4.2"),),
    "torch-pruning": ((*COMMON, "torch-pruning==1.6.1"),),
    "fmchisel": (
        (
            *("torch==2.13.0", "transformers==4.52.4", "accelerate==1.15.0", "safetensors==0.8.0", "numpy==1.26.4"),
            *("datasets==4.0.0", "pydantic<3", "loguru<1", "pynvml", "pillow", "requests", "pyyaml"),
        ),
        ("--no-deps", "fmchisel==0.1.2", "llmcompressor==0.5.1", "compressed-tensors==0.9.4"),
    ),
}


def described(name: str) -> list[list[str]]:
    """What an environment is made of, without this checkout's place."""
    return [[word.replace(str(CONSTRAINTS), CONSTRAINTS.name) for word in step] for step in ENVIRONMENTS[name]]


def build(name: str, root: Path) -> Path:
    """The environment's interpreter, built below `root` unless it stands there already, from the same packages.

    Raises:
        SystemExit: pip did not find or install something; what is there is then unfinished and built anew next time.
    """
    folder = root / name
    python, stamp = folder / "bin/python", folder / "built_from.json"
    if stamp.exists() and json.loads(stamp.read_text("utf-8")) == described(name):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    steps = [[sys.executable, "-m", "venv", str(folder)]]
    # Without compiling ahead: most of what torch brings is never imported.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    steps += [[*pip, *step] for step in ENVIRONMENTS[name]]
    for step in steps:
        print(f"{name}: {' '.join(step[1:])}", flush=True)
        done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(step)} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    harness.write_whole(stamp, described(name))
    return python


def versions(python: Path) -> dict[str, str]:
    """Package → version of everything that an environment holds."""
    command = [str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    # pip warns on standard error of index folders that are not there.
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {package["name"]: package["version"] for package in json.loads(listed)}
