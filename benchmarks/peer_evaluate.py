"""What a pruned folder is worth, for peers.py: does plain transformers load it, its parameters, perplexity by domain.

Every folder is read by a fresh process of minisp's environment. `stock` means that transformers loads it with no code
but its own, `own code` that the folder brings a modelling file. What neither loads is put together from the shapes of
its weights, so that it is measured too, and the first line of the error is kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from minisp.evaluate.perplexity import perplexity
from minisp.models.layers import fast_layers


def load_plainly(folder: Path, *, own_code: bool) -> Any:
    """The folder by `from_pretrained`, in float32; RuntimeError where weights are missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=own_code, use_safetensors=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind.endswith("_keys")}
    if wrong:
        raise RuntimeError(f"Expected every weight to have its place, got {wrong}.")
    return model


def rebuild(folder: Path) -> Any:
    """A model of the folder's configuration whose linear maps have the shapes of the weights that are there."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    weights = {name: w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}
    for name, weight in weights.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and module.weight.shape != weight.shape:
            module.out_features, module.in_features = weight.shape
            module.weight = nn.Parameter(torch.empty_like(weight))
    left = model.load_state_dict(weights, strict=False)
    if left.unexpected_keys or set(left.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"{folder}: expected the weights of {type(model).__name__}, got {left}.")
    model.tie_weights()
    return model


def load(folder: Path) -> tuple[Any, str, str]:
    """The model, how it was loaded (stock, own code, no), and the first line of the error of stock classes."""
    try:
        return load_plainly(folder, own_code=False), "stock", ""
    # Whatever is raised is the finding.
    except Exception as found:
        line = str(found).strip().splitlines()[0].replace(str(folder), folder.name)
        error = f"{type(found).__name__}: {line}"
    if "auto_map" in json.loads((folder / "config.json").read_text("utf-8")):
        return load_plainly(folder, own_code=True), "own code", error
    return rebuild(folder), "no", error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="safetensors file: domain → tokens (T,), int64")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    model, loads, error = load(args.folder)
    model.eval()
    with fast_layers(model):
        values = {
            name: perplexity(model, ids, window=min(args.window, len(ids))).value
            for name, ids in load_file(args.texts).items()
        }
    parameters = sum(p.numel() for p in model.parameters())
    found = {"loads": loads, "load_error": error, "parameters": parameters, "perplexity": values}
    args.result.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
