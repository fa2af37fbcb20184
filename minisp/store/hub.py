"""From what the user names to a folder on disk: a folder, a GGUF file, or a hub id. No code of a model is ever run."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisp.errors import CalibrationError, CheckpointError, one_line
from minisp.store.files import publish_folder, sha256

# What a download needs: weights that cannot run code, configuration, tokenizer.
PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def local_folder(model: str | Path) -> Path:
    """The checkpoint folder of a folder, a GGUF file (converted once, kept in the cache) or a hub id (downloaded).

    Raises:
        CheckpointError: nothing of that name, or it cannot be fetched or converted.
    """
    if not isinstance(model, (str, Path)):
        raise CheckpointError(
            f"Model: expected a folder, a .gguf file, a hub id or a transformers model, got {type(model).__name__}. "
            "Pass one of them."
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.suffix == ".gguf":
        return _converted(path)
    name = str(model)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.exists():
        raise CheckpointError(
            f"Model: expected a checkpoint folder, a .gguf file or a hub id, got {name}. Check the path."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"Model: expected a checkpoint folder, a .gguf file or a hub id, got {name}: there is no such folder here, "
            f"and the hub did not provide it ({reason}). Check the name and the connection."
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none.

    Raises:
        CalibrationError: there is one, and transformers cannot load it without running code.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CalibrationError(
            f"{folder}: transformers cannot load its tokenizer: {one_line(error)} Pass tokens instead."
        ) from error


def cache_folder() -> Path:
    """Where converted models are kept: $MINISP_CACHE, or minisp/ in the user's cache folder."""
    named = os.environ.get("MINISP_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/minisp"
    return Path(named).expanduser()


def convert_gguf(path: Path, folder: Path) -> Path:
    """Dequantise a GGUF file into a new checkpoint folder (bfloat16 safetensors and tokenizer); whole model in memory.

    The folder appears only when it is complete; where another process made it meanwhile, that one is taken.

    Raises:
        CheckpointError: transformers cannot read the file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as name:
        partial = Path(name) / folder.name
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:
            raise CheckpointError(
                f"{path}: transformers cannot read this GGUF file: {one_line(error)} It needs `pip install gguf`, a "
                "complete file, and a family that transformers can dequantise."
            ) from error
        # transformers refuses to save a model that remembers having been quantised; these weights no longer are.
        for attribute in ("hf_quantizer", "quantization_method"):
            model.__dict__.pop(attribute, None)
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        publish_folder(partial, folder)
    return folder


def _converted(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"Model: expected a GGUF file, found none at {path}. Check the path.")
    folder = cache_folder() / f"{path.stem}-{sha256(path)[:12]}"
    return folder if folder.is_dir() else convert_gguf(path, folder)
