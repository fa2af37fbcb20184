"""What the benchmarks of quality calibrate and evaluate on, and the options that say so."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from naive import EVALUATION
from torch import Tensor

from minisp.evaluate.measure import builtin_texts
from minisp.text.calibration import load_calibration
from minisp.text.written import write_windows

# Of every neutral domain.
NEUTRAL_WINDOWS = 8


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts, and where results and what is made once go."""
    parser.add_argument("model", help="Hugging Face folder of a Llama-shaped model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--neutral", type=Path, help="folder of .txt files of further domains to evaluate on")
    parser.add_argument("--windows", type=int, default=291, help="of the calibration text, %(default)s by default")
    parser.add_argument("--window", type=int, default=512, help="tokens of a calibration window, 512 by default")
    parser.add_argument("--label", default="", help="appended to the name of the result file")
    cache = Path.home() / ".cache/minisp/quality"
    parser.add_argument(
        "--cache", type=Path, default=cache, help="folder for what is made once, %(default)s by default"
    )


def written_windows(cache: Path, tokenizer: Any, model: Any, num_windows: int, window: int) -> Tensor:
    """(N, L) that the model writes itself, once; `cache` keeps them."""
    path = cache / f"{harness.digest(model.parameters())}_{num_windows}_windows_of_{window}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(write_windows(model, tokenizer, num_windows=num_windows, window=window, seed=0), path)
    windows: Tensor = torch.load(path, weights_only=True)
    return windows


def calibration_windows(arguments: argparse.Namespace, tokenizer: Any, model: Any) -> Tensor:
    """(N, L): what `minify` calibrates on, the text given and the share of generic text that is asked for."""
    count, window = arguments.windows, arguments.window
    writer = partial(written_windows, arguments.cache, tokenizer, model)
    return load_calibration(
        arguments.calibration, tokenizer, num_windows=count, window=window, writer=writer, generic=arguments.generic
    ).windows


def evaluation_texts(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, tuple[Tensor, int]]:
    """Domain → (tokens, windows of 1024 that are evaluated)."""
    texts = {"text": arguments.text.read_text("utf-8"), **builtin_texts()}
    files = sorted(arguments.neutral.glob("*.txt")) if arguments.neutral else []
    texts.update({path.stem: path.read_text("utf-8") for path in files})
    counts = {"text": EVALUATION[0], **dict.fromkeys(builtin_texts(), EVALUATION[0] // 4)}
    return {
        name: (torch.tensor(tokenizer(text, verbose=False)["input_ids"]), counts.get(name, NEUTRAL_WINDOWS))
        for name, text in texts.items()
    }


def measured_on(model: Any, windows: Tensor, texts: dict[str, tuple[Tensor, int]]) -> dict[str, str]:
    """What decides every row, beside the method: digests of the model, and of the tokens on both sides."""
    return {
        "model": harness.digest(model.parameters()),
        "calibration": harness.digest([windows]),
        "evaluation": harness.digest(ids[: n * EVALUATION[1]] for ids, n in texts.values()),
    }
