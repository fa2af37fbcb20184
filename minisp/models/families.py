"""Model families: one row of data each, which says where a model keeps what can be removed.

A unit of an MLP is one row of `up` (and of `gate`, where there is one) and one column of `down`. A unit of attention is
a key/value group: the rows of its keys, its values and all queries that read them, and their columns of `out`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import nn

from minisp.errors import UnsupportedModelError

CausalLM: TypeAlias = Any
"""A transformers causal language model; its `config` and forward carry no static types."""


@dataclass(frozen=True)
class Rows:
    """Rows of a linear map that are units, one each: all of its rows, or one of several equal parts of them.

    Attributes:
        module: path in the layer.
        part, parts: as in 0 of 2, the first half.
    """

    module: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Mlp:
    """Where one family keeps its MLPs.

    Attributes:
        up: what makes the units; the activation acts on it where there is no gate.
        down: path in the layer of the linear map that reads the units.
        gate: what else makes the units: the activation acts on it, and the result is multiplied with `up`.
        module: path of the module whose forward is the whole MLP; None where the layer itself calls the parts.
        inline_activation: where `module` is None, path of the activation that the layer calls between the parts.
        width_key, activation_key: names of the width and of the activation in the config.
    """

    up: Rows
    down: str
    gate: Rows | None = None
    module: str | None = "mlp"
    inline_activation: str | None = None
    width_key: str = "intermediate_size"
    activation_key: str = "hidden_act"

    @property
    def writers(self) -> tuple[Rows, ...]:
        """What makes the units."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class Attention:
    """Where one family keeps its attention.

    Attributes:
        query, key, value: paths in the layer of the linear maps whose outputs they are; one path where they are fused.
        out: path of the linear map that reads the heads.
        fused: where one map makes all three, how its outputs lie: "blocks", all queries, then all keys, then all
            values; "heads", query, key and value of one head after the other.
        norms: paths of norms whose weights run over all queries, and over all keys.
        has_head_dim: whether the stock class takes the size of a head from the config. Else it divides the hidden size
            by the number of heads, and fewer heads need the modelling file.
        reads_config: whether the forward asks the config for the number of heads.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    fused: Literal["blocks", "heads"] | None = None
    norms: tuple[str, str] | None = None
    has_head_dim: bool = True
    reads_config: bool = False


@dataclass(frozen=True)
class Family:
    """One row: which models it serves, and where they keep what can be removed.

    Attributes:
        model_types: the `model_type` values of config.json.
        mlp: where the MLPs are.
        attention: where the attention is.
        layers: path of the decoder layers inside the base model.
    """

    model_types: tuple[str, ...]
    mlp: Mlp
    attention: Attention = Attention()
    layers: str = "layers"


def fused(qkv: str, out: str, order: Literal["blocks", "heads"], **options: bool) -> Attention:
    """Attention whose queries, keys and values one linear map makes."""
    return Attention(qkv, qkv, qkv, out, fused=order, **options)  # type: ignore[arg-type]


GATED = Mlp(gate=Rows("mlp.gate_proj"), up=Rows("mlp.up_proj"), down="mlp.down_proj")
GATE_UP = Mlp(
    gate=Rows("mlp.gate_up_proj", part=0, parts=2),
    up=Rows("mlp.gate_up_proj", part=1, parts=2),
    down="mlp.down_proj",
)

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=(
            "cohere2",
            "gemma",
            "granite",
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "smollm3",
        ),
        mlp=GATED,
    ),
    Family(
        model_types=("olmo2",),
        mlp=GATED,
        attention=Attention(norms=("self_attn.q_norm", "self_attn.k_norm")),
    ),
    Family(model_types=("stablelm",), mlp=GATED, attention=Attention(has_head_dim=False)),
    Family(
        model_types=("gemma2", "gemma3_text"),
        mlp=replace(GATED, activation_key="hidden_activation"),
    ),
    Family(model_types=("glm4",), mlp=GATE_UP),
    Family(
        model_types=("phi3",),
        mlp=GATE_UP,
        attention=fused("self_attn.qkv_proj", "self_attn.o_proj", "blocks", reads_config=True),
    ),
    Family(model_types=("starcoder2",), mlp=Mlp(up=Rows("mlp.c_fc"), down="mlp.c_proj")),
    Family(
        model_types=("gpt_neox",),
        mlp=Mlp(up=Rows("mlp.dense_h_to_4h"), down="mlp.dense_4h_to_h"),
        attention=fused("attention.query_key_value", "attention.dense", "heads", has_head_dim=False),
    ),
    Family(
        model_types=("opt",),
        layers="decoder.layers",
        mlp=Mlp(
            up=Rows("fc1"),
            down="fc2",
            module=None,
            inline_activation="activation_fn",
            width_key="ffn_dim",
            activation_key="activation_function",
        ),
        attention=Attention(out="self_attn.out_proj", has_head_dim=False),
    ),
    Family(
        model_types=("gpt2",),
        layers="h",
        mlp=Mlp(
            up=Rows("mlp.c_fc"),
            down="mlp.c_proj",
            width_key="n_inner",
            activation_key="activation_function",
        ),
        attention=fused("attn.c_attn", "attn.c_proj", "blocks", has_head_dim=False),
    ),
)

# transformers' names of the activations that the engine has closed-form derivatives of.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def known_model_types() -> list[str]:
    """All `model_type` values that can be minified, sorted."""
    return sorted(name for family in FAMILIES for name in family.model_types)


def family_of(config: Any) -> Family:
    """The row for a transformers config.

    Raises:
        UnsupportedModelError: unknown family; the message lists the known ones.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise UnsupportedModelError(
        f"Model family: expected one of {', '.join(known_model_types())}, got {config.model_type!r}. "
        "Pass a model of a known family, or add a row to minisp/models/families.py."
    )


def activation_kind(config: Any, family: Family) -> str | None:
    """The engine's name of the MLP activation (see `minisp.ops.reference.activation`); None where it has none."""
    return ACTIVATIONS.get(getattr(config, family.mlp.activation_key))


def decoder_layers(model: CausalLM, family: Family) -> nn.ModuleList:
    """The list of decoder layers of a causal language model."""
    layers = model.get_submodule(layers_path(model, family))
    assert isinstance(layers, nn.ModuleList)
    return layers


def layers_path(model: CausalLM, family: Family) -> str:
    """Path of the decoder layers from the causal language model, such as `model.layers`."""
    return f"{model.base_model_prefix}.{family.layers}"
