"""Reading a Hugging Face checkpoint folder tensor by tensor. Safetensors only: nothing in the folder is executed.

Names: a *tensor name* is a parameter's name in the transformers model; a *stored name* is what the file calls it (old
GPT-2 and OPT checkpoints leave out the base model's prefix).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from minisp.errors import CheckpointError, UnsupportedModelError, one_line
from minisp.store.files import Piece, read_pieces, tensor_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

FLOATING = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = FLOATING | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The element types that are read and written, as safetensors spells them; parameters are floating-point ones."""
DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}

# Elements whose float32 copies a check holds at once.
CHECKED_AT_ONCE = 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file name inside the folder, first byte in it, shape, and element type as safetensors
    spells it."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_rows(self) -> int:
        """Length of the first axis; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def num_bytes(self) -> int:
        """Size of the raw data."""
        return math.prod(self.shape) * DTYPE_OF[self.dtype].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config and the table of its tensors; weights are read on demand.

    Attributes:
        folder: where the files are.
        config: the transformers config.
        raw_config: config.json as it stands.
        tensors: stored name → place.
    """

    folder: Path
    config: PretrainedConfig
    raw_config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read config, index and shard headers; no weights yet.

        Raises:
            CheckpointError: no folder, no config, pickled weights, a bad index, a missing or truncated shard.
            UnsupportedModelError: quantised weights, unusual element types, or a family unknown to transformers.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"Checkpoint: expected a folder, got {folder}. Check the path.")
        raw_config = _read_json(folder / "config.json")
        if not isinstance(raw_config.get("model_type"), str):
            raise CheckpointError(
                f"{folder}/config.json: expected a key model_type with the family's name, got "
                f"{raw_config.get('model_type')!r}. Not a transformers config."
            )
        if quantization := raw_config.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedModelError(
                f"{folder}: expected plain floating-point weights, got quantised ones ({method}). "
                "Dequantise the checkpoint first."
            )
        tensors: dict[str, StoredTensor] = {}
        for file in _shards(folder):
            tensors.update(_read_header(folder, file))
        _check_index(folder, tensors)
        return cls(folder, _read_config(folder, raw_config["model_type"]), raw_config, tensors)

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.folder / file).stat().st_size for file in {place.file for place in self.tensors.values()})

    def stored_name(self, name: str, prefix: str) -> str:
        """The stored name of a model's tensor `name`, whose base model sits under `prefix`.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        # GPT-NeoX stores its head under the name that it had before transformers 5.
        older = name.replace("lm_head.", "embed_out.")
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", older):
            if candidate in self.tensors:
                return candidate
        raise CheckpointError(
            f"{self.folder}: expected a tensor {name}, found none among {len(self.tensors)} tensors. "
            "The checkpoint is incomplete or its config.json belongs to another model."
        )

    def read(self, stored_names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (stored name, tensor) in the stored dtype, on the CPU, in the order in which they lie in the files.

        Raises:
            CheckpointError: a tensor cannot be read, or holds NaN or infinity.
        """
        for name in sorted(stored_names, key=lambda name: (self.tensors[name].file, self.tensors[name].offset)):
            tensor = torch.empty(self.tensors[name].shape, dtype=DTYPE_OF[self.tensors[name].dtype])
            self.read_into({name: tensor})
            self.check_finite(name, tensor)
            yield name, tensor

    def read_into(self, destinations: Mapping[str, Tensor]) -> None:
        """Fill contiguous CPU tensors of the stored shapes and dtypes; neighbours in a file share a system call.

        Nothing is mapped, so that what was read does not count as this process's memory twice.

        Raises:
            CheckpointError: a file cannot be read or is shorter than it was.
        """
        self.read_parts([(name, 0, tensor_bytes(tensor)) for name, tensor in destinations.items()])

    def read_parts(self, parts: Iterable[tuple[str, int, memoryview]]) -> None:
        """Fill memory with raw data: of which stored tensor, from which of its bytes on, where to; as `read_into`."""
        by_file: dict[str, list[Piece]] = {}
        for name, start, memory in parts:
            by_file.setdefault(self.tensors[name].file, []).append((self.tensors[name].offset + start, memory))
        for file, pieces in by_file.items():
            self._fill(file, sorted(pieces, key=lambda piece: piece[0]))

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a stored tensor, in ascending order, in the stored dtype.

        Raises:
            CheckpointError: they cannot be read, or hold NaN or infinity.
        """
        place = self.tensors[name]
        found = torch.empty((len(rows), *place.shape[1:]), dtype=DTYPE_OF[place.dtype])
        size, memory = place.num_bytes // place.num_rows, tensor_bytes(found)
        pieces = [(place.offset + row * size, memory[i * size : (i + 1) * size]) for i, row in enumerate(rows)]
        self._fill(place.file, pieces)
        self.check_finite(name, found)
        return found

    def _fill(self, file: str, pieces: Sequence[Piece]) -> None:
        try:
            read_pieces(self.folder / file, pieces)
        except OSError as error:
            raise CheckpointError(f"{self.folder}/{file}: cannot be read ({error}). Download it again.") from error

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Raise `CheckpointError` where what was read of a tensor holds NaN or infinity."""
        # One cheap pass in small pieces: a sum is finite unless a term is not, or, for huge finite values, overflows.
        sums = [piece.sum(dtype=torch.float32) for piece in tensor.view(-1).split(CHECKED_AT_ONCE)]
        if not tensor.is_floating_point() or all(torch.isfinite(total) for total in sums):
            return
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise CheckpointError(
                f"{self.folder.name}/{self.tensors[name].file}: tensor {name}: expected finite values, got {bad} NaN "
                f"or infinite of {tensor.numel()}. The checkpoint is damaged or training diverged; repair it first."
            )

    def modified(self) -> list[int]:
        """When each weight file was last changed, in nanoseconds: on one machine, another value means other weights."""
        return [(self.folder / file).stat().st_mtime_ns for file in sorted({t.file for t in self.tensors.values()})]

    def fingerprint(self) -> str:
        """SHA-256 over the config and every tensor's name, place, shape, dtype and file size (not its values)."""
        sizes = {file: (self.folder / file).stat().st_size for file in sorted({t.file for t in self.tensors.values()})}
        table = [(name, t.file, t.offset, t.shape, t.dtype) for name, t in sorted(self.tensors.items())]
        return hashlib.sha256(json.dumps([self.raw_config, sizes, table]).encode()).hexdigest()


def _shards(folder: Path) -> list[str]:
    """Names of the weight files, from the index where there is one."""
    if (folder / INDEX_NAME).is_file():
        weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
            raise CheckpointError(
                f"{folder}/{INDEX_NAME}: expected weight_map from tensor to file name. Fix the index."
            )
        files = sorted(set(weight_map.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder}/{INDEX_NAME}: expected names of .safetensors files inside the folder, got {file!r}. "
                    "Do not trust this checkpoint."
                )
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder}: expected the shard {file} that the index names, found none.")
        return files
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    hint = (
        f"found pickled weights ({', '.join(pickles[:3])}), which can run code when loaded: convert them to safetensors"
        if pickles
        else "found no weights: check the path or download the model"
    )
    raise CheckpointError(f"{folder}: expected {SINGLE_NAME} or {INDEX_NAME}, {hint}.")


def _read_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    try:
        with safe_open(folder / file, framework="pt") as handle:
            names = set(handle.keys())
        # The package has checked the header: it fits the file, and no tensor reaches beyond it or into another.
        with open(folder / file, "rb") as plain:
            size = int.from_bytes(plain.read(8), "little")
            header = json.loads(plain.read(size))
        tensors = {
            name: StoredTensor(file, 8 + size + row["data_offsets"][0], tuple(row["shape"]), row["dtype"])
            for name, row in header.items()
            if name in names
        }
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/{file}: expected a complete safetensors file, got {error}. It is truncated or damaged: "
            "download it again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise UnsupportedModelError(
                f"{folder}/{file}: tensor {name}: expected an element type among {', '.join(DTYPES.values())}, got "
                f"{tensor.dtype}. Convert the checkpoint to plain floating-point weights first."
            )
    return tensors


def _check_index(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    if not (folder / INDEX_NAME).is_file():
        return
    for name, file in _read_json(folder / INDEX_NAME)["weight_map"].items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder}/{INDEX_NAME}: expected tensor {name} in {file}, found it "
                f"{'in ' + tensors[name].file if name in tensors else 'nowhere'}. The index and the shards disagree."
            )


def _read_config(folder: Path, model_type: str) -> PretrainedConfig:
    if model_type not in CONFIG_MAPPING:
        known = f"a model type that transformers {transformers.__version__} knows"
        remedy = "Update transformers, or pass a model of another family."
        raise UnsupportedModelError(f"{folder}/config.json: expected {known}, got {model_type!r}. {remedy}")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{folder}/config.json: expected what transformers can read, got: {one_line(error)} Correct it, or "
            "download it again."
        ) from error
    # A checkpoint does not choose what runs: this key may name a repository of kernels, which transformers would fetch.
    config._attn_implementation = None
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        says = f"{path.parent}: expected {path.name}, found none. Not a transformers checkpoint."
        raise CheckpointError(says) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected valid JSON, got {error}. The file is damaged.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}. The file is damaged.")
    return value
