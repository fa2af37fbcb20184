"""Calibration windows: from any mixture of texts and tokens to one (N, L) tensor of token ids.

Shapes: N windows, L tokens per window. `load_calibration` turns its source into the parts of a mixture, shares N out
among them, draws, checks and interleaves.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from minisp.errors import CalibrationError
from minisp.text.mixture import mixture
from minisp.text.windows import Draw


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


def load_calibration(
    source: Any,
    tokenizer: Any,
    *,
    num_windows: int = 128,
    window: int = 512,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    writer: Draw | None = None,
    generic: float = 0.0,
) -> Calibration:
    """Calibration windows from a source.

    Args:
        source: None, generic text alone, see `minisp.text.mixture`. A path to a text or .jsonl file.
            `hf:NAME[:CONFIG][:SPLIT]`. `builtin:documentation` or `builtin:code` (Python's), `builtin:model` (text
            that the model writes). An iterable of strings (documents). A list of paths of existing files (equal
            shares). An integer tensor of tokens, (T,) or (N, L); a 2-D tensor that is the whole source keeps its own
            L. A dict {source: weight} or a list of (source, weight): a mixture by weight.
        tokenizer: a transformers tokenizer, called on the text from its start; None if no text is involved.
        num_windows: N wanted. Fewer are used, with a warning, where the sources hold fewer.
        window: L, at least 2.
        vocab_size: tokens must be below it.
        max_positions: the longest window the model takes.
        writer: (n, L) -> (n, L) int64 windows written by the model; None where it cannot write.
        generic: share of the windows that is generic text, in [0, 1), where the source names nothing that is built in.

    Raises:
        CalibrationError: a source is missing, unreadable, ambiguous or empty, or its tokens do not fit the model.
    """
    if isinstance(source, Tensor) and source.dim() == 2:
        window = source.shape[1]
    if num_windows < 1:
        raise CalibrationError(f"Expected at least 1 calibration window, got {num_windows}. Ask for one or more.")
    check_window(window, max_positions)
    parts = mixture(source, tokenizer, writer, generic)
    drawn, description = [], []
    for part, wanted in zip(parts, apportion([part.weight for part in parts], num_windows), strict=True):
        if not wanted:
            if not part.generic:
                whose = "whose weight is too small among"
                description.append(f"no window from {part.label}, {whose} {num_windows} windows")
            continue
        windows = _checked(part.draw(wanted, window), vocab_size, part.label)
        drawn.append(windows)
        description.append(f"{_windows(len(windows))} of {window} tokens from {part.label}")
        if len(windows) < wanted:
            shortfall = f"{part.label} holds {_windows(len(windows))} of {window} tokens, not the {wanted} asked for"
            description.append(shortfall)
            if not part.generic:
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


def _windows(number: int) -> str:
    return f"{number} window{'' if number == 1 else 's'}"
