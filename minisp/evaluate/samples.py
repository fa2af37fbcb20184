"""What models write after a prompt, token by token the most likely one: to be read side by side, not to be counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minisp.config import MinifyConfig
from minisp.device import compute_device, compute_dtype
from minisp.errors import CalibrationError, ConfigError
from minisp.evaluate.measure import load_any
from minisp.evaluate.perplexity import max_positions
from minisp.phases.run import Progress
from minisp.store.hub import load_tokenizer
from minisp.text.windows import evaluating

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List three things to check before a long journey by car.",
)


def greedy_texts(
    folder: Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    new_tokens: int = 80,
    config: MinifyConfig | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Load a checkpoint and let it go on from each prompt, with the tokenizer of its folder.

    Args:
        prompts: put into the tokenizer's chat template where it has one.
        new_tokens: at most; less where the model ends its text.
        config: its `device` and `dtype` are used.
        progress: called with (phase, prompts done, prompts in all).

    Raises:
        ConfigError: `new_tokens` is below 1, or a prompt and they have no room in the model's positions.
        MinispError: the checkpoint cannot be loaded, or has no tokenizer.
    """
    if new_tokens < 1:
        raise ConfigError(f"Expected new_tokens of at least 1, got {new_tokens}. Pass such a number.")
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CalibrationError(f"{folder}: expected a tokenizer beside the weights, found none. Copy one there.")
    config = config or MinifyConfig()
    device = compute_device(config)
    model = load_any(folder, device, compute_dtype(config, device))
    positions, texts = max_positions(model), []
    for done, prompt in enumerate(prompts):
        if progress is not None:
            progress(f"text of {folder.name}", done, len(prompts))
        ids = prompt_tokens(tokenizer, prompt)
        if positions is not None and len(ids) + new_tokens > positions:
            raise ConfigError(
                f"Prompt {prompt!r}: expected at most {positions} tokens with those that follow, the positions this "
                f"model has, got {len(ids)} and {new_tokens}. Ask for fewer, or pass a shorter prompt."
            )
        texts.append(tokenizer.decode(_greedy(model, ids, new_tokens, tokenizer.eos_token_id)))
    if progress is not None:
        progress(f"text of {folder.name}", len(prompts), len(prompts))
    return texts


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt: a chat's where the tokenizer has a template for chats, else those of the text."""
    if getattr(tokenizer, "chat_template", None):
        try:
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        # A template is a program that comes with the model: it may raise anything.
        except Exception:
            pass
    return list(tokenizer(prompt)["input_ids"])


@torch.no_grad()
def _greedy(model: Any, ids: list[int], new_tokens: int, end: int | None) -> list[int]:
    """At most so many tokens after ids (L,), without the end token."""
    device = next(model.parameters()).device
    token, cache = torch.tensor([ids], device=device), None
    written: list[int] = []
    with evaluating(model):
        while len(written) < new_tokens:
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token, cache = output.logits[:, -1:].argmax(dim=-1), output.past_key_values
            if int(token) == end:
                break
            written.append(int(token))
    return written
