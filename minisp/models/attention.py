"""The engine's attention inside transformers' own modelling code, for the length of a sweep.

transformers looks an attention function up by the name in a model's config. One is registered here, under "minisp",
that hands plain causal attention to `ops.causal_attention` and anything else (masks, biases, dropout, one-token steps)
to transformers' "sdpa" function; masks are made as for "sdpa".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minisp import ops

NAME = "minisp"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, L, D), key and value (B, H_kv, L, D) → (B, L, H, D), no weights."""
    causal = options.get("is_causal")
    plain = (
        attention_mask is None
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux"))
        and query.shape[2] == key.shape[2]
    )
    if not plain:
        leaving: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return leaving
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return ops.causal_attention(query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def fast_attention(config: Any) -> Iterator[None]:
    """Within the block, a model of this transformers config uses the engine's attention where it used "sdpa"."""
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
