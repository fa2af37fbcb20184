"""The calibration text of one run: what an earlier run has left, what the caller gave, or what the model writes."""

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.errors import CalibrationError, OutputError
from minisp.models.stream import Stream
from minisp.phases.run import Run
from minisp.store.names import Record
from minisp.text.calibration import Calibration, load_calibration
from minisp.text.written import TEXTS_PER_WINDOW, WRITTEN_AT_ONCE, describe, write_windows

# exp of the entropy of single tokens: 250 to 800 for prose, documentation and source code, below 20 for logs, tables
# and text that repeats itself (SmolLM2's tokens, 4k to 65k of them). Small vocabularies, of bytes say, have less.
FEWEST_EFFECTIVE_TOKENS, OF_VOCABULARY = 100, 1 / 400
# With fewer tokens than units, damping alone decides most of the refit.
FEWEST_TOKENS_PER_UNIT = 2


def calibrate(
    stream: Stream, source: Any, tokenizer: Any, config: MinifyConfig, run: Run, *, write_room: int | None
) -> Calibration:
    """The calibration windows: those of the run that is continued, or new ones, which become a record.

    Args:
        source, tokenizer: as for `minisp.fast.minify`.
        write_room: bytes for the caches of what the model writes itself; None where it writes nothing.

    Raises:
        CalibrationError: the text is missing, too short, or does not fit the model.
        OutputError: the earlier run had other windows.
    """
    name = Record.WINDOWS.value
    if run.ranks.first and not (run.shared.has(name) and source is None):
        text = _new_windows(stream, source, tokenizer, config, run, write_room)
        width = max(structure.width for structure in stream.structures)
        for sentence in narrowness(text.windows, width, stream.model.config.vocab_size):
            warnings.warn(sentence, stacklevel=3)
        if run.shared.has(name):
            if run.shared.facts(name)["fingerprint"] != text.fingerprint:
                raise OutputError(
                    "Calibration text: expected that of the earlier run in the scratch folder, got another one. Pass "
                    "the same text, windows and generic share, leave calibration out, or use another scratch folder."
                )
        else:
            facts = {"description": list(text.description), "fingerprint": text.fingerprint}
            with run.shared.writing(name, **facts) as append:
                append("windows", text.windows)
            run.shared.settle()
    run.ranks.wait()
    windows: Tensor = run.shared.read(name, "windows")
    if len(windows) < run.ranks.size:
        raise CalibrationError(
            f"Calibration text: expected a window for each of {run.ranks.size} processes, got {len(windows)}. Pass "
            "more text or shorter windows, or start fewer processes."
        )
    return Calibration(windows, tuple(run.shared.facts(name)["description"]))


def _new_windows(
    stream: Stream, source: Any, tokenizer: Any, config: MinifyConfig, run: Run, write_room: int | None
) -> Calibration:
    """The user's text and a share of generic text; where no source is given, generic text alone."""
    if source is None:
        own = "text that the model writes itself and " if write_room is not None else ""
        warnings.warn(
            f"No calibration text was given: calibrating on generic text alone, which is {own}the documentation and "
            "the source code that come with Python. Text like what the model will see, from several domains, gives a "
            "better result.",
            stacklevel=4,
        )

    text = load_calibration(
        source,
        tokenizer,
        num_windows=config.num_windows,
        window=config.window,
        vocab_size=stream.model.config.vocab_size,
        max_positions=getattr(stream.model.config, "max_position_embeddings", None),
        writer=None if write_room is None else partial(_written, stream, tokenizer, config, run, write_room),
        generic=config.generic,
    )
    if not run.shared.has(Record.WRITTEN.value):
        return text
    how = f"the model wrote {describe(tokenizer, stream.model.config.vocab_size)}"
    return replace(text, description=(*text.description, how))


def _written(
    stream: Stream, tokenizer: Any, config: MinifyConfig, run: Run, room: int, num_windows: int, window: int
) -> Tensor:
    """Windows (N, L) that the model has written; a record, so that a run that goes on does not write them again."""
    wanted = {"num_windows": num_windows, "window": window}
    name = Record.WRITTEN.value
    if not run.shared.has(name) or {key: run.shared.facts(name).get(key) for key in wanted} != wanted:
        run.shared.drop(name)
        for _ in stream.visit([range(len(stream.layers))]):
            windows = write_windows(
                stream.model,
                tokenizer,
                **wanted,
                seed=config.seed,
                batch=_written_at_once(stream, room, window),
                on_progress=lambda done, total: run.progress("writing calibration text", done, total),
            )
        with run.shared.writing(name, **wanted) as append:
            append(name, windows)
        run.shared.settle()
    written: Tensor = run.shared.read(name, name)
    return written


def _written_at_once(stream: Stream, room: int, window: int) -> int:
    """Windows of so many tokens whose KV caches fit in so many bytes."""
    config: Any = stream.model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache: int = 2 * len(stream.layers) * heads * size * window * stream.dtype.itemsize
    # The logits in float32, their cumulative sum, and what a comparison of two makes of them.
    logits: int = TEXTS_PER_WINDOW * 3 * 4 * config.vocab_size
    return max(1, min(WRITTEN_AT_ONCE, room // (cache + logits)))


def narrowness(windows: Tensor, width: int, vocab_size: int) -> list[str]:
    """What makes calibration windows (N, L) a poor sample of language, for layers of `width` units: a sentence each."""
    tokens = windows.flatten()
    share = torch.bincount(tokens).double() / len(tokens)
    effective = math.exp(float(torch.special.entr(share).sum()))
    distinct = len(torch.unique(windows, dim=0))
    found = []
    if effective < min(FEWEST_EFFECTIVE_TOKENS, vocab_size * OF_VOCABULARY):
        found.append(
            f"The calibration text is narrow: {len(share.nonzero()):,} different tokens, used as unevenly as "
            f"{effective:.0f} even ones; prose has several hundred. The result may fit nothing else. Mix in other text."
        )
    if 2 * distinct <= len(windows) and len(windows) > 1:
        found.append(f"Of {len(windows)} calibration windows only {distinct} are different. Add other text.")
    if len(tokens) < FEWEST_TOKENS_PER_UNIT * width:
        found.append(
            f"{len(tokens):,} calibration tokens are few for layers of {width:,} units: the refit has little to go by. "
            f"At least {FEWEST_TOKENS_PER_UNIT * width:,}, better ten times as many, give a better result."
        )
    return found
