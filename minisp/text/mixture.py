"""From any source of text or tokens to the parts of one mixture, the generic text that goes with it included.

A *part* is anything that can draw up to n windows of L tokens. What a model is calibrated on alone it does best; on
everything else a pruned model loses more than it has to. So beside the user's text a share of the windows is *generic*:
text that the model writes itself, and the documentation and the source code that every Python carries.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from minisp.errors import CalibrationError
from minisp.text.builtin import BUILTIN_PREFIX, open_builtin
from minisp.text.corpora import HUB_PREFIX, Corpus, open_documents, open_file, open_hub
from minisp.text.windows import Draw, text_windows, token_windows

WRITTEN = f"{BUILTIN_PREFIX}model"
# Weights within the generic text, chosen on German prose and licences, which none of the three covers.
GENERIC = {WRITTEN: 2.0, f"{BUILTIN_PREFIX}documentation": 1.0, f"{BUILTIN_PREFIX}code": 1.0}
WRITTEN_SHARE = GENERIC[WRITTEN] / sum(GENERIC.values())


@dataclass(frozen=True)
class Part:
    """One component of a mixture.

    Attributes:
        label: what messages call it.
        weight: its share of the windows, relative to the other parts.
        draw: (n, L) -> (at most n, L) int64 windows.
        generic: it was added to the user's text.
    """

    label: str
    weight: float
    draw: Draw
    generic: bool = False


@dataclass(frozen=True)
class Shares:
    """Of the calibration windows: the share that is generic text, and the share that the model writes, if it can."""

    generic: float
    written: float


def shares_of(sources: Sequence[tuple[str, float]] | None, generic: float) -> Shares:
    """The shares of `mixture`, before anything is read.

    Args:
        sources: (name, weight) of every source; None is generic text alone.
        generic: as for `mixture`.
    """
    if sources is None:
        return Shares(1.0, WRITTEN_SHARE)
    if not _names_builtin(sources):
        return Shares(generic, WRITTEN_SHARE * generic)
    return Shares(0.0, sum(weight for name, weight in sources if name == WRITTEN) / sum(w for _, w in sources))


def mixture(source: Any, tokenizer: Any, writer: Draw | None, generic: float) -> list[Part]:
    """The parts of a source, and beside them generic text for a share of the windows.

    Args:
        source: as for `minisp.text.calibration.load_calibration`; None is generic text alone.
        tokenizer: a transformers tokenizer, or None where no text is involved.
        writer: (n, L) -> (n, L) int64 windows written by the model; None where it cannot write.
        generic: share of generic text, in [0, 1). A source that names what is built in says itself how much it wants.

    Raises:
        CalibrationError: a source is missing, unreadable, ambiguous or empty.
    """
    if source is None:
        parts = _generic_parts(tokenizer, writer)
        if not parts:
            raise CalibrationError(
                "Expected a tokenizer for the default calibration text, got None. Pass the tokenizer, or an integer "
                "tensor of tokens as the source."
            )
        return parts
    parts = _parts(source, tokenizer, writer)
    added = [] if _names_builtin(source) or not generic else _generic_parts(tokenizer, writer)
    if not added:
        return parts
    return _scaled(parts, 1 - generic) + _scaled(added, generic)


def check_sources(names: Iterable[str]) -> None:
    """Raise `CalibrationError` where a file is not there or a builtin source unknown; nothing is read or fetched."""
    for name in names:
        if name.startswith(BUILTIN_PREFIX):
            _ = name == WRITTEN or open_builtin(name)
        elif not name.startswith(HUB_PREFIX):
            open_file(name)


def _generic_parts(tokenizer: Any, writer: Draw | None) -> list[Part]:
    """Generic text, as far as it is at hand: a model that does not fit in memory whole writes none."""
    able = {name: writer is not None if name == WRITTEN else tokenizer is not None for name in GENERIC}
    found = [_part(name, weight, tokenizer, writer) for name, weight in GENERIC.items() if able[name]]
    return [replace(part, label=f"{part.label} (generic)", generic=True) for part in found]


def _scaled(parts: Sequence[Part], total: float) -> list[Part]:
    whole = sum(part.weight for part in parts)
    return [replace(part, weight=part.weight * total / whole) for part in parts]


def _names_builtin(source: Any) -> bool:
    """Whether a source is, or is mixed with, what is built in."""
    if isinstance(source, Mapping):
        source = list(source)
    elif isinstance(source, (list, tuple)):
        source = [item[0] if _is_pair(item) else item for item in source]
    else:
        source = [source]
    return any(isinstance(item, str) and item.startswith(BUILTIN_PREFIX) for item in source)


def _parts(source: Any, tokenizer: Any, writer: Draw | None) -> list[Part]:
    """The parts of any source but None."""
    if isinstance(source, Mapping):
        return _weighted_parts(list(source.items()), tokenizer, writer)
    if isinstance(source, (list, tuple)):
        if not source:
            raise CalibrationError("Expected calibration text or tokens, got an empty list. Put something in it.")
        pairs = [_is_pair(item) for item in source]
        if all(pairs):
            return _weighted_parts(source, tokenizer, writer)
        if any(pairs):
            raise CalibrationError(
                f"Expected every element of a mixture to be a pair (source, weight), got {pairs.count(False)} of "
                f"{len(pairs)} elements that are not. Give each source a weight."
            )
        if _are_paths(source):
            return [_part(item, 1.0, tokenizer, writer) for item in source]
    return [_part(source, 1.0, tokenizer, writer)]


def _weighted_parts(pairs: Sequence[tuple[Any, Any]], tokenizer: Any, writer: Draw | None) -> list[Part]:
    if not pairs:
        raise CalibrationError("Expected a mixture {source: weight}, got an empty one. Put a source in it.")
    for source, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise CalibrationError(
                f"Expected a finite weight above 0 for {_name(source)}, got {weight!r}. Leave the source out, or give "
                "it such a weight."
            )
    return [_part(source, float(weight), tokenizer, writer) for source, weight in pairs]


def _part(source: Any, weight: float, tokenizer: Any, writer: Draw | None) -> Part:
    if isinstance(source, Tensor):
        return Part("the given tokens", weight, token_windows(source))
    if source == WRITTEN:
        if writer is None:
            raise CalibrationError(
                "Expected a model that fits in memory whole, to write calibration text, got one that does not. Leave "
                f"{source} out, or allow more memory and as many layers at once (segment)."
            )
        return Part("text that the model wrote itself", weight, writer)
    if isinstance(source, str) and source.startswith(BUILTIN_PREFIX):
        return _text_part(open_builtin(source), weight, tokenizer)
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return _text_part(open_hub(source), weight, tokenizer)
    if isinstance(source, (str, os.PathLike)):
        return _text_part(open_file(source), weight, tokenizer)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, Mapping)):
        return _text_part(open_documents(source), weight, tokenizer)
    raise CalibrationError(
        f"Expected a path, {HUB_PREFIX}NAME, {BUILTIN_PREFIX}NAME, an iterable of strings, an integer tensor or a "
        f"weighted mixture of these, got {type(source).__name__}. Pass one of them."
    )


def _text_part(corpus: Corpus, weight: float, tokenizer: Any) -> Part:
    if tokenizer is None:
        raise CalibrationError(
            f"Expected a tokenizer to read {corpus.label}, got None. Pass the tokenizer, or an integer tensor of "
            f"tokens instead of text."
        )
    return Part(corpus.label, weight, text_windows(corpus.prefix, corpus.label, tokenizer))


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and not isinstance(item[1], str)


def _are_paths(items: Sequence[Any]) -> bool:
    """Whether a list means files (all of them exist) rather than documents (none does); in between is refused."""
    paths = [_names_source(item) for item in items]
    if any(paths) and not all(paths):
        raise CalibrationError(
            f"Expected a list of existing files or a list of documents, got both: {_name(items[paths.index(True)])} is "
            f"a source of text, {_name(items[paths.index(False)])} is no existing file. Correct the path, or read the "
            f"files and pass documents only."
        )
    return all(paths)


def _names_source(item: Any) -> bool:
    if isinstance(item, str):
        return item.startswith((HUB_PREFIX, BUILTIN_PREFIX)) or os.path.exists(item)
    return isinstance(item, (os.PathLike, Tensor))


def _name(source: Any) -> str:
    text = repr(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    return text if len(text) <= 60 else text[:57] + "..."
