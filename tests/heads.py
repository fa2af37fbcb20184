"""Tiny models whose attention has several heads, and what tests of attention look at."""

from typing import Any

import torch
from torch import Tensor

from minisp.models.families import decoder_layers, family_of
from minisp.models.structures import Structure
from tests.tiny import MODEL_TYPES, OTHER_TYPES, VOCABULARY, tiny_model

IDS = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"keep": 0.6, "alignment": 4, "batch": 2, "dtype": "float32", "calibration": IDS}
# Families whose queries have keys of their own, and whose heads divide the hidden size.
MULTI_HEAD = ("opt", "gpt2", "gpt_neox", "stablelm")
ALL = MODEL_TYPES + OTHER_TYPES
HEAD = 4


def grouped(model_type: str, **overrides: Any) -> Any:
    """A tiny model of four heads of four dimensions: two groups of two, or four of one."""
    name = {"gpt2": "n_head"}.get(model_type, "num_attention_heads")
    sizes: dict[str, Any] = {name: 4}
    if model_type not in MULTI_HEAD:
        sizes |= {"num_key_value_heads": 2, "head_dim": HEAD}
    if model_type == "stablelm":
        sizes |= {"num_key_value_heads": 2}
    return tiny_model(model_type, **{**sizes, **overrides})


def out_columns(model: Any, structure: Structure) -> Tensor:
    """A view (u·c, d) of what reads the heads of a layer, one row for each place."""
    layer = decoder_layers(model, family_of(model.config))[structure.layer]
    weight = layer.get_parameter(structure.weight).data
    return weight if structure.transposed else weight.T


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """(B, L, V) of a model, without a cache."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found
