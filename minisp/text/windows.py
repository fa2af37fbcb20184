"""Windows of tokens, drawn from a text or from given tokens.

Each of the two is a function (n, L) -> (at most n, L) int64 on the CPU. N windows, L tokens per window.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minisp.errors import CalibrationError

Draw = Callable[[int, int], Tensor]
"""(n, L) -> (at most n, L) int64."""

# First guess of the text needed. English has 4 to 5 characters per token; a wrong guess costs one more reading.
_CHARACTERS_PER_TOKEN = 5
# Windows are spread over the start of a text, so many times as long as they are together: more subjects, at the price
# of reading and tokenising, up to so many tokens (a few seconds).
_SPREAD_OVER, _SPREAD_TOKENS = 8, 2**21
# Where a text is cut short, its last tokens are not those of the whole text; this many are left out.
_CUT_TOKENS = 16


def text_windows(prefix: Callable[[int], tuple[str, bool]], label: str, tokenizer: Any) -> Draw:
    """Draws windows evenly spread over a text, or over the start of a long one, reading and tokenising no more of it.

    Args:
        prefix: number of characters -> (the first so many of the text, whether that is all of it).
        label: what messages call the text.
        tokenizer: a transformers tokenizer; special tokens are what it adds to one text by itself.
    """

    def draw(num_windows: int, window: int) -> Tensor:
        needed = num_windows * window
        ahead = max(1, min(_SPREAD_OVER, _SPREAD_TOKENS // needed))
        num_chars = (needed * ahead + _CUT_TOKENS) * _CHARACTERS_PER_TOKEN
        while True:
            text, whole = prefix(num_chars)
            # verbose=False: the text is meant to be longer than the model's positions.
            tokens = tokenizer(text, verbose=False)["input_ids"] if text.strip() else []
            usable = len(tokens) if whole else max(len(tokens) - _CUT_TOKENS, 0)
            if whole or usable >= needed:
                break
            # Between 2 and 4 times as much: an odd beginning must not have a whole library tokenised.
            num_chars = int(num_chars * min(max(1.1 * needed / max(usable, 1), 2), 4))
        if usable < window:
            got = f"{usable} tokens" if text.strip() else "no text at all"
            raise CalibrationError(
                f"Expected at least one window of {window} tokens from {label}, got {got}. Pass more text, or a "
                f"shorter window."
            )
        found = _cut(torch.tensor(tokens[:usable], dtype=torch.int64), usable // window, window)
        return found[spread(len(found), num_windows)]

    return draw


def token_windows(tokens: Tensor) -> Draw:
    """Draws windows from given tokens: the rows of (N, L), or consecutive pieces of (T,).

    Raises:
        CalibrationError: not integers, or neither shape; when drawing, if L differs or not one window is there.
    """
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise CalibrationError(
            f"Expected integer tokens, got a tensor of {tokens.dtype}. Pass token ids as torch.int64."
        )
    if tokens.dim() not in (1, 2):
        raise CalibrationError(f"Expected tokens of shape (T,) or (N, L), got {tuple(tokens.shape)}. Reshape them.")

    def draw(num_windows: int, window: int) -> Tensor:
        if tokens.dim() == 2 and tokens.shape[1] != window:
            raise CalibrationError(
                f"Expected tokens of shape (N, {window}) in this mixture, got {tuple(tokens.shape)}. Use one window "
                f"length throughout, or pass the tokens as one flat tensor."
            )
        if tokens.numel() < window:
            raise CalibrationError(
                f"Expected at least one window of {window} tokens, got {tokens.numel()} tokens. Pass more tokens, or a "
                f"shorter window."
            )
        return _cut(tokens.detach().to("cpu", torch.int64).flatten(), num_windows, window)

    return draw


def _cut(tokens: Tensor, num_windows: int, window: int) -> Tensor:
    """(T,) -> (min(num_windows, ⌊T / window⌋), window)."""
    available = min(num_windows, len(tokens) // window)
    return tokens[: available * window].reshape(available, window).clone()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, in eval mode; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, evenly spread."""
    wanted = min(wanted, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
