"""Target `nemotron-nas`: the layout of NVIDIA's Nemotron-NAS models, whose Llama layers differ, as servers read it.

config.json lists for every layer a factor `ffn_mult`; readers take 2·ffn_mult·d/3, rounded up to a multiple of 256, for
its width. The config class that servers ask transformers for is written beside it, and a modelling file too, so that
transformers loads the folder as well.
"""

from pathlib import Path
from typing import Any

from minisp.errors import UnsupportedModelError
from minisp.export.modeling import FILE_NAME, modeling_source
from minisp.export.source import Content, Source, write_folder
from minisp.export.tensors import checkpoint_entries, checkpoint_tensors
from minisp.models.families import activation_kind
from minisp.models.skeleton import KEYS
from minisp.phases.run import Progress

MULTIPLE = 256
CONFIG_FILE = "configuration_minisp.py"

_CONFIG_SOURCE = '''"""The config of a Llama model whose layers differ, laid out as Nemotron-NAS. Written by minisp."""

from transformers import LlamaConfig


class Block(dict):
    """A dictionary whose keys can be read as attributes, as servers do."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class MinispNasConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **options):
        self.block_configs = [Block({part: Block(values) for part, values in b.items()}) for b in block_configs]
        super().__init__(**options)
'''

# transformers wants to hear from a model class which config class it belongs to.
_BELONGS = """

from .configuration_minisp import MinispNasConfig

MinispModel.config_class = MinispForCausalLM.config_class = MinispNasConfig
"""


def check(source: Source) -> None:
    """Refuse what the layout cannot express.

    Raises:
        UnsupportedModelError: not a Llama model, or widths that are no multiples of 256.
    """
    other = "hf" if source.is_uniform else "hf-per-layer"
    if source.model_type != "llama" or activation_kind(source.checkpoint.config, source.family) != "silu":
        raise UnsupportedModelError(
            f"Target nemotron-nas: expected a llama model with the activation silu, got {source.model_type}. Use "
            f"{other}."
        )
    if odd := sorted({width for width in source.widths if width % MULTIPLE}):
        raise UnsupportedModelError(
            f"Target nemotron-nas: expected widths that are multiples of {MULTIPLE}, got "
            f"{', '.join(map(str, odd[:5]))}. Minify with --alignment {MULTIPLE}, or use {other}."
        )


def write(source: Source, out: Path, progress: Progress) -> None:
    """Write a folder in the layout of Nemotron-NAS.

    Raises:
        OutputError, CheckpointError: see `write_folder`.
    """
    content = Content(
        config=_config(source),
        entries=checkpoint_entries(source.checkpoint, source.model, []),
        tensors=checkpoint_tensors(source.checkpoint, source.model, []),
        files={CONFIG_FILE: _CONFIG_SOURCE, FILE_NAME: modeling_source(source.model, source.family) + _BELONGS},
    )
    write_folder(source, "nemotron-nas", content, out, progress)


def _config(source: Source) -> dict[str, Any]:
    config = source.checkpoint.config
    group = config.num_attention_heads // config.num_key_value_heads
    skipped = {"no_op": False, "replace_with_linear": False}
    blocks = [
        {
            "attention": {**skipped, "n_heads_in_group": group},
            "ffn": {**skipped, "ffn_mult": 3 * width / (2 * config.hidden_size)},
        }
        for width in source.widths
    ]
    module = FILE_NAME.removesuffix(".py")
    return {
        **{key: value for key, value in source.checkpoint.raw_config.items() if key != "transformers_version"},
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "intermediate_size": max(source.widths),
        "block_configs": blocks,
        KEYS["mlp"]: source.widths,
        "auto_map": {
            "AutoConfig": f"{CONFIG_FILE.removesuffix('.py')}.MinispNasConfig",
            "AutoModel": f"{module}.MinispModel",
            "AutoModelForCausalLM": f"{module}.MinispForCausalLM",
        },
    }
