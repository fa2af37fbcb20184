"""Calibration windows: from any mixture of texts and tokens to one (N, L) tensor of token ids.

Shapes: N windows, L tokens per window. A *part* of a mixture is anything that can draw up to n windows of L tokens;
`load_calibration` turns its source into parts, shares N out among them, draws, checks and interleaves.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from minisp.builtin import BUILTIN_PREFIX, open_builtin
from minisp.corpora import HUB_PREFIX, Corpus, open_documents, open_file, open_hub
from minisp.errors import CalibrationError
from minisp.windows import Draw, text_windows, token_windows


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tokens that statistics are gathered on.

    Args:
        windows: (N, L) int64 token ids on the CPU.
        description: sentences that say what the windows are, for reports and manifests.
    """

    windows: Tensor
    description: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shape and tokens: equal exactly when the windows are equal."""
        digest = hashlib.sha256(repr(tuple(self.windows.shape)).encode())
        digest.update(self.windows.contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """One component of a mixture: `draw(n, L)` gives (at most n, L) int64 windows."""

    label: str
    weight: float
    draw: Draw


def load_calibration(
    source: Any,
    tokenizer: Any,
    *,
    num_windows: int = 128,
    window: int = 512,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    writer: Draw | None = None,
) -> Calibration:
    """Calibration windows from a source.

    Args:
        source: None, the default mixture: half what the model writes itself (`writer`), half the documentation that
            every Python carries. A path to a text or .jsonl file. `hf:NAME[:CONFIG][:SPLIT]`. `builtin:documentation`
            or `builtin:code` (Python's), `builtin:model` (text that the model writes). An iterable of strings
            (documents). A list of paths of existing files (equal shares). An integer tensor of tokens, (T,) or (N, L);
            a 2-D tensor that is the whole source keeps its own L. A dict {source: weight} or a list of
            (source, weight): a mixture by weight.
        tokenizer: a transformers tokenizer, called on the text from its start; None if no text is involved.
        num_windows: N wanted. Fewer are used, with a warning, where the sources hold fewer.
        window: L, at least 2.
        vocab_size: tokens must be below it.
        max_positions: the longest window the model takes.
        writer: (n, L) -> (n, L) int64 windows written by the model; None where it cannot write.

    Raises:
        CalibrationError: a source is missing, unreadable, ambiguous or empty, or its tokens do not fit the model.
    """
    if isinstance(source, Tensor) and source.dim() == 2:
        window = source.shape[1]
    if num_windows < 1:
        raise CalibrationError(f"Expected at least 1 calibration window, got {num_windows}. Ask for one or more.")
    check_window(window, max_positions)
    parts = _default_parts(tokenizer, writer) if source is None else _parts(source, tokenizer, writer)
    drawn, description = [], []
    for part, wanted in zip(parts, apportion([part.weight for part in parts], num_windows), strict=True):
        if not wanted:
            description.append(f"no window from {part.label}, whose weight is too small among {num_windows} windows")
            continue
        windows = _checked(part.draw(wanted, window), vocab_size, part.label)
        drawn.append(windows)
        description.append(f"{_windows(len(windows))} of {window} tokens from {part.label}")
        if len(windows) < wanted:
            shortfall = f"{part.label} holds {_windows(len(windows))} of {window} tokens, not the {wanted} asked for"
            description.append(shortfall)
            warnings.warn(f"{shortfall}. Add text, or ask for fewer windows.", stacklevel=2)
    return Calibration(interleave(drawn), tuple(description))


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` out in proportion to positive weights: floors, then one more each by largest remainder.

    Ties go to the earlier; rational arithmetic keeps equal weights equal.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [weight * total / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleave(groups: Sequence[Tensor]) -> Tensor:
    """(N_i, L) groups to one (ΣN_i, L), each group spread evenly, so that every prefix is mixed like the whole.

    Window k of N_i stands at (k + ½) / N_i of the way; ties go to the earlier group.
    """
    order = sorted(
        (Fraction(2 * k + 1, 2 * len(group)), i, k) for i, group in enumerate(groups) for k in range(len(group))
    )
    return torch.stack([groups[i][k] for _, i, k in order])


def _default_parts(tokenizer: Any, writer: Draw | None) -> list[_Part]:
    parts = []
    if writer is not None:
        parts.append(_part(f"{BUILTIN_PREFIX}model", 1.0, tokenizer, writer))
    if tokenizer is not None:
        parts.append(_part(f"{BUILTIN_PREFIX}documentation", 1.0, tokenizer, writer))
    if not parts:
        raise CalibrationError(
            "Expected a tokenizer for the default calibration text, got None. Pass the tokenizer, or an integer tensor "
            "of tokens as the source."
        )
    return parts


def _parts(source: Any, tokenizer: Any, writer: Draw | None) -> list[_Part]:
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


def _weighted_parts(pairs: Sequence[tuple[Any, Any]], tokenizer: Any, writer: Draw | None) -> list[_Part]:
    if not pairs:
        raise CalibrationError("Expected a mixture {source: weight}, got an empty one. Put a source in it.")
    for source, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise CalibrationError(
                f"Expected a finite weight above 0 for {_name(source)}, got {weight!r}. Leave the source out, or give "
                "it such a weight."
            )
    return [_part(source, float(weight), tokenizer, writer) for source, weight in pairs]


def _part(source: Any, weight: float, tokenizer: Any, writer: Draw | None) -> _Part:
    if isinstance(source, Tensor):
        return _Part("the given tokens", weight, token_windows(source))
    if source == f"{BUILTIN_PREFIX}model":
        if writer is None:
            raise CalibrationError(
                "Expected a model that fits in memory whole, to write calibration text, got one that does not. Leave "
                f"{source} out, or allow more memory and as many layers at once (segment)."
            )
        return _Part("text that the model wrote itself", weight, writer)
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


def _text_part(corpus: Corpus, weight: float, tokenizer: Any) -> _Part:
    if tokenizer is None:
        raise CalibrationError(
            f"Expected a tokenizer to read {corpus.label}, got None. Pass the tokenizer, or an integer tensor of "
            f"tokens instead of text."
        )
    return _Part(corpus.label, weight, text_windows(corpus.prefix, corpus.label, tokenizer))


def _checked(windows: Tensor, vocab_size: int | None, label: str) -> Tensor:
    windows = windows.to("cpu", torch.int64)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise CalibrationError(
            f"Expected tokens in [0, {vocab_size if vocab_size is not None else 'the vocabulary'}) from {label}, got "
            f"{low if low < 0 else high}. Use the tokenizer that belongs to the model."
        )
    return windows


def check_window(window: int, max_positions: int | None) -> None:
    """Raise `CalibrationError` where windows are longer than the model's positions, or have nothing to predict."""
    if window < 2:
        raise CalibrationError(
            f"Expected windows of at least 2 tokens (one to predict the next), got {window}. Pass longer ones."
        )
    if max_positions is not None and window > max_positions:
        raise CalibrationError(
            f"Expected windows of at most {max_positions} tokens, the positions this model has, got {window}. "
            f"Pass window={max_positions} or less."
        )


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


def _windows(number: int) -> str:
    return f"{number} window{'' if number == 1 else 's'}"
