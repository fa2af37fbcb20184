"""One model, measured: parameters, bytes, perplexity on named texts, tokens per second; and several side by side."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from minisp.architecture import CausalLM, known_model_types
from minisp.builtin import code_text, documentation_text
from minisp.checkpoint import Checkpoint
from minisp.choice import FEWEST_TOKENS, Choices, continuation_choices
from minisp.config import MinifyConfig
from minisp.device import compute_device, compute_dtype
from minisp.errors import CalibrationError
from minisp.evaluate import Perplexity, Throughput, perplexity, throughput
from minisp.hub import load_tokenizer
from minisp.model import load_model
from minisp.plan_view import megabytes, millions
from minisp.workplace import Progress

CODE_CHARACTERS = 60_000


@dataclass(frozen=True)
class Protocol:
    """How perplexity is measured: windows from the start of a text, each scored on all of its tokens but the first.

    Attributes:
        window: tokens per window.
        stride: tokens between the starts of two windows; None means the window. A shorter stride scores only the
            tokens that no earlier window scored.
        max_windows: windows at most; None takes all of the text.
        questions: of the multiple-choice check on every text, see `minisp.choice`; 0 leaves it out.
    """

    window: int = 1024
    stride: int | None = None
    max_windows: int | None = 20
    questions: int = 0


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        parameters: number of parameters, tied ones once.
        bytes: size of the weights on disk.
        perplexity: text name → perplexity with its protocol.
        choices: text name → how often the model knows which passage goes on; without texts too short for it.
        throughput: tokens per second, None where it was not measured.
        device, dtype: where and in what type.
    """

    parameters: int
    bytes: int
    perplexity: dict[str, Perplexity]
    choices: dict[str, Choices]
    throughput: Throughput | None
    device: str
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def builtin_texts() -> dict[str, str]:
    """Two domains that are at hand everywhere: half of Python's documentation, which the default calibration leaves
    alone, and source code of its standard library."""
    return {"documentation": documentation_text("odd"), "code": code_text(CODE_CHARACTERS)}


def tokenize(folder: Path, texts: Mapping[str, str]) -> dict[str, Tensor]:
    """Texts as (T,) int64 tokens of the folder's tokenizer.

    Raises:
        CalibrationError: the folder has no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CalibrationError(f"{folder}: expected a tokenizer beside the weights, found none. Copy one there.")
    return {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in texts.items()}


def measure(
    folder: Path,
    tokens: Mapping[str, Tensor],
    protocol: Protocol,
    *,
    speed: bool = True,
    config: MinifyConfig | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Load a checkpoint and measure it.

    Args:
        folder: checkpoint folder.
        tokens: text name → (T,) int64.
        protocol: how to measure perplexity.
        speed: measure tokens per second too.
        config: its `device` and `dtype` are used.
        progress: called with (phase, done, total).

    Raises:
        MinispError: the checkpoint cannot be loaded, or a text is shorter than a window.
    """
    config = config or MinifyConfig()
    device = compute_device(config)
    model = load_any(folder, device, compute_dtype(config, device))

    def report(name: str) -> Any:
        return lambda done, total: progress(f"perplexity of {folder.name}, {name}", done, total) if progress else None

    scores = {
        name: perplexity(
            model,
            ids,
            window=protocol.window,
            stride=protocol.stride,
            max_windows=protocol.max_windows,
            on_progress=report(name),
        )
        for name, ids in tokens.items()
    }
    asked = {name: ids for name, ids in tokens.items() if protocol.questions and len(ids) >= FEWEST_TOKENS}
    choices = {name: continuation_choices(model, ids, num_questions=protocol.questions) for name, ids in asked.items()}
    return Measurement(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        perplexity=scores,
        choices=choices,
        throughput=throughput(model) if speed else None,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def protocol_lines(measured: Measurement) -> list[str]:
    """How the figures came about, as run: one line per text, one for the speed."""
    lines = [
        f"perplexity, {name}: {p.num_tokens:,} tokens scored in {p.num_windows} windows of {p.window}, stride "
        f"{p.stride}, from the start of the text, computed in {measured.dtype}, loss in float32"
        for name, p in measured.perplexity.items()
    ]
    lines += [
        f"right continuations, {name}: {c.num_questions} questions, {c.num_answers} answers of {c.continuation} tokens "
        f"after {c.context}; chance gives {1 / c.num_answers:.0%}, standard error {c.standard_error:.1%}"
        for name, c in measured.choices.items()
    ]
    if (speed := measured.throughput) is not None:
        lines.append(
            f"tokens/s: medians of {speed.repeats}, batch {speed.batch}, prompt of {speed.prompt_tokens} tokens, "
            f"{speed.new_tokens} new ones, {measured.dtype} on {measured.device}"
        )
    return lines


def load_any(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A checkpoint as a model in memory: known families by our own reader, others by transformers; no remote code."""
    checkpoint = Checkpoint.open(folder)
    if checkpoint.config.model_type in known_model_types():
        return load_model(checkpoint, device, dtype)
    model: CausalLM = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    return model.to(device).eval()


def measurement_table(measured: Mapping[str, Measurement]) -> Table:
    """Measurements side by side, the first one being what the ratios refer to."""
    first = next(iter(measured.values()))
    table = Table(title="Measured" if len(measured) == 1 else "Before and after", title_justify="left")
    table.add_column("")
    for name in measured:
        table.add_column(escape(name), justify="right")
    if len(measured) == 2:
        table.add_column("ratio", justify="right")
    rows: list[tuple[str, list[float], Any]] = [
        ("parameters", [m.parameters for m in measured.values()], millions),
        ("bytes on disk", [m.bytes for m in measured.values()], megabytes),
    ]
    for text in first.perplexity:
        rows.append(
            (escape(f"perplexity, {text}"), [m.perplexity[text].value for m in measured.values()], "{:.2f}".format)
        )
    for text in first.choices:
        rows.append(
            (
                escape(f"right continuations, {text}"),
                [m.choices[text].accuracy for m in measured.values()],
                "{:.0%}".format,
            )
        )
    speeds = [m.throughput for m in measured.values() if m.throughput is not None]
    if len(speeds) == len(measured):
        rows.append(("prefill tokens/s", [s.prefill_tokens_per_second for s in speeds], "{:,.0f}".format))
        rows.append(("decode tokens/s", [s.decode_tokens_per_second for s in speeds], "{:,.1f}".format))
    for label, values, shown in rows:
        ratio = [f"{values[1] / values[0]:.3f}"] if len(measured) == 2 else []
        table.add_row(label, *[shown(value) for value in values], *ratio)
    return table
