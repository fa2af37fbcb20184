"""Writing a checkpoint folder: shards one tensor at a time, and a folder that appears only when it is complete.

Shapes are known before the first tensor is computed, so each shard's header is written first and the tensors follow
as they come: the memory needed is one tensor, whatever the size of the model.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, raw data).
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from minisp.errors import OutputError
from minisp.store.checkpoint import DTYPES, INDEX_NAME, SINGLE_NAME
from minisp.store.files import BesideDigest, WriteBehind, write_tensor

# What tells a folder that is being written from one that happens to have its name; and the file that is written last.
MARKER, MANIFEST_NAME = ".minisp-partial", "minisp.json"
MAX_SHARD_BYTES = 5 * 10**9
# Bytes of a large tensor that are in memory at once where it is only copied.
PIECE_BYTES = 32 * 2**20

ELEMENT_BYTES = {code: dtype.itemsize for dtype, code in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor that will be written: name, shape, element type as safetensors spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the raw data."""
        size = ELEMENT_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


def check_output(out: str | Path, needed_bytes: int, *, is_file: bool = False) -> Path:
    """The output path, once it is sure that a folder of `needed_bytes`, or a file, can be made there.

    Raises:
        OutputError: the path is a file or a folder with something in it (for a file: anything at all), its parent
            cannot be written, or the disk has less room than needed.
    """
    if not isinstance(out, (str, Path)):
        raise OutputError(f"Output: expected a path, got {type(out).__name__} {out!r}. Pass a string.")
    path = Path(out).expanduser().absolute()
    parent = path.parent
    try:
        found = _found_at(path)
        if is_file and found is None and path.is_dir():
            found = "an empty folder"
        partial = _partial(path)
        foreign = partial.is_symlink() or (partial.exists() and not _is_leftover(partial))
        parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"Output {path}: no folder can be made there ({error}). Choose another path.") from error
    if foreign:
        raise OutputError(
            f"Output {path}: expected to use {partial.name} beside it until it is complete, got something of that name "
            "that no earlier run left behind. Move it away or choose another path."
        )
    if found is not None:
        wanted = "a new file" if is_file else "a new or empty folder"
        raise OutputError(f"Output {path}: expected {wanted}, got {found}. Choose another path.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"Output {path}: expected a writable parent folder, got {parent}. Choose another path.")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"Output {path}: expected {needed_bytes / 1e9:.3f} GB of free disk, got {free / 1e9:.3f} GB. "
            "Free some space or choose another disk."
        )
    return path


@contextmanager
def output_folder(out: Path, *, remedy: str = "run again with --resume") -> Iterator[Path]:
    """A folder to write into, `NAME.partial`, renamed to `out` when the block ends well and removed when it does not.

    Args:
        remedy: what a failure's message tells the user to do once its cause is mended.

    Raises:
        OutputError: writing failed (disk full, permissions); nothing is left at `out`.
    """
    partial = _partial(out)
    with _told(out, remedy):
        with _claimed(partial):
            yield partial
            for path in partial.iterdir():
                _sync(path)
            _sync(partial)
            (partial / MARKER).unlink()
            os.rename(partial, out)
        # The folder stands and its files are durable; not every file system can promise as much for its name.
        with suppress(OSError):
            _sync(out.parent)


def publish(folder: Path, out: Path) -> None:
    """Let a folder, whose own folders are durable, appear at `out` at once.

    Raises:
        OutputError: something is at `out`, or it cannot be written; `folder` is then left as it was.
    """
    with _told(out, "run again"):
        for path in folder.iterdir():
            _sync(path)
        _sync(folder)
        os.rename(folder, out)
    with suppress(OSError):
        _sync(out.parent)


@contextmanager
def output_file(out: Path) -> Iterator[Path]:
    """A path to write a file to, in a folder `NAME.partial`, renamed to `out` when the block ends well.

    Raises:
        OutputError: writing failed (disk full, permissions); nothing is left at `out`.
    """
    partial = _partial(out)
    with _told(out, "run again"):
        with _claimed(partial):
            yield partial / out.name
            _sync(partial / out.name)
            os.rename(partial / out.name, out)
        with suppress(OSError):
            _sync(out.parent)


@contextmanager
def _told(out: Path, remedy: str) -> Iterator[None]:
    """Failures of the file system become an error that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "the disk is full" if full else error
        first = "Free some space or choose another disk" if full else "Mend that or choose another folder"
        raise OutputError(
            f"Output {out}: it could not be written: {cause}. Nothing was left there. {first}, and {remedy}."
        ) from error


def write_tensors(
    folder: Path, entries: list[Entry], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Write `tensors`, which come in the order of `entries`, as safetensors shards (and an index for more than one).

    A tensor may come in pieces of its rows. Writing happens behind the making of the next ones.

    Returns:
        File name of each shard → SHA-256 of the file in hexadecimal digits. The bytes of a file come in their order,
        its header first, so the digest grows with it and no file is read again.
    """
    shards = _split(entries, max_shard_bytes)
    names = [SINGLE_NAME] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    digests: dict[str, str] = {}
    stream = ((name, tensor) for name, tensor in tensors if tensor.numel())
    for file, shard in zip(names, shards, strict=True):
        with open(folder / file, "wb") as handle, BesideDigest() as digest, WriteBehind() as behind:
            header = _header(shard)
            handle.write(header)
            digest.update(header)
            for entry in shard:
                missing = entry.num_bytes
                while missing > 0:
                    name, tensor = next(stream)
                    assert (name, DTYPES[tensor.dtype]) == (entry.name, entry.dtype), f"expected {entry}, got {name}"
                    missing -= tensor.nbytes
                    behind.submit(_write_hashed, handle, digest, tensor)
                assert missing == 0, f"expected {entry}, got {-missing} bytes more"
            behind.settle()
            digests[file] = digest.hexdigest()
    assert next(stream, None) is None, "more tensors than entries"
    if len(shards) > 1:
        weight_map = {entry.name: file for file, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def _write_hashed(handle: IO[bytes], digest: BesideDigest, tensor: Tensor) -> None:
    digest.update(write_tensor(handle, tensor))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def publish_json(path: Path, value: Any) -> None:
    """Write JSON that is whole wherever it is there at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    write_json(unfinished, value)
    os.rename(unfinished, path)


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or it is no JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """The folder within the block, empty but for a mark of its kind, and nobody else's: a lock that dies with us."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"Output folder {partial}: expected to be the only one that writes there, but another run does. Wait "
                "for it, or choose another output."
            ) from None
        for path in partial.iterdir():
            path.unlink()
        (partial / MARKER).touch()
        try:
            yield
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(descriptor)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _is_leftover(folder: Path) -> bool:
    """Whether a run that was killed left this folder: its mark is there, or the manifest that is written last."""
    return folder.is_dir() and any((folder / name).is_file() for name in (MARKER, MANIFEST_NAME))


def _found_at(path: Path) -> str | None:
    """What stands in the way of a folder at `path`; None where a folder can be renamed to it."""
    try:
        path.lstat()
    except FileNotFoundError:
        return None
    if path.is_symlink():
        return "a symbolic link"
    if path.is_dir():
        return "one with content" if any(path.iterdir()) else None
    return "a file"


def _split(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _header(entries: list[Entry]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    # Readers map the file: data that starts at a multiple of 8 bytes is aligned for every element type.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
