"""Tokens drawn from a distribution of logits: for text that a model writes, and as labels of its loss."""

from hashlib import blake2b

import torch
from torch import Tensor

from minisp.errors import NumericalError

# Float32 logits that are drawn from at once: 8 MB, which stay in a CPU's cache; 64 MB on a GPU, whose passes over them
# then take longer than their launches.
DRAWN_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token (B,) from each row of float32 logits (B, V), which it overwrites, by numbers (B,) in [0, 1).

    Raises:
        NumericalError: logits that are not finite.
    """
    token, total = _draw(logits, uniform)
    _check_finite(total)
    return token


def draw_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token (...) for each row of logits (..., V) in any floating dtype, from numbers (...) in [0, 1).

    Rows go through float32 a few at a time; the host waits once, to see that all of them were finite.

    Raises:
        NumericalError: logits that are not finite.
    """
    rows, numbers = logits.reshape(-1, logits.shape[-1]), uniform.reshape(-1)
    step = max(1, DRAWN_ELEMENTS["cuda" if rows.is_cuda else "cpu"] // rows.shape[1])
    parts = zip(rows.split(step), numbers.split(step), strict=True)
    drawn = [_draw(part.to(torch.float32, copy=True), number) for part, number in parts]
    _check_finite(torch.cat([total for _, total in drawn]))
    return torch.cat([token for token, _ in drawn]).view(uniform.shape)


def _draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token (B,) from each row of float32 logits (B, V), which it overwrites, and the rows' total weights (B,).

    Inverse transform sampling: the first token whose cumulative weight exceeds u times the total. It takes one random
    number per row where drawing from the V probabilities takes V.
    """
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_().cumsum(dim=-1)
    total = weights[:, -1]
    token = torch.searchsorted(weights, (uniform * total)[:, None], right=True)[:, 0]
    # u · total can round up to the total itself. What is copied keeps no weights alive.
    return token.clamp_(max=logits.shape[-1] - 1), total.clone()


def _check_finite(total: Tensor) -> None:
    if not bool(torch.isfinite(total).all()):
        raise NumericalError(
            "Expected finite logits to draw tokens from, got NaN or infinity. Check the weights, or compute in "
            "bfloat16 or float32."
        )


def label_numbers(ids: Tensor, seed: int) -> Tensor:
    """Numbers (B, L) float32 in [0, 1) for windows (B, L): a window's depend on its tokens and the seed alone."""
    rows = []
    for window in ids.cpu():
        digest = blake2b(window.numpy().tobytes(), digest_size=7, key=seed.to_bytes(8, "little")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        rows.append(torch.rand(len(window), generator=generator))
    return torch.stack(rows)
