"""Where text comes from: files, JSONL, hub data sets, documents; for what every Python carries see `builtin`.

A corpus is read lazily and only from its start: `Corpus.prefix(n)` pulls no more text than it needs for n characters.
Nothing here knows tokens or models.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from minisp.errors import CalibrationError

DOCUMENT_SEPARATOR = "\n\n"
# The files of a folder that are texts.
TEXT_SUFFIXES = (".txt", ".jsonl")
JSONL_FIELDS = ("text", "content")
HUB_PREFIX = "hf:"

_READ_CHARACTERS = 1 << 16
_HUB_SPLITS = frozenset({"train", "validation", "valid", "dev", "test", "all"})
_WEIGHT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+|inf|nan)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass
class Corpus:
    """A named text that is read from the start, as far as it is asked for.

    Args:
        label: how messages name it.
        pieces: consecutive parts of the text, in order, of any length.
    """

    label: str
    pieces: Iterator[str]
    _read: str = field(default="", init=False)
    _exhausted: bool = field(default=False, init=False)

    def prefix(self, num_chars: int) -> tuple[str, bool]:
        """The first `num_chars` characters (fewer if there are no more), and whether that is the whole text."""
        parts, length = [self._read], len(self._read)
        while length <= num_chars and not self._exhausted:
            piece = next(self.pieces, None)
            if piece is None:
                self._exhausted = True
            else:
                parts.append(piece)
                length += len(piece)
        self._read = "".join(parts)
        return self._read[:num_chars], self._exhausted and length <= num_chars


def open_file(path: str | os.PathLike[str]) -> Corpus:
    """A UTF-8 text file as it is, or the documents of a `.jsonl` file (field `text`, else `content`).

    Raises:
        CalibrationError: at once if the path is not a readable file; while reading if the bytes are not UTF-8 or a
            JSONL line has neither field.
    """
    # os.path takes any string, also one that is too long or too strange for a path.
    if os.path.isdir(path):
        raise CalibrationError(f"Expected a text file, got the folder {path}. Name a .txt or .jsonl file inside it.")
    if not os.path.isfile(path):
        name = os.fspath(path)
        raise CalibrationError(
            f"Expected a text file, got {name[:80]!r}{'...' if len(name) > 80 else ''}, which is none. Check the path; "
            f"text itself is passed as a list of strings, a hub data set as {HUB_PREFIX}NAME."
        )
    file = Path(path)
    if file.suffix.lower() == ".jsonl":
        return Corpus(file.name, join_documents(_jsonl_documents(file)))
    return Corpus(file.name, _file_pieces(file))


def open_documents(documents: Iterable[str]) -> Corpus:
    """Documents joined by an empty line; CalibrationError while reading if one of them is not a string."""
    return Corpus("the given documents", join_documents(_checked_documents(documents)))


def open_hub(name: str) -> Corpus:
    """A hub data set, streamed: `hf:NAME[:CONFIG][:SPLIT]`, split `train` unless given.

    With one extra part, a customary split name (train, validation, test, ...) is the split, anything else the config.

    Raises:
        CalibrationError: malformed name, `datasets` not installed, or the data set cannot be opened.
    """
    parts = name.removeprefix(HUB_PREFIX).split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise CalibrationError(f"Expected {HUB_PREFIX}NAME[:CONFIG][:SPLIT], got {name!r}.")
    if len(parts) == 2 and parts[1] in _HUB_SPLITS:
        parts = [parts[0], "", parts[1]]
    repository, config, split = parts + ["", "train"][len(parts) - 1 :]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"Reading {name} needs the package `datasets`, which is not installed. Run `pip install datasets`, or pass "
            f"a text file."
        ) from error
    try:
        rows = load_dataset(repository, config or None, split=split, streaming=True)
    except Exception as error:  # whatever `datasets` raises: offline, unknown name, unknown config or split
        raise CalibrationError(
            f"Expected a hub data set at {name}, got {type(error).__name__}: {error} Check name, config, split and "
            f"network, or pass a text file."
        ) from error
    return Corpus(name, join_documents(_hub_documents(name, rows)))


def parse_source(text: str) -> tuple[str, float]:
    """Split the command line's `PATH[:WEIGHT]` into source and weight (1.0 if none is given).

    Only a trailing number is a weight, so `C:\\data.txt` and `hf:NAME:CONFIG:SPLIT` are left whole, and so is a path
    that exists as it stands. `hf:NAME:0.3` is a weight: a config that looks like a number needs its split written out.

    Raises:
        CalibrationError: empty source, or a weight that is not a finite positive number.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or not _WEIGHT.fullmatch(tail) or os.path.isfile(text):
        head, weight = text, 1.0
    else:
        weight = float(tail)
    if not head.strip() or head in (HUB_PREFIX, HUB_PREFIX.rstrip(":")):
        raise CalibrationError(f"Expected PATH, PATH:WEIGHT or {HUB_PREFIX}NAME, got {text!r}. Name a text source.")
    if not 0 < weight < float("inf"):
        raise CalibrationError(f"Expected a finite weight above 0 after the last colon, got {text!r}.")
    return head, weight


def load_text(path: str | os.PathLike[str]) -> str:
    """The whole text of a file, read as `open_file` reads it; CalibrationError also if it holds no text."""
    text = "".join(open_file(path).pieces)
    if not text.strip():
        raise CalibrationError(f"Expected text in {path}, got an empty file. Name a file with text in it.")
    return text


def load_texts(paths: Sequence[Path], taken: Collection[str] = ()) -> dict[str, str]:
    """The whole texts of files, each file once, in the order of `paths`.

    Args:
        paths: files; a folder stands for its .txt and .jsonl files, sorted by name.
        taken: names that no text may have.

    Returns:
        Name → text. The name is the file's, with as many parent folders in front as tell it from the others.

    Raises:
        CalibrationError: a folder without such files, no such file, or a file without text.
    """
    files = list(dict.fromkeys(Path(os.path.abspath(file)) for path in paths for file in _text_files(path)))
    texts = {}
    for file in files:
        others = [other.as_posix() for other in files if other != file]
        names = ("/".join(file.parts[-depth:]) for depth in range(1, len(file.parts)))
        free = (name for name in names if name not in taken and not any(o.endswith(f"/{name}") for o in others))
        texts[next(free, file.as_posix())] = load_text(file)
    return texts


def _text_files(path: Path) -> list[Path]:
    """A file, or those of a folder that are texts."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise CalibrationError(
            f"Expected {' or '.join(TEXT_SUFFIXES)} files in the folder {path}, found none. Name another folder, or a "
            "file."
        )
    return files


def join_documents(documents: Iterable[str]) -> Iterator[str]:
    """Documents with an empty line between one and the next, lazily."""
    for index, document in enumerate(documents):
        if index:
            yield DOCUMENT_SEPARATOR
        yield document


def _file_pieces(file: Path) -> Iterator[str]:
    try:
        # utf-8-sig: a byte order mark is not text.
        with file.open(encoding="utf-8-sig") as handle:
            while piece := handle.read(_READ_CHARACTERS):
                yield piece
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"Expected UTF-8 text in {file}, got bytes that are not: {error.reason}. Convert it first, for example "
            f"`iconv -f LATIN1 -t UTF-8`."
        ) from error
    except OSError as error:
        raise CalibrationError(f"Expected a readable file, got {error}. Check its permissions.") from error


def _jsonl_documents(file: Path) -> Iterator[str]:
    rest = ""
    number = 0
    for piece in chain(_file_pieces(file), ["\n"]):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _json_document(line, f"{file} line {number}")


def _json_document(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # beside bad syntax: numbers too long, brackets too deep
        raise CalibrationError(f"Expected one JSON object per line, got {error} in {where}.") from error
    return _row_text(row, where)


def _hub_documents(name: str, rows: Iterable[object]) -> Iterator[str]:
    iterator = iter(rows)
    for number in count():
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # the stream reads the network, in whatever library the data set's format needs
            raise CalibrationError(
                f"Expected row {number} of {name}, got {type(error).__name__}: {error} Check the network and try again."
            ) from error
        yield _row_text(row, f"{name} row {number}")


def _row_text(row: object, where: str) -> str:
    if not isinstance(row, dict):
        raise CalibrationError(f"Expected a JSON object in {where}, got {type(row).__name__}.")
    for key in JSONL_FIELDS:
        if key in row:
            text = row[key]
            if isinstance(text, str):
                return text
            raise CalibrationError(f"Expected a string in field {key!r} of {where}, got {type(text).__name__}.")
    raise CalibrationError(
        f"Expected field {' or '.join(map(repr, JSONL_FIELDS))} in {where}, got the fields {sorted(map(str, row))}. "
        f"Rename the field that holds the text."
    )


def _checked_documents(documents: Iterable[object]) -> Iterator[str]:
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise CalibrationError(
                f"Expected documents as strings, got {type(document).__name__} at position {index}. Tokens are passed "
                f"as one integer torch tensor."
            )
        yield document
