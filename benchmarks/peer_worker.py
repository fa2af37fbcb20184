"""What the workers of peers.py share; they run in the environments of the peers, so nothing here imports minisp.

A worker loads the model in float32, prunes it on the windows that it is handed, saves it to a folder, and writes what
it did as JSON.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


def arguments(description: str | None, variants: Sequence[str]) -> argparse.Namespace:
    """The command line that peers.py calls every worker with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of a Llama-shaped model")
    parser.add_argument("--windows", type=Path, required=True, help="safetensors file: windows (N, L), int64")
    parser.add_argument("--keep", type=float, required=True, help="share of all MLP units that may stay")
    parser.add_argument("--variant", choices=variants, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pruned model")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for what later rows can use again")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def read_windows(path: Path) -> Tensor:
    """The calibration windows, (N, L) int64."""
    return load_file(path)["windows"]


def load_dense(folder: str) -> Any:
    """The dense model in float32.

    transformers 5 writes the base of the rotary angles into `rope_parameters`; transformers 4 looks for `rope_theta`,
    and where that is missing computes, without a word, with another base.
    """
    config = AutoConfig.from_pretrained(folder)
    if int(transformers.__version__.split(".")[0]) < 5:
        raw = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        config.rope_theta = raw.get("rope_parameters", {}).get("rope_theta", config.rope_theta)
    return AutoModelForCausalLM.from_pretrained(folder, config=config).float().eval()


@torch.no_grad()
def first_loss(model: Any, windows: Tensor) -> float:
    """Mean loss of the first window in nats: peers.py compares it, to know that all load the same model."""
    return float(model(input_ids=windows[:1], labels=windows[:1]).loss)


def widths_of(model: Any) -> list[int]:
    """Width of every layer's MLP."""
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


def uniform_width(model: Any, keep: float) -> int:
    """The width that keeps this share of the units when every layer has the same: to the nearest unit."""
    return round(keep * model.config.intermediate_size)


def truncates_to(count: int, total: int) -> float:
    """A share for which int(share · total) is `count`: half a unit more keeps rounding from losing one."""
    return (count + 0.5) / total


def report(path: Path, model: Any, found: dict[str, Any]) -> None:
    """Write what peers.py reads: the widths of the model, and what was found.

    `found` holds `first_loss`, `settings`, `seconds` of pruning alone, and `peak_bytes` of an earlier process where
    its work was used again.
    """
    path.write_text(json.dumps({"widths": widths_of(model), **found}), "utf-8")
