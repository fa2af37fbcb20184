"""What `minify_cpu.py` can expect: the floating-point operations of every contender, and the seconds they take.

Per calibrated token. P: weights in the layers' matrix products, P_m those of the MLPs among them, H = d·V: the head,
A = 2·L·window·d: the two products of causal attention (half of them masked), L layers of width m, k the share kept.

    naive         6(P + H) + 3A + 2Lm²    forward, input and weight gradients; a Gram matrix in float32
    recipe        4(P + H) + 3A + Lm²     no weight gradients; half of a symmetric Gram matrix
                  + (2P + A)(1 − 1/s)     the second forward pass when layers are held in s segments to save memory
    the defaults  as the recipe, and
    trial cuts    (2P + A)(1 + (L + 1)/2) + 2H(L + 1)/2
                  per token of the trials: the dense model, and from layer l on the one whose layer l is cut, for every
                  l; outputs compared at every second token
    correction    2(P − (1 − k)P_m) + A + L(k²m² + 4kmd)
                  per token of the heal sweep: the cut model, X_SᵀX_S (half of it), X_SᵀE, and the product with the
                  corrected weights; the dense model's states are kept from the saliency sweep

and per layer a solve of n units in float32, n³/3 + 2n²d + 2(m − n)nd: once for the recipe, n = km (the opponent solves
by LU, 2n³/3); for the defaults three times, n = km, 2m/3 and km.

Seconds are these over the GEMM speed of the machine in the dtype concerned. No floor counts element-wise passes, which
is where much of the time goes.
"""

from dataclasses import dataclass
from typing import Any

import harness
import torch


@dataclass(frozen=True)
class Work:
    """GFLOP of one contender, products in its own dtype and products in float32."""

    own: float
    float32: float

    def seconds(self, own_rate: float, float32_rate: float) -> float:
        """At rates in FLOP/s."""
        return 1e9 * (self.own / own_rate + self.float32 / float32_rate)


def work(config: Any, windows: int, window: int, keep: float) -> dict[str, Work]:
    """The formulas above for a Llama-shaped transformers config."""
    from minisp.phases.batches import correction_count
    from minisp.phases.trials import trial_tokens

    d, m, num_layers, heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    )
    head_dim = getattr(config, "head_dim", None) or d // heads
    mlps = num_layers * 3 * d * m
    layers = mlps + num_layers * 2 * d * head_dim * (heads + config.num_key_value_heads)
    head, attention = d * config.vocab_size, 2 * num_layers * window * heads * head_dim
    tokens, cut = windows * window, keep * m
    trials, heals = trial_tokens(tokens, num_layers), correction_count(windows, window) * window

    def solves(*sizes: float) -> float:
        return num_layers * sum(n**3 / 3 + 2 * n * n * d + 2 * (m - n) * n * d for n in sizes)

    shared = 4 * (layers + head) + 3 * attention
    gram = num_layers * m * m
    passing = 2 * layers + attention
    trying = passing * (1 + (num_layers + 1) / 2) + head * (num_layers + 1)
    correcting = passing - 2 * (1 - keep) * mlps + num_layers * (cut * cut + 4 * cut * d)
    recipe = tokens * (shared + gram)
    defaults = recipe + trials * trying + heals * correcting
    naive = solves(cut) + num_layers * cut**3 / 3
    return {
        "naive": Work(tokens * (shared + 2 * (layers + head)) / 1e9, (2 * tokens * gram + naive) / 1e9),
        "recipe": Work(recipe / 1e9, solves(cut) / 1e9),
        "recipe, many segments": Work((recipe + tokens * passing) / 1e9, solves(cut) / 1e9),
        "defaults": Work(defaults / 1e9, solves(cut, 2 * m / 3, cut) / 1e9),
    }


def floor(model: str, windows: int, window: int, keep: float, dtype: str) -> dict[str, Any]:
    """GEMM speeds measured here, and GFLOP and seconds of every contender; `dtype` is the engine's."""
    from transformers import AutoConfig

    rates = {name: harness.gemm_ceiling(getattr(torch, name), 1024) for name in ("bfloat16", "float32")}
    found = work(AutoConfig.from_pretrained(model), windows, window, keep)
    rows = {f"naive {name}": (found["naive"], rates[name]) for name in rates}
    rows |= {f"ours, {name}": (own, rates[dtype]) for name, own in found.items() if name != "naive"}
    return {
        "flops": rates,
        "gflop": {name: own.own + own.float32 for name, (own, _) in rows.items()},
        "seconds": {name: own.seconds(rate, rates["float32"]) for name, (own, rate) in rows.items()},
    }


def print_floor(found: dict[str, Any]) -> None:
    """The floor and the ratios it predicts, to the faster of the naive ones."""
    base = min(seconds for name, seconds in found["seconds"].items() if name.startswith("naive"))
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in found["flops"].items())
    rows = [
        (name, f"{found['gflop'][name]:,.0f}", f"{seconds:.1f}", f"×{base / seconds:.2f}")
        for name, seconds in found["seconds"].items()
    ]
    harness.print_table(f"Floor (GEMM: {rates})", ["", "GFLOP", "seconds", "speed"], rows)
