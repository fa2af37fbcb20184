"""The calibration text of one run: what an earlier run has left, what the caller gave, or what the model writes."""

import warnings
from typing import Any

from torch import Tensor

from minisp.architecture import CausalLM
from minisp.calibration import Calibration, load_calibration, write_windows
from minisp.errors import OutputError
from minisp.model import load_model
from minisp.planner import Plan
from minisp.stream import Stream
from minisp.workplace import Progress, Workplace


def calibrate(stream: Stream, source: Any, tokenizer: Any, plan: Plan, work: Workplace) -> Calibration:
    """The calibration windows: those of the run that is continued, or new ones, which become a record.

    Args:
        source, tokenizer: as for `minisp.fast.minify`.

    Raises:
        CalibrationError: the text is missing, too short, or does not fit the model.
        OutputError: the earlier run had other windows.
    """
    name = "windows"
    if work.ranks.first and not (work.shared.has(name) and source is None):
        text = _new_windows(stream, source, tokenizer, plan, work.progress)
        if work.shared.has(name):
            if work.shared.facts(name)["fingerprint"] != text.fingerprint:
                raise OutputError(
                    "Calibration text: expected that of the earlier run in the scratch folder, got another one. Pass "
                    "the same text and windows, leave calibration out, or use another scratch folder."
                )
        else:
            facts = {"description": list(text.description), "fingerprint": text.fingerprint}
            with work.shared.writing(name, **facts) as append:
                append("windows", text.windows)
            work.shared.settle()
    work.ranks.wait()
    return Calibration(work.shared.read(name, "windows"), tuple(work.shared.facts(name)["description"]))


def _new_windows(stream: Stream, source: Any, tokenizer: Any, plan: Plan, progress: Progress) -> Calibration:
    """Where no source is given, the model writes some text itself, if it fits in memory whole."""
    config = plan.config
    fits = stream.checkpoint is None or len(plan.segments) == 1
    if source is None:
        text = "text that the model writes itself and " if fits else ""
        warnings.warn(
            f"No calibration text was given: calibrating on {text}the documentation that comes with Python. Text like "
            "what the model will see, from several domains, gives a better result.",
            stacklevel=4,
        )

    def write(num_windows: int, window: int) -> Tensor:
        model: CausalLM = stream.model
        if stream.checkpoint is not None:
            model = load_model(stream.checkpoint, stream.device, stream.dtype)
        windows: Tensor = write_windows(
            model,
            tokenizer,
            num_windows=num_windows,
            window=window,
            seed=config.seed,
            on_progress=lambda done, total: progress("writing calibration text", done, total),
        )
        return windows

    return load_calibration(
        source,
        tokenizer,
        num_windows=config.num_windows,
        window=config.window,
        vocab_size=stream.model.config.vocab_size,
        max_positions=getattr(stream.model.config, "max_position_embeddings", None),
        writer=write if fits else None,
    )
