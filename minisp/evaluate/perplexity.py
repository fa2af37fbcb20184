"""What a model is worth and what it costs: perplexity and bytes. Protocols are part of the results.

Shapes: T tokens, L tokens per window, d hidden size, V vocabulary, B sequences at once.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisp.errors import CalibrationError, CheckpointError, ConfigError, NumericalError
from minisp.text.windows import evaluating

# Float32 logits of one chunk of tokens stay within this many bytes.
LOGIT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Perplexity:
    """Perplexity exp(nll), and how it was measured.

    Windows of L tokens start at 0, stride, 2·stride, ...; only whole windows count and none is padded. No token is
    added. A window scores the tokens that no window before it scored, each given the tokens before it in the window:
    the first window its tokens 2..L, every other its last `stride`, but never its first token.

    Args:
        value: exp(nll).
        nll: mean negative log-likelihood over all scored tokens, in nats per token.
        num_tokens: tokens scored.
        num_windows: windows run.
        window: L.
        stride: tokens from the start of one window to the next; `stride == window` is the protocol of most papers on
            compression, a shorter one gives every token more context.
        seconds: wall time.
    """

    value: float
    nll: float
    num_tokens: int
    num_windows: int
    window: int
    stride: int
    seconds: float


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a transformers causal language model on a text; `Perplexity` states the protocol.

    Args:
        model: on the device and in the type it computes in; losses are taken in float32 and summed in float64.
        tokens: (T,) integer ids.
        window: L, in [2, positions of the model].
        stride: in [1, L]; None is L, windows that do not overlap.
        max_windows: run no more than the first so many.
        on_progress: called after every window with (windows done, windows in all).

    Raises:
        CalibrationError: fewer tokens than one window, tokens outside the vocabulary, or a window too long.
        ConfigError: stride or max_windows out of range.
        NumericalError: a loss that is not finite.
    """
    stride = window if stride is None else stride
    check_windows(model.config, tokens, window=window, stride=stride, max_windows=max_windows)
    starts = list(range(0, len(tokens) - window + 1, stride))[:max_windows]
    ids = tokens.to(next(model.parameters()).device, torch.int64)
    total, scored = 0.0, 0
    began = time.perf_counter()
    with evaluating(model), torch.no_grad():
        for done, start in enumerate(starts, start=1):
            first = 1 if start == 0 else max(window - stride, 1)
            loss = _window_loss(model, ids[start : start + window], first)
            if not math.isfinite(loss):
                raise NumericalError(
                    f"Expected a finite loss, got {loss} in window {done} of {len(starts)} (tokens {start} to "
                    f"{start + window - 1}). Check the weights, or compute in bfloat16 or float32."
                )
            total += loss
            scored += window - first
            if on_progress is not None:
                on_progress(done, len(starts))
    nll = total / scored
    return Perplexity(exponential(nll), nll, scored, len(starts), window, stride, time.perf_counter() - began)


def exponential(nats: float) -> float:
    """A perplexity, or a ratio of two, from nats per token."""
    # exp overflows float64 at 710 nats, which only a broken model reaches.
    return math.exp(nats) if nats < 700 else math.inf


def _window_loss(model: nn.Module, ids: Tensor, first: int) -> float:
    """Sum of the negative log-likelihoods of tokens first..L−1 (counted from 0) of one window (L,)."""
    total = 0.0
    for start, logits in _logit_chunks(model, ids, first - 1, len(ids) - 1):
        rows = logits.float()
        target = rows.gather(1, ids[start + 1 : start + 1 + len(rows), None])[:, 0]
        # log Σ exp in place, where torch.logsumexp would hold a second tensor of this size.
        peak = rows.amax(dim=1)
        log_sum = rows.sub_(peak[:, None]).exp_().sum(dim=1).log_().add_(peak)
        total += (log_sum - target).double().sum().item()
    return total


def _logit_chunks(model: nn.Module, ids: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """Logits (n, V) of positions first..last−1 of one window (L,), chunk after chunk, each with its first position.

    The decoder runs once; then the model's own forward runs once per chunk, its decoder replaced by the stored hidden
    states, so that head, caps and scales are the model's own. A model whose forward cannot be asked for its last
    logits alone (`logits_to_keep`), or that does not call its `get_decoder()`, computes all logits at once.
    """
    vocab_size = text_config(model).vocab_size
    rows = max(LOGIT_BYTES // (4 * vocab_size), 1)
    decoder: Any = getattr(model, "get_decoder", lambda: None)()
    caught: list[Any] = []
    if decoder is not None and decoder is not model and keeps_logits(model):

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output)
            raise _DecodedError

        with decoder.register_forward_hook(stop), suppress(_DecodedError):
            model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    if not caught or getattr(caught[0], "last_hidden_state", None) is None:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        yield from ((start, logits[start : min(start + rows, last)]) for start in range(first, last, rows))
        return
    (hidden,) = caught[0].last_hidden_state
    for start in range(first, last, rows):
        # A slice of the window, then its batch dimension: a slice with one, whose strides do not fold, torch would
        # multiply as a batch, after copying the head's weights.
        chunk = replace(caught[0], last_hidden_state=hidden[start : min(start + rows, last)][None])
        with _returning(decoder, chunk):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        yield start, logits


class _DecodedError(Exception):
    """Raised behind the decoder: the rest of the forward is not wanted."""


def checkpoint_bytes(folder: str | Path) -> int:
    """Bytes of all safetensors files of a checkpoint folder; CheckpointError if there are none."""
    sizes = [file.stat().st_size for file in Path(folder).glob("*.safetensors")]
    if not sizes:
        raise CheckpointError(f"Expected .safetensors files in {folder}, got none. Name the folder of a checkpoint.")
    return sum(sizes)


def check_windows(
    config: Any, tokens: Tensor, *, window: int, stride: int | None = None, max_windows: int | None = None
) -> None:
    """Raise what `perplexity` would raise before it computes anything.

    Args:
        config: the model's transformers configuration; the model itself need not be loaded.
    """
    text, stride = config.get_text_config(), window if stride is None else stride
    if tokens.dim() != 1 or tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise CalibrationError(
            f"Expected tokens as integers of shape (T,), got {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    positions = _positions(text)
    if window < 2 or (positions is not None and window > positions):
        limit = (
            f"2 to {positions} tokens, the positions this model has" if positions is not None else "2 or more tokens"
        )
        raise CalibrationError(f"Expected windows of {limit}, got window={window}. Pass another window.")
    if not 1 <= stride <= window:
        raise ConfigError(f"Expected a stride in [1, {window}], the window, got {stride}. Pass such a number.")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"Expected max_windows of at least 1, or None, got {max_windows}. Pass such a number.")
    if len(tokens) < window:
        raise CalibrationError(
            f"Expected at least one window of {window} tokens, got {len(tokens)} tokens. Pass more text, or a shorter "
            f"window."
        )
    vocab_size = text.vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"Expected tokens in [0, {vocab_size}), got {low if low < 0 else high}. Use the tokenizer that belongs to "
            f"the model."
        )


def text_config(model: nn.Module) -> Any:
    """The language model's configuration, inside a multimodal one too."""
    config: Any = model.config
    return config.get_text_config()


def max_positions(model: nn.Module) -> int | None:
    """Tokens that a model has positions for; None where its configuration sets no limit."""
    return _positions(text_config(model))


def _positions(config: Any) -> int | None:
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model's forward can be asked for its last logits alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """For a while, calling the module returns `output`."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
