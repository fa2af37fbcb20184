"""The small modelling file that lets transformers load a checkpoint whose layers differ in size.

It subclasses the stock model, builds it, and gives every layer's MLP and attention the sizes that config.json lists. It
is written into the checkpoint and needs transformers alone. The architecture name is one that no serving engine knows,
so that vLLM and SGLang take their Transformers backend, which builds `AutoModel` from this file.
"""

from collections.abc import Collection, Mapping
from string import Template
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from minisp.errors import UnsupportedModelError
from minisp.models.families import Family, decoder_layers
from minisp.models.skeleton import KEYS
from minisp.models.structures import heads_of, structure_in

FILE_NAME = "modeling_minisp.py"

_SOURCE = Template('''"""A stock $causal whose layers have sizes of their own, which config.json lists.

Written by minisp; needs transformers alone. Load it with
    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

import copy

import torch
from torch import nn
from transformers import $base, $causal
from transformers.pytorch_utils import Conv1D

# Key in config.json: parameters of a layer, the axis that is cut, and the places there for each unit that is kept.
SIZES = {
$sizes}
ATTENTION, HEADS, KEY_HEADS = "$attention", $heads, $key_heads


def resize(layers, config):
    """Replace what is cut by parameters of each layer's own size."""
    for key, parameters in SIZES.items():
        for layer, units in zip(layers, getattr(config, key, None) or (), strict=False):
            # The last parameter is the one that reads all units.
            reader, across, columns = parameters[-1]
            gone = layer.get_parameter(reader).shape[across] // columns - units
            for name, axis, places in parameters:
                path, _, leaf = name.rpartition(".")
                module = layer.get_submodule(path)
                old = getattr(module, leaf)
                shape = list(old.shape)
                shape[axis] -= places * gone
                new = torch.empty(shape, dtype=old.dtype, device=old.device)
                setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
                if isinstance(module, nn.Linear):
                    module.out_features, module.in_features = module.weight.shape
                elif isinstance(module, Conv1D):
                    module.nx, module.nf = module.weight.shape
    keys, queries = (getattr(config, name, None) for name in ("$keys_key", "$queries_key"))
    if keys or queries:
        for index, layer in enumerate(layers):
            own = keys[index] if keys else KEY_HEADS
            tell_heads(layer.get_submodule(ATTENTION), queries[index] if queries else HEADS // KEY_HEADS * own, own)


def tell_heads(attention, queries, keys):
    """Tell an attention module how many heads it has, in the words that its family uses."""
    heads = {"num_heads": queries, "num_key_value_heads": keys, "num_key_value_groups": queries // keys}
    for name, value in heads.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    if hasattr(attention, "split_size"):
        attention.split_size = queries * attention.head_dim
    if $reads_config:
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = queries
        attention.config.num_key_value_heads = keys


class MinispModel($base):
    def __init__(self, config):
        super().__init__(config)
        resize(self.get_submodule("$layers"), config)


class MinispForCausalLM($causal):
    def __init__(self, config):
        super().__init__(config)
        resize(self.$prefix.get_submodule("$layers"), config)
''')


def modeling_source(model: Any, family: Family) -> str:
    """The text of the modelling file for a causal language model of this family."""
    heads, _ = heads_of(model.config)
    key_heads = getattr(model.config, "num_key_value_heads", None) or heads
    layer, lines = decoder_layers(model, family)[0], []
    for name, key in KEYS.items():
        try:
            slices = structure_in(layer, 0, name, family, model.config).slices
        except UnsupportedModelError:
            # Heads that cannot be cut, so that no result lists their sizes.
            continue
        places: dict[tuple[str, int], int] = {}
        for part in (part for part in slices if part.stride):
            places[part.parameter, part.axis] = places.get((part.parameter, part.axis), 0) + part.size
        rows = "".join(f"        {(*where, size)!r},\n" for where, size in places.items())
        lines.append(f"    {key!r}: (\n{rows}    ),\n")
    return _SOURCE.substitute(
        causal=_stock(model),
        base=_stock(model, MODEL_MAPPING),
        prefix=model.base_model_prefix,
        layers=family.layers,
        sizes="".join(lines),
        keys_key=KEYS["attention"],
        queries_key=KEYS["queries"],
        attention=family.attention.out.rpartition(".")[0],
        heads=heads,
        key_heads=key_heads,
        reads_config=family.attention.reads_config,
    )


def _stock(model: Any, classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING) -> str:
    """The stock class of a model, which may have been loaded from an earlier result's modelling file."""
    return str(classes[type(model.config)].__name__)


def sized_config(
    model: Any, raw_config: dict[str, Any], keys: Mapping[str, Any], names: Collection[str]
) -> tuple[dict[str, Any], bool]:
    """config.json of the result, and whether it needs the modelling file: where layers differ, or the stock class
    cannot have their size.

    Args:
        keys: what it says of the structures' sizes, see `skeleton.size_keys`.
        names: of the structures that the run could cut; of others it says what it said before.
    """
    config = dict(raw_config)
    stale = {"auto_map", "transformers_version", *(KEYS[name] for name in names)}
    if set(names) & {"attention", "queries"}:
        stale |= {KEYS["attention"], KEYS["queries"]}
    for key in [key for key in config if key in stale or "attn_impl" in key]:
        del config[key]
    config.update(keys)
    config["architectures"] = [_stock(model)]
    needs_code = any(key in config for key in KEYS.values())
    if needs_code:
        module = FILE_NAME.removesuffix(".py")
        config["architectures"] = ["MinispForCausalLM"]
        config["auto_map"] = {
            "AutoModel": f"{module}.MinispModel",
            "AutoModelForCausalLM": f"{module}.MinispForCausalLM",
        }
    return config, needs_code
