"""Text that the model writes itself, of many kinds: prose, code, law, mathematics, several languages.

A model continues an opening of each kind of text; one whose tokenizer has a chat template is asked for the text first.
Every fourth text starts with a random token instead and reaches what no instruction reaches. A window holds two texts.

Shapes: N windows, L tokens per window; M texts of K tokens, B of them written at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from minisp.errors import ConfigError
from minisp.ops.sampling import draw_tokens
from minisp.text.prompts import prompts_of
from minisp.text.windows import evaluating

# A step reads all weights for one token per text, so more and shorter texts are cheaper, and they attend to less.
TEXTS_PER_WINDOW = 2
# Windows that are written at once. Matrix products of twice as many rows are at full speed on a CPU.
WRITTEN_AT_ONCE = 64
# Texts take these by turns: the lower one keeps small models coherent, at 1 they write what they have learnt.
TEMPERATURES = (0.7, 1.0)
# Of so many texts one starts with a random token; `describe` says so in words.
RANDOM_EVERY = 4
# In `forced`: a token that the model draws.
FREE = -1


def describe(tokenizer: Any, vocab_size: int) -> str:
    """How `write_windows` has a model with `vocab_size` tokens write, as part of a sentence for plans and reports."""
    how, prompts = prompts_of(tokenizer, vocab_size)
    temperatures = f"temperatures {' and '.join(map(str, TEMPERATURES))}"
    if how is None:
        return f"from random tokens, {temperatures}"
    return f"by {len(prompts)} {how}, every fourth text from a random token, {temperatures}"


def write_windows(
    model: nn.Module,
    tokenizer: Any,
    *,
    num_windows: int,
    window: int,
    seed: int,
    batch: int = WRITTEN_AT_ONCE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Text of all kinds of `prompts.KINDS` by turns, at all `TEMPERATURES` by turns, `TEXTS_PER_WINDOW` in a window.

    A text starts with its kind's prompt, of a long one with its last tokens, which fill half of the text. Every
    `RANDOM_EVERY`-th text starts with a random token instead, and all do where there is no tokenizer or its tokens do
    not fit the model. The result depends on the arguments alone, but for roundings not on `batch`, and torch's global
    generator is left as it was.

    Args:
        model: a transformers causal language model, on the device it runs on.
        tokenizer: its tokenizer, or None.
        num_windows, window: N and L.
        seed: seeds random first tokens and sampling.
        batch: windows written at once; memory grows with it by one KV cache of `window` tokens each.
        on_progress: called after every step with (steps done, steps in all).

    Returns:
        (N, L) int64 on the CPU.

    Raises:
        ConfigError: a count below 1.
        NumericalError: the model's logits are not finite.
    """
    if min(num_windows, window, batch) < 1:
        raise ConfigError(
            f"Expected num_windows, window and batch of at least 1, got {num_windows}, {window} and {batch}. Ask for "
            "one or more of each."
        )
    generator = torch.Generator().manual_seed(seed)
    # Rounded up: what is too much of the last text of a window is cut off.
    shape = (num_windows * TEXTS_PER_WINDOW, -(-window // TEXTS_PER_WINDOW))
    config: Any = model.config
    forced, temperatures = _starts(tokenizer, config.vocab_size, shape, generator)
    rows = batch * TEXTS_PER_WINDOW
    texts = continue_texts(model, forced, temperatures, generator, batch=rows, on_progress=on_progress)
    return texts.view(num_windows, -1)[:, :window].contiguous()


def _starts(
    tokenizer: Any, vocab_size: int, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The forced tokens (M, K) of all texts and their temperatures (M,)."""
    forced = random_starts(tokenizer, vocab_size, shape, generator)
    num_texts, length = shape
    # By turns among the texts that start with a random token.
    turns = [text // RANDOM_EVERY for text in range(num_texts)]
    _, prompts = prompts_of(tokenizer, vocab_size)
    prompted = [text for text in range(num_texts) if prompts and (text + 1) % RANDOM_EVERY]
    for place, text in enumerate(prompted):
        turn, kind = divmod(place, len(prompts))
        # The end of a prompt says most: the instruction and the opening, not the template's preamble.
        prompt = torch.tensor(prompts[kind])[-max(length // 2, 1) :]
        forced[text, : len(prompt)] = prompt
        turns[text] = kind + turn
    return forced, torch.tensor([TEMPERATURES[turn % len(TEMPERATURES)] for turn in turns])


def random_starts(tokenizer: Any, vocab_size: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Texts (M, K) int64 of which only the first token is forced, to a random ordinary one.

    Uniform over the vocabulary without its padding rows and special tokens; over all of it without a tokenizer.
    """
    ordinary = list(range(vocab_size))
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        ordinary = [token for token in range(min(vocab_size, len(tokenizer))) if token not in special] or ordinary
    forced = torch.full(shape, FREE, dtype=torch.int64)
    forced[:, 0] = torch.tensor(ordinary)[torch.randint(len(ordinary), shape[:1], generator=generator)]
    return forced


def continue_texts(
    model: nn.Module,
    forced: Tensor,
    temperatures: Tensor,
    generator: torch.Generator,
    *,
    batch: int = WRITTEN_AT_ONCE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Texts (M, K) int64 on the CPU: forced tokens where there are such, elsewhere the model's own.

    They are drawn from the model's full distribution, and an end-of-text token ends nothing.

    Args:
        model, on_progress: as for `write_windows`.
        forced: (M, K) int64, `FREE` where the model draws; the first column holds tokens.
        temperatures: (M,) float32 above 0, which divide the logits.
        generator: of the CPU; what it draws does not depend on `batch`.
        batch: texts written at once.

    Raises:
        NumericalError: the model's logits are not finite.
    """
    num_texts, length = forced.shape
    # Drawn at once and per text, so that the batch size does not decide them.
    uniform = torch.rand(num_texts, length - 1, generator=generator)
    parts = list(zip(forced.split(batch), temperatures.split(batch), uniform.split(batch), strict=True))
    device = next(model.parameters()).device
    written = []
    with evaluating(model), torch.no_grad(), _transposed_products(model):
        for index, part in enumerate(parts):
            tokens, temperature, numbers = (tensor.to(device, copy=True) for tensor in part)
            steps = enumerate(_sample(model, tokens, temperature, numbers), start=index * (length - 1) + 1)
            for done, _ in steps:
                if on_progress is not None:
                    on_progress(done, len(parts) * (length - 1))
            written.append(tokens.cpu())
    return torch.cat(written)


@contextmanager
def _transposed_products(model: nn.Module) -> Iterator[None]:
    """Within the block, linear maps in float32 on a CPU compute W xᵀ instead of x Wᵀ, and transpose the small result.

    For tens of rows x, torch's product then takes the weights as they lie: 89 instead of 21 GFLOP/s for 32 rows of a
    (1536, 576) map, ×1.5 for a whole step of a 135M model (AMD Zen 3).
    """

    def product(linear: nn.Linear, x: Tensor) -> Tensor:
        rows = torch.mm(linear.weight, x.flatten(0, -2).T.contiguous()).T.contiguous()
        return (rows if linear.bias is None else rows.add_(linear.bias)).view(*x.shape[:-1], -1)

    changed = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and _plain(module.weight)
    ]
    for module in changed:
        module.forward = partial(product, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _sample(model: nn.Module, tokens: Tensor, temperature: Tensor, uniform: Tensor) -> Iterator[None]:
    """Fill the free ones of tokens (B, K) one column after the other, yielding after each.

    Prompts have no forward of their own: as long as one row draws, all have to go step by step, and a row that starts
    with a random token draws from its second token on.

    Args:
        temperature: (B,).
        uniform: (B, K − 1) in [0, 1).
    """
    cache = _fixed_cache(model, uniform.shape[1])
    for step in range(uniform.shape[1]):
        output = model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)
        drawn = draw_tokens(output.logits[:, -1].float().div_(temperature[:, None]), uniform[:, step])
        following = tokens[:, step + 1]
        following.copy_(torch.where(following == FREE, drawn, following))
        yield


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
