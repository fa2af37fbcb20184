"""The opponent: the paper's recipe in plain PyTorch, as a competent user writes it. Uses nothing of minisp.

Source: "Model Minification: A Taylor-Ridge Framework for Structured Compression" (V. Khasia, 2026). The whole model
is in memory; one calibration pass of ordinary forward and backward; hooks collect what the recipe needs.

Shapes: T tokens, m width, d hidden size, k kept units. x (T, m) is the input of `down_proj`, g (T, m) its gradient.

    score_j = Σ_t |x_tj g_tj|,   G = XᵀX,   S = the units kept by one ranking over all layers,
    W'ᵀ = (G_SS + λ·mean(diag G)·I)⁻¹ G_S: Wᵀ      (the ridge of the paper: it shrinks to zero)
"""

import argparse
import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# λ relative to mean(diag G). It shrinks to zero, so more than the solve needs costs quality: on SmolLM2-135M at 80 %
# kept, perplexity was ×1.329, 1.274, 1.264, 1.264 of dense for 1e-2, 1e-3, 1e-4, 1e-5 (128 windows of 512 tokens).
DAMPING = 1e-4
# Windows of the evaluation text, and tokens of each.
EVALUATION = (20, 1024)


@dataclass
class NaiveResult:
    """The pruned model (the one passed in), the kept units of every layer (sorted int64) and seconds per phase."""

    model: PreTrainedModel
    kept: list[Tensor]
    seconds: dict[str, float]


class Collector:
    """Hooks on one `down_proj`: score (m,) and Gram matrix (m, m), both float32 sums over all tokens seen."""

    def __init__(self, down: nn.Linear) -> None:
        m = down.in_features
        self.score = torch.zeros(m, device=down.weight.device)
        self.gram = torch.zeros(m, m, device=down.weight.device)
        self.handle = down.register_forward_pre_hook(self._capture)

    def _capture(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The detached x keeps the hook from holding the graph that holds the hook.
        x = args[0].detach()
        args[0].register_hook(lambda grad: self._add(x, grad))

    def _add(self, x: Tensor, grad: Tensor) -> None:
        x = x.flatten(0, 1).float()
        self.score += (x * grad.flatten(0, 1)).abs().sum(0)
        self.gram.addmm_(x.T, x)


def mlps(model: PreTrainedModel) -> list[Any]:
    """The gated MLPs of a Llama-shaped model, first layer first."""
    layers: Any = model.model.layers
    return [layer.mlp for layer in layers]


def collect(model: PreTrainedModel, windows: Tensor, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """One calibration pass over `windows` (num_windows, window) int64: scores (m,) and Gram matrices (m, m)."""
    collectors = [Collector(mlp.down_proj) for mlp in mlps(model)]
    for batch in windows.split(batch_size):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad()
    for collector in collectors:
        collector.handle.remove()
    return [c.score for c in collectors], [c.gram for c in collectors]


def rank(scores: list[Tensor], keep: float) -> list[Tensor]:
    """One ranking over all layers: the best fraction `keep` of all units, and never a layer without any."""
    budget = round(keep * sum(len(score) for score in scores))
    mask = torch.zeros(sum(len(score) for score in scores), dtype=torch.bool)
    mask[torch.cat(scores).topk(budget).indices] = True
    for part, score in zip(mask.split([len(score) for score in scores]), scores, strict=True):
        part[score.argmax()] = True
    return [part.nonzero().flatten() for part in mask.split([len(score) for score in scores])]


def ridge(gram: Tensor, weight: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Refitted columns (d, k) float32 for `gram` (m, m), `weight` (d, m) and `kept` (k,), the formula above."""
    rows = gram[kept]
    system = rows[:, kept]
    system.diagonal().add_(damping * gram.diagonal().mean())
    solution: Tensor = torch.linalg.solve(system, rows @ weight.T.float())
    return solution.T


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` that owns `weight` (out, in) and `bias`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


@torch.no_grad()
def prune(mlp: Any, gram: Tensor, kept: Tensor, damping: float) -> None:
    """Cut one MLP to the units `kept` and refit its `down_proj`."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    refitted = ridge(gram, down.weight, kept, damping).to(down.weight.dtype).contiguous()
    mlp.gate_proj = linear(gate.weight[kept], None if gate.bias is None else gate.bias[kept])
    mlp.up_proj = linear(up.weight[kept], None if up.bias is None else up.bias[kept])
    mlp.down_proj = linear(refitted, down.bias)


def minify_naive(
    model: PreTrainedModel, windows: Tensor, keep: float, *, batch_size: int = 4, damping: float = DAMPING
) -> NaiveResult:
    """Prune `model` in place in its own dtype, calibrated on `windows` (num_windows, window) int64."""
    model.eval()
    start = time.perf_counter()
    scores, grams = collect(model, windows, batch_size)
    calibrated = time.perf_counter()
    kept = rank(scores, keep)
    for mlp, gram, indices in zip(mlps(model), grams, kept, strict=True):
        # A layer that loses no unit needs no refit, which would only shrink it.
        if len(indices) < len(gram):
            prune(mlp, gram, indices, damping)
    return NaiveResult(model, kept, {"calibration": calibrated - start, "solve": time.perf_counter() - calibrated})


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean next-token loss in float32 over `windows` (num_windows, window), each window on its own."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, window[1:]).item()
    return float(torch.tensor(total / len(windows)).exp())


def read_windows(model: str, path: Path, num_windows: int, window: int) -> Tensor:
    """The first `num_windows` windows of the text at `path`, (num_windows, window) int64."""
    tokens: Tensor = AutoTokenizer.from_pretrained(model)(path.read_text("utf-8"), return_tensors="pt").input_ids[0]
    if len(tokens) < num_windows * window:
        raise SystemExit(f"{path}: expected {num_windows * window} tokens, got {len(tokens)}. Ask for fewer windows.")
    return tokens[: num_windows * window].view(num_windows, window)


def evaluate(model: PreTrainedModel, name: str, text: Path, foreign: Path) -> dict[str, float]:
    """Perplexity on both texts in float32, from their start: 20 windows of 1024 tokens, and 10 of the foreign one.

    Args:
        name: folder of the tokenizer.
        foreign: a text of a domain that nothing calibrated on.
    """
    # In one type whatever the pruning used, so that figures compare; and in one that every processor computes fast.
    model = model.float().eval()
    return {
        "perplexity": perplexity(model, read_windows(name, text, *EVALUATION)),
        "foreign_perplexity": perplexity(model, read_windows(name, foreign, EVALUATION[0] // 2, EVALUATION[1])),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The paper's recipe in plain PyTorch.")
    parser.add_argument("model", help="Hugging Face folder of a Llama-shaped model")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--damping", type=float, default=DAMPING)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--eval", type=Path, nargs=2, help="evaluation text, and one of a foreign domain")
    parser.add_argument("--save", type=Path, help="folder for the pruned weights")
    parser.add_argument("--json", type=Path, help="file for the result, kept units included")
    args = parser.parse_args()

    windows = read_windows(args.model, args.text, args.windows, args.window)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    result = minify_naive(model, windows, args.keep, batch_size=args.batch, damping=args.damping)
    if args.save:
        result.model.save_pretrained(args.save)
    summary: dict[str, Any] = {
        "seconds": result.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "widths": [len(indices) for indices in result.kept],
    }
    if args.eval:
        summary |= evaluate(result.model, args.model, *args.eval)
    print(json.dumps(summary))
    if args.json:
        summary["kept"] = [indices.tolist() for indices in result.kept]
        args.json.write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
