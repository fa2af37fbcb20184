"""The small modelling file that lets transformers load a checkpoint whose layers differ in width.

It subclasses the stock model, builds it, and gives every layer's MLP the width that config.json lists. It is written
into the checkpoint and needs transformers alone. The architecture name is one that no serving engine knows, so that
vLLM and SGLang take their Transformers backend, which builds `AutoModel` from this file.
"""

from collections.abc import Mapping
from string import Template
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from minisp.models.families import WIDTHS_KEY, Family

FILE_NAME = "modeling_minisp.py"

_SOURCE = Template('''"""A stock $causal whose MLP layers have widths of their own: `$widths_key` in config.json.

Written by minisp; needs transformers alone. Load it with
    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

import torch
from torch import nn
from transformers import $base, $causal
from transformers.pytorch_utils import Conv1D

ROWS = $rows  # modules whose outputs are units: how many such blocks of units each has
COLUMNS = "$down"  # the module whose inputs are units


def set_widths(layers, widths):
    """Replace every layer's MLP weights by new ones of that layer's width."""
    for layer, width in zip(layers, widths, strict=True):
        for path, blocks in ROWS.items():
            old = layer.get_submodule(path)
            size_in = old.nx if isinstance(old, Conv1D) else old.in_features
            layer.set_submodule(path, _like(old, size_in, blocks * width))
        old = layer.get_submodule(COLUMNS)
        size_out = old.nf if isinstance(old, Conv1D) else old.out_features
        layer.set_submodule(COLUMNS, _like(old, width, size_out))


def _like(old, size_in, size_out):
    with torch.device(old.weight.device):
        if isinstance(old, Conv1D):
            new = Conv1D(size_out, size_in)
        else:
            new = nn.Linear(size_in, size_out, bias=old.bias is not None)
    return new.to(old.weight.dtype)


class MinispModel($base):
    def __init__(self, config):
        super().__init__(config)
        set_widths(self.get_submodule("$layers"), config.$widths_key)


class MinispForCausalLM($causal):
    def __init__(self, config):
        super().__init__(config)
        set_widths(self.$prefix.get_submodule("$layers"), config.$widths_key)
''')


def modeling_source(model: Any, family: Family) -> str:
    """The text of the modelling file for a causal language model of this family."""
    return _SOURCE.substitute(
        causal=_stock(model),
        base=_stock(model, MODEL_MAPPING),
        prefix=model.base_model_prefix,
        layers=family.layers,
        rows=repr({rows.module: rows.parts for rows in family.mlp.writers}),
        down=family.mlp.down,
        widths_key=WIDTHS_KEY,
    )


def _stock(model: Any, classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING) -> str:
    """The stock class of a model, which may have been loaded from an earlier result's modelling file."""
    return str(classes[type(model.config)].__name__)


def sized_config(model: Any, raw_config: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the result: the stock class where all layers have one width, else the modelling file's.

    Args:
        keys: what it says of the layers' sizes, see `families.size_keys`.
    """
    config = dict(raw_config)
    for key in [key for key in config if key in ("auto_map", WIDTHS_KEY, "transformers_version") or "attn_impl" in key]:
        del config[key]
    config.update(keys)
    config["architectures"] = [_stock(model)]
    if WIDTHS_KEY in keys:
        module = FILE_NAME.removesuffix(".py")
        config["architectures"] = ["MinispForCausalLM"]
        config["auto_map"] = {
            "AutoModel": f"{module}.MinispModel",
            "AutoModelForCausalLM": f"{module}.MinispForCausalLM",
        }
    return config
