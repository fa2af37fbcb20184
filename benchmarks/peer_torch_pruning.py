"""Torch-Pruning for peers.py: group Taylor importance on the MLPs.

Gradients of the mean loss are accumulated over all calibration windows, as its importance wants them. `local` gives
every layer the same width; `global` ranks the units of all layers together, which its documentation calls the better
structure, at the risk of pruning some layers too far. (Isomorphic pruning, its answer to that risk, ranks groups of one
shape together; all MLPs have one shape.) Only gate and up are roots of groups: attention and the hidden size stay.
"""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from peer_worker import arguments, first_loss, load_dense, read_windows, report, truncates_to, uniform_width, widths_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

IMPORTANCE = {"group_reduction": "mean", "normalizer": "mean", "multivariable": False}


def mlp_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → weight of every gate, up and down: what a score is computed of."""
    return {name: p for name, p in model.named_parameters() if ".mlp." in name}


def collect_gradients(model: Any, windows: Tensor) -> None:
    """Leave ∂L/∂W in `.grad`, L the mean loss of all windows, one window at a time."""
    for window in windows.split(1):
        (model(input_ids=window, labels=window, use_cache=False).loss / len(windows)).backward()


def restore_gradients(model: Any, windows: Tensor, path: Path) -> tuple[float, int]:
    """The same from a file where an earlier row has left them; else compute and leave them there.

    Returns:
        The seconds that computing them took, and the peak resident bytes of the process that did.
    """
    weights = mlp_weights(model)
    if path.exists():
        with safe_open(path, "pt") as file:
            for name, weight in weights.items():
                weight.grad = file.get_tensor(name)
            return float(file.metadata()["seconds"]), int(file.metadata()["peak_bytes"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    start = time.perf_counter()
    collect_gradients(model, windows)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    unfinished = path.with_suffix(".unfinished")
    gradients = {name: weight.grad for name, weight in weights.items()}
    save_file(gradients, unfinished, {"seconds": str(seconds), "peak_bytes": str(peak)})
    unfinished.replace(path)
    return seconds, peak


def prune(model: Any, keep: float, all_layers: bool) -> None:
    """Cut the MLPs of a model that has gradients, in place."""
    # Here, so that --help works where it is not installed.
    import torch_pruning

    full, layers = model.config.intermediate_size, model.config.num_hidden_layers
    # It keeps int(total · (1 − ratio)) units.
    total, target = (full * layers, round(keep * full * layers)) if all_layers else (full, uniform_width(model, keep))
    roots = [m for name, m in model.named_modules() if name.endswith((".gate_proj", ".up_proj"))]
    ignored = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)) and m not in roots]
    # Tracing follows autograd, so every parameter has to be part of the graph.
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs={"input_ids": torch.arange(8)[None], "use_cache": False},
        importance=torch_pruning.importance.GroupTaylorImportance(**IMPORTANCE),
        global_pruning=all_layers,
        pruning_ratio=1 - truncates_to(target, total),
        ignored_layers=ignored,
        output_transform=lambda output: output.logits,
    )
    pruner.step()


def main() -> None:
    """The command line."""
    args = arguments(__doc__, ("local", "global"))
    model, windows = load_dense(args.model), read_windows(args.windows)
    loss = first_loss(model, windows)
    seconds, peak = restore_gradients(model, windows, args.scratch / "torch_pruning_gradients.safetensors")
    start = time.perf_counter()
    prune(model, args.keep, args.variant == "global")
    seconds += time.perf_counter() - start
    settings = {"importance": "GroupTaylorImportance", **IMPORTANCE, "global_pruning": args.variant == "global"}
    report(args.result, model, {"first_loss": loss, "settings": settings, "seconds": seconds, "peak_bytes": peak})
    # One number is all that a stock configuration has room for: the largest, where widths differ.
    model.config.intermediate_size = max(widths_of(model))
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
