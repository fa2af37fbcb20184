"""Models, measured: parameters, bytes, perplexity on named texts, tokens per second; one alone, or two side by side."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minisp.config import MinifyConfig
from minisp.device import MEMORY_SHARE, compute_device, compute_dtype
from minisp.errors import CalibrationError
from minisp.evaluate.choices import FEWEST_TOKENS, Choices, continuation_choices
from minisp.evaluate.perplexity import Perplexity, check_windows, exponential, perplexity
from minisp.evaluate.speed import MIN_TURNS, Opener, Ratio, Throughput, throughput
from minisp.models.families import CausalLM, known_model_types
from minisp.models.skeleton import load_model
from minisp.phases.run import Progress
from minisp.store.checkpoint import Checkpoint
from minisp.store.hub import load_tokenizer
from minisp.text.builtin import code_text, documentation_text

CODE_CHARACTERS = 60_000


@dataclass(frozen=True)
class Protocol:
    """How perplexity is measured: windows from the start of a text, each scored on all of its tokens but the first.

    Attributes:
        window: tokens per window.
        stride: tokens between the starts of two windows; None means the window. A shorter stride scores only the
            tokens that no earlier window scored.
        max_windows: windows at most; None takes all of the text.
        questions: of the multiple-choice check on every text, see `minisp.evaluate.choices`; 0 leaves it out.
    """

    window: int = 1024
    stride: int | None = None
    max_windows: int | None = 20
    questions: int = 0


@dataclass(frozen=True)
class Measurement:
    """What was found of one model.

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


@dataclass(frozen=True)
class Comparison:
    """Two models side by side, their speed taken in turn.

    Attributes:
        first, second: what was found of each.
        ratios: "prefill" and "decode" → speed of the second over the first, pair by pair; empty where speed was not
            measured.
        together: both were in memory at once; else each was loaded anew for each of its turns.
    """

    first: Measurement
    second: Measurement
    ratios: dict[str, Ratio]
    together: bool

    def perplexity_ratio(self, *texts: str) -> float:
        """Perplexity of the second model over the first: the geometric mean over the texts named, or over all."""
        pairs = [(self.first.perplexity[text], self.second.perplexity[text]) for text in texts or self.first.perplexity]
        return exponential(math.fsum(second.nll - first.nll for first, second in pairs) / len(pairs))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), **self.ratios_dict()}

    def ratios_dict(self) -> dict[str, Any]:
        """The second model over the first, as plain values for JSON."""
        ratios = {text: self.perplexity_ratio(text) for text in self.first.perplexity}
        return {
            "ratios": {kind: asdict(ratio) for kind, ratio in self.ratios.items()},
            "perplexity_ratios": ratios,
            "geometric_mean_perplexity_ratio": self.perplexity_ratio() if ratios else None,
        }


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


def check_same_tokens(folders: Sequence[Path], first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise `CalibrationError` where two models read a text as different tokens: perplexities are per token."""
    for name, ids in first.items():
        if not torch.equal(ids, second[name]):
            raise CalibrationError(
                f"Text {name}: expected two models with one tokenizer, got {len(ids)} tokens from {folders[0]} and "
                f"{len(second[name])} others from {folders[1]}: perplexities do not compare. Measure each alone."
            )


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
    (found,), _, _ = _measure([folder], tokens, protocol, speed, config or MinifyConfig(), progress)
    return found


def compare(
    folders: Sequence[Path],
    tokens: Mapping[str, Tensor],
    protocol: Protocol,
    *,
    speed: bool = True,
    config: MinifyConfig | None = None,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Measure two checkpoints or more; their speed in turns, all in memory where there is room for all.

    Args and errors are those of `measure`; `tokens` are what all tokenizers give.

    Returns:
        The first model beside each of the others.
    """
    found, ratios, together = _measure(folders, tokens, protocol, speed, config or MinifyConfig(), progress)
    pairs = zip(found[1:], ratios or [{}] * len(found[1:]), strict=True)
    return [Comparison(found[0], other, ratio, together) for other, ratio in pairs]


def _measure(
    folders: Sequence[Path],
    tokens: Mapping[str, Tensor],
    protocol: Protocol,
    speed: bool,
    config: MinifyConfig,
    progress: Progress | None,
) -> tuple[list[Measurement], list[dict[str, Ratio]], bool]:
    """What was found of each model, ratios of speed to the first, and whether all were in memory at once."""
    device = compute_device(config)
    dtype = compute_dtype(config, device)
    checkpoints = [Checkpoint.open(folder) for folder in folders]
    for checkpoint in checkpoints:
        check_texts(checkpoint, tokens, protocol)
    together = len(folders) == 1 or fit_together(checkpoints, device, dtype)
    told: Progress = progress or (lambda phase, done, total: None)
    told("loading", 0, 1)
    openers: list[Opener] = [partial(_loaded, folder, device, dtype) for folder in folders]
    if together:
        openers = [partial(_held, load_any(folder, device, dtype)) for folder in folders]
    told("loading", 1, 1)
    found = []
    for folder, opener in zip(folders, openers, strict=True):
        with opener() as model:
            found.append(_quality(folder, model, tokens, protocol, told))
    if not speed:
        return found, [], together
    told("speed, in turns", 0, MIN_TURNS)
    speeds, ratios = throughput(openers, on_progress=partial(told, "speed, in turns"))
    return [replace(one, throughput=own) for one, own in zip(found, speeds, strict=True)], ratios, together


def check_texts(checkpoint: Checkpoint, tokens: Mapping[str, Tensor], protocol: Protocol) -> None:
    """Raise before any weight is loaded what is wrong with a text (T,), named, or with the protocol."""
    windows: dict[str, Any] = {
        "window": protocol.window,
        "stride": protocol.stride,
        "max_windows": protocol.max_windows,
    }
    for name, ids in tokens.items():
        try:
            check_windows(checkpoint.config, ids, **windows)
        except CalibrationError as error:
            raise CalibrationError(f"Text {name}: {error}") from error


def fit_together(checkpoints: list[Checkpoint], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the models have room beside each other in the memory that is free, by the share that a plan may take."""
    elements = sum(math.prod(place.shape) for one in checkpoints for place in one.tensors.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return elements * dtype.itemsize <= MEMORY_SHARE.get(device.type, MEMORY_SHARE["cpu"]) * free


def load_any(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A checkpoint as a model in memory: known families by our own reader, others by transformers; no remote code."""
    checkpoint = Checkpoint.open(folder)
    if checkpoint.config.model_type in known_model_types():
        return load_model(checkpoint, device, dtype)
    model: CausalLM = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    return model.to(device).eval()


@contextmanager
def _held(model: nn.Module) -> Iterator[nn.Module]:
    """A model that is in memory anyway."""
    yield model


@contextmanager
def _loaded(folder: Path, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A model that is in memory for the time of the block, all of it touched once."""
    model = load_any(folder, device, dtype)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
    yield model


def _quality(folder: Path, model: Any, tokens: Mapping[str, Tensor], protocol: Protocol, told: Progress) -> Measurement:
    """All but the speed."""
    scores = {
        name: perplexity(
            model,
            ids,
            window=protocol.window,
            stride=protocol.stride,
            max_windows=protocol.max_windows,
            on_progress=partial(told, f"perplexity of {folder.name}, {name}"),
        )
        for name, ids in tokens.items()
    }
    asked = {name: ids for name, ids in tokens.items() if protocol.questions and len(ids) >= FEWEST_TOKENS}
    choices = {}
    for done, (name, ids) in enumerate(asked.items()):
        told(f"right continuations of {folder.name}, {name}", done, len(asked))
        choices[name] = continuation_choices(model, ids, num_questions=protocol.questions)
    if asked:
        told(f"right continuations of {folder.name}", len(asked), len(asked))
    return Measurement(
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        perplexity=scores,
        choices=choices,
        throughput=None,
        device=str(next(model.parameters()).device),
        dtype=str(model.dtype).removeprefix("torch."),
    )
