"""Windows of tokens, drawn from a text, from given tokens, or from the model itself.

Each of the three is a function (n, L) -> (at most n, L) int64 on the CPU. N windows, L tokens per window, B windows
sampled at once, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from minisp.errors import CalibrationError, ConfigError
from minisp.labels import draw_tokens

Draw = Callable[[int, int], Tensor]
"""(n, L) -> (at most n, L) int64."""

# First guess of the text needed. English has 4 to 5 characters per token; a wrong guess costs one more reading.
_CHARACTERS_PER_TOKEN = 5
# Windows that the model writes at once; more are no faster.
WRITTEN_AT_ONCE = 32
# Windows are spread over the start of a text, so many times as long as they are together: more subjects, at the price of
# reading and tokenising, up to so many tokens (a few seconds).
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
        return _cut(torch.tensor(tokens[:usable], dtype=torch.int64), num_windows, window)

    return draw


def token_windows(tokens: Tensor) -> Draw:
    """Draws windows from given tokens: rows of (N, L), or pieces of (T,), evenly spread over them.

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
    """(T,) -> (min(num_windows, ⌊T / window⌋), window), evenly spread, in order."""
    available = len(tokens) // window
    return tokens[: available * window].reshape(available, window)[spread(available, num_windows)]


def write_windows(
    model: nn.Module,
    tokenizer: Any,
    *,
    num_windows: int,
    window: int,
    seed: int,
    temperature: float = 1.0,
    batch: int = WRITTEN_AT_ONCE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Text that the model writes itself: each window starts with a random token and continues by sampling.

    The first token is uniform over the tokenizer's ordinary tokens (the whole vocabulary without a tokenizer), which
    spreads the subjects; the rest come from the model's full distribution, and an end-of-text token ends nothing. The
    result depends on the arguments alone and torch's global generator is left as it was.

    Args:
        model: a transformers causal language model, on the device it runs on.
        tokenizer: its tokenizer, or None.
        num_windows, window: N and L.
        seed: seeds first tokens and sampling.
        temperature: divides the logits, above 0.
        batch: windows written at once; memory grows with it by one KV cache of `window` tokens each.
        on_progress: called after every step with (steps done, steps in all).

    Returns:
        (N, L) int64 on the CPU.

    Raises:
        ConfigError: a count below 1 or a temperature that is not a finite number above 0.
        NumericalError: the model's logits are not finite.
    """
    if min(num_windows, window, batch) < 1 or not 0 < temperature < float("inf"):
        raise ConfigError(
            f"Expected num_windows, window and batch of at least 1 and a finite temperature above 0, got "
            f"{num_windows}, {window}, {batch} and {temperature}."
        )
    generator = torch.Generator().manual_seed(seed)
    first = _ordinary_tokens(model, tokenizer)
    start = first[torch.randint(len(first), (num_windows,), generator=generator)]
    # Drawn at once and per window, so that the batch size decides neither.
    uniform = torch.rand(num_windows, window - 1, generator=generator)
    parts = list(zip(start.split(batch), uniform.split(batch), strict=True))
    written = []
    with evaluating(model), torch.no_grad():
        for index, (starts, draws) in enumerate(parts):
            steps = _sample(model, starts, draws, temperature)
            tokens = [next(steps)]
            for done, token in enumerate(steps, start=index * (window - 1) + 1):
                tokens.append(token)
                if on_progress is not None:
                    on_progress(done, len(parts) * (window - 1))
            written.append(torch.stack(tokens, dim=1).cpu())
    return torch.cat(written)


def _sample(model: nn.Module, start: Tensor, uniform: Tensor, temperature: float) -> Iterator[Tensor]:
    """Tokens (B,) of step after step, from start (B,) and uniform numbers (B, L − 1), with the model's own KV cache."""
    device = next(model.parameters()).device
    token, uniform = start.to(device), uniform.to(device)
    yield token
    cache = _fixed_cache(model, uniform.shape[1])
    for step in range(uniform.shape[1]):
        output = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
        token = draw_tokens(output.logits[:, -1].float().div_(temperature), uniform[:, step])
        yield token


def _fixed_cache(model: nn.Module, num_tokens: int) -> DynamicCache:
    """The model's own kind of KV cache, whose full-attention layers are allocated once, for `num_tokens`."""
    config: Any = model.config
    cache = DynamicCache(config=config)
    cache.layers = [_FixedLayer(num_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _FixedLayer(DynamicLayer):
    """Keys and values (B, heads, tokens so far, head size) as views of tensors with room for all tokens.

    The ordinary layer concatenates, which copies and reallocates the whole cache for every token: at 256 tokens a third
    of the time of a step on a CPU.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = (
                states.new_empty(*states.shape[:2], self.num_tokens, states.shape[3])
                for states in (key_states, value_states)
            )
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


def _ordinary_tokens(model: nn.Module, tokenizer: Any) -> Tensor:
    """Ids that a text may start with: the model's vocabulary without padding rows and special tokens."""
    config: Any = model.config
    vocab_size: int = config.vocab_size
    if tokenizer is None:
        return torch.arange(vocab_size)
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(min(vocab_size, len(tokenizer))) if token not in special]
    return torch.tensor(ordinary or range(vocab_size))


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
