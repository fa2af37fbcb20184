"""Tokens per second, of one model, or of two in turn, so that their difference can be told from the machine's noise.

Two measurements, one after the other, differ by what else the machine did meanwhile: on two cores, ×0.90 and ×1.36 were
both printed for one pair of models. Run in turn, A B · B A · A B …, both models of a pair meet the same machine, and a
slow drift favours neither.

The rule. The ratio of a pair is second over first, of neighbours in time. Of n such ratios the median r is shown, with
the interval [x_(k), x_(n+1−k)] of the sorted ratios, k the largest number with P(Binomial(n, ½) < k) ≤ 2.5 %. Whatever
the distribution of the noise, this interval misses the true median in at most 5 % of all measurements (it inverts the
sign test). A ratio whose interval contains 1 is within noise. A fixed share of the pairs, such as the 20th to the 80th
percentile, would not do: it does not shrink with n, and so would call real differences noise however long one measured.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from minisp.errors import ConfigError
from minisp.evaluate.perplexity import keeps_logits, max_positions, text_config
from minisp.text.windows import evaluating

# Turns at least, however slow the models: of fewer than six pairs, no interval can exclude 1.
MIN_TURNS = 7
# After which no further turn begins. Of SmolLM2-135M on two cores, that is 10 to 20 pairs.
BUDGET_SECONDS = 30.0
# Chance that an interval misses the true median.
MISS = 0.05

Opener = Callable[[], AbstractContextManager[nn.Module]]
"""Gives a model for the time of a block: one that is in memory anyway, or one that is loaded for it."""


@dataclass(frozen=True)
class Throughput:
    """Tokens per second, medians over turns after one warm-up, and how they were measured.

    Args:
        prefill_tokens_per_second: B · prompt_tokens over the time of one forward that fills the KV cache.
        decode_tokens_per_second: B · new_tokens over the time of as many greedy steps that follow, one token each.
        prefill_range, decode_range: slowest and fastest turn, in tokens per second.
        prompt_tokens, new_tokens, batch, turns: the protocol, prompt and new tokens as clipped to the positions that
            the model has.
        device, dtype: where and in what type.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_range: tuple[float, float]
    decode_range: tuple[float, float]
    prompt_tokens: int
    new_tokens: int
    batch: int
    turns: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Ratio:
    """The second model's speed over the first's.

    Args:
        median: of the ratios pair by pair.
        low, high: the interval of that median, see the module; least and largest ratio where there are few pairs.
        pairs: how many.
        within_noise: the interval contains 1, or the pairs are too few for one.
    """

    median: float
    low: float
    high: float
    pairs: int
    within_noise: bool


@dataclass(frozen=True)
class Generation:
    """What is timed: a prompt (B, L) of random tokens is filled in, and greedy tokens follow.

    Args:
        prompt_tokens, new_tokens, batch: how many; `seed` of the prompt.
    """

    prompt_tokens: int = 256
    new_tokens: int = 32
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}. Pass such a number.")

    def within(self, model: nn.Module) -> "Generation":
        """Clipped to the positions that a model has."""
        positions = max_positions(model)
        if positions is None:
            return self
        new_tokens = min(self.new_tokens, max(positions // 2, 1))
        prompt_tokens = min(self.prompt_tokens, max(positions - new_tokens, 1))
        return Generation(prompt_tokens, new_tokens, self.batch, self.seed)


@dataclass(frozen=True)
class _Turn:
    """Seconds of one generation, and of what."""

    prefill: float
    decode: float
    generation: Generation
    device: str
    dtype: str


def throughput(
    openers: Sequence[Opener],
    generation: Generation | None = None,
    *,
    budget: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Throughput], list[dict[str, Ratio]]]:
    """Speed of transformers causal language models with their own KV cache, taken in turn.

    Args:
        openers: the models.
        generation: what is timed; None takes the defaults.
        budget: seconds after which no turn begins, but `MIN_TURNS` are always taken; None takes `BUDGET_SECONDS`.
        on_progress: called after every turn with (turns done, turns expected).

    Returns:
        The speed of each model; and of each model after the first, {"prefill": ratio, "decode": ratio} to the first.

    Raises:
        ConfigError: a count below 1.
    """
    generation = generation or Generation()
    budget = BUDGET_SECONDS if budget is None else budget
    for opener in openers:
        # What one model has no positions for, none is asked for.
        generation = _turn(opener, generation, warm_up=True).generation
    turns: list[list[_Turn]] = [[] for _ in openers]
    done, began = 0, time.perf_counter()
    while done < MIN_TURNS or time.perf_counter() - began < budget:
        order = range(len(openers))
        for place in order if done % 2 == 0 else reversed(order):
            turns[place].append(_turn(openers[place], generation))
        done += 1
        if on_progress is not None:
            spent = time.perf_counter() - began
            on_progress(done, max(done, MIN_TURNS, round(budget / max(spent / done, 1e-9))))
    if on_progress is not None:
        on_progress(done, done)
    ratios = [
        {
            "prefill": paired_ratio([t.prefill for t in turns[0]], [t.prefill for t in other]),
            "decode": paired_ratio([t.decode for t in turns[0]], [t.decode for t in other]),
        }
        for other in turns[1:]
    ]
    return [_throughput(own) for own in turns], ratios


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """How much faster `second` is, from the seconds of both, pair by pair; the rule is the module's."""
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    count = len(ratios)
    place = interval_place(count)
    low, high = ratios[max(place, 1) - 1], ratios[count - max(place, 1)]
    return Ratio(statistics.median(ratios), low, high, count, within_noise=place == 0 or low <= 1 <= high)


def interval_place(count: int) -> int:
    """k of the interval: the largest with 2 · P(Binomial(count, ½) < k) ≤ `MISS`; 0 where there is none."""
    place, below = 0, 0
    # A quotient of whole numbers: 2ⁿ itself is no float from 1024 pairs on.
    while 2 * (below := below + comb(count, place)) / 2**count <= MISS:
        place += 1
    return place


def _throughput(turns: Sequence[_Turn]) -> Throughput:
    last = turns[-1]
    batch, prompt, new = last.generation.batch, last.generation.prompt_tokens, last.generation.new_tokens
    prefill = [batch * prompt / turn.prefill for turn in turns]
    decode = [batch * new / turn.decode for turn in turns]
    return Throughput(
        prefill_tokens_per_second=statistics.median(prefill),
        decode_tokens_per_second=statistics.median(decode),
        prefill_range=(min(prefill), max(prefill)),
        decode_range=(min(decode), max(decode)),
        prompt_tokens=prompt,
        new_tokens=new,
        batch=batch,
        turns=len(turns),
        device=last.device,
        dtype=last.dtype,
    )


def _turn(opener: Opener, generation: Generation, *, warm_up: bool = False) -> _Turn:
    """One generation by a model; a warm-up makes few tokens."""
    with ExitStack() as stack:
        model = stack.enter_context(opener())
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        parameter = next(model.parameters())
        own = generation.within(model)
        generator = torch.Generator().manual_seed(own.seed)
        shape = (own.batch, own.prompt_tokens)
        prompt = torch.randint(text_config(model).vocab_size, shape, generator=generator).to(parameter.device)
        prefill, decode = time_generation(model, prompt, min(own.new_tokens, 4) if warm_up else own.new_tokens)
    return _Turn(prefill, decode, own, str(parameter.device), str(parameter.dtype).removeprefix("torch."))


def time_generation(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill of prompt (B, L), and of `new_tokens` greedy steps after it."""
    last_only = {"logits_to_keep": 1} if keeps_logits(model) else {}
    began = _now(prompt.device)
    output = model(input_ids=prompt, use_cache=True, **last_only)
    token = output.logits[:, -1:].argmax(dim=-1)
    filled = _now(prompt.device)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return filled - began, _now(prompt.device) - filled


def _now(device: torch.device) -> float:
    """Wall time in seconds once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
