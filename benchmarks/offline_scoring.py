"""What a causal language model answers: likelihoods of candidates, and greedy completions; both in batches.

Shapes: B rows of L tokens, V vocabulary. Models are transformers' own, or any with their interface, on any device.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from offline_tasks import Question
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

ROWS_AT_ONCE = 64
PROMPTS_AT_ONCE = 16
NEW_TOKENS = 48


def shared(*rows: Sequence[int]) -> int:
    """How many first tokens all rows have in common."""
    return next((i for i, found in enumerate(zip(*rows, strict=False)) if len(set(found)) > 1), min(map(len, rows)))


@torch.no_grad()
def choose(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[list[float]]:
    """Σ log p of every candidate's tokens, in nats, question by question.

    What questions share as a prefix passes the model once; its keys and values are then read by all rows.
    """
    scores: list[list[float]] = []
    for prefix, group in groupby(questions, lambda question: question.prefix):
        members = list(group)
        rows, firsts = [], []
        for question in members:
            asked = prefix + question.question
            own = [tokenizer(asked + candidate)["input_ids"] for candidate in question.candidates]
            # From the same token on for all candidates, wherever the tokenizer draws the border.
            first = min(shared(tokenizer(asked)["input_ids"], row) for row in own)
            rows += own
            firsts += [first] * len(own)
        # Of the prefix, its last token stays with the rows, for it predicts the next one.
        cut = max(min([shared(tokenizer(prefix)["input_ids"], *rows), *firsts]) - 1, 0)
        cache = _read(model, rows[0][:cut]) if cut else None
        found = [
            score
            for start in range(0, len(rows), ROWS_AT_ONCE)
            for score in _score(
                model, cache, cut, rows[start : start + ROWS_AT_ONCE], firsts[start : start + ROWS_AT_ONCE]
            )
        ]
        places = iter(found)
        scores += [[next(places) for _ in question.candidates] for question in members]
    return scores


def _read(model: Any, prefix: list[int]) -> Any:
    """The keys and values of a prefix."""
    return model(
        input_ids=torch.tensor([prefix], device=model.device), use_cache=True, logits_to_keep=1
    ).past_key_values


def _score(model: Any, cache: Any, cut: int, rows: list[list[int]], firsts: list[int]) -> list[float]:
    """Σ log p of the tokens from firsts on, of rows whose first `cut` tokens the cache has."""
    longest = max(map(len, rows)) - cut
    # Padding behind a row is seen by nothing that is scored.
    ids = torch.tensor([row[cut:] + [0] * (longest - len(row) + cut) for row in rows], device=model.device)
    past = None
    if cache is not None:
        past = copy.deepcopy(cache)
        past.batch_repeat_interleave(len(rows))
    earliest = max(min(firsts) - cut - 1, 0)
    logits = model(
        input_ids=ids, past_key_values=past, use_cache=past is not None, logits_to_keep=longest - earliest
    ).logits
    logits = logits[:, -(longest - earliest) : -1].float().log_softmax(-1)
    own = logits.gather(2, ids[:, earliest + 1 :, None])[..., 0]
    places = torch.arange(earliest + 1, longest)
    return [
        float(own[i, (places >= first - cut) & (places < len(row) - cut)].sum())
        for i, (row, first) in enumerate(zip(rows, firsts, strict=True))
    ]


class _Ended(StoppingCriteria):
    """Which rows need no more tokens, by what stands behind their prompts, which end at `begin`."""

    def __init__(self, tokenizer: Any, begin: int, ended: Callable[[str], bool]):
        self.tokenizer, self.begin, self.ended = tokenizer, begin, ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = [self.ended(text) for text in self.tokenizer.batch_decode(input_ids[:, self.begin :])]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[str], ended: Callable[[str], bool]) -> list[str]:
    """The greedy completion of every prompt, up to NEW_TOKENS tokens, or until `ended` says that it needs no more."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    completions: list[str] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = tokenizer(list(prompts[start : start + PROMPTS_AT_ONCE]), return_tensors="pt", padding=True).to(
            model.device
        )
        begin = batch["input_ids"].shape[1]
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([_Ended(tokenizer, begin, ended)]),
        )
        completions += tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)
    return completions
