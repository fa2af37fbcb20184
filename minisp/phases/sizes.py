"""The sizes of a model and of a run on it, which memory, work and traffic of every phase follow from.

Each phase has a `demand` beside its code: what it takes, from these sizes alone. The plan sums demands.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minisp.config import MinifyConfig
from minisp.methods.statistics import PANEL_ROWS
from minisp.models.families import CausalLM, decoder_layers, family_of
from minisp.models.maps import LinearMap, linear_maps
from minisp.models.structures import Structure, structures_of
from minisp.ops.ridge import GATHER_ROWS
from minisp.phases.run import Phase

# Where states that wait in memory are counted among a phase's.
HELD = "waiting states"
# What the BLAS keeps for its packed operands, once a layer was solved.
BLAS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Sizes:
    """What a demand depends on.

    Attributes:
        num_layers, hidden, vocabulary: L, d, V.
        structures: what can be removed.
        layer: parameters of the largest layer; inside: those of all layers.
        vocabulary_weights: parameters of embedding and head, a tied weight counted once; `outside`: all others that
            are in no layer.
        tokenizer: bytes of the tokenizer's file.
        config: the options; ranks: processes that share the windows.
        batch_tokens: tokens of a micro-batch.
        item, stored_item: bytes of an element, in the compute type and as stored.
        autograd: bytes per token that autograd keeps of one layer; see `layers.autograd_bytes`.
        kept: the largest number of columns that a consumer keeps if it is cut at all.
        logits: bytes that a chunk of logits may take.
        loaded: whether the model was in memory before the run. If so, the plan does not count its weights.
        streams: whether weights stream from a checkpoint; else the model is in memory whole.
        writes: whether records go to a scratch folder; else they stay in memory.
        maps: where weights are set to zero; none where units are cut.
    """

    num_layers: int
    hidden: int
    vocabulary: int
    structures: tuple[Structure, ...]
    layer: int
    inside: int
    vocabulary_weights: int
    outside: int
    tokenizer: int
    config: MinifyConfig
    ranks: int
    batch_tokens: int
    item: int
    stored_item: int
    autograd: int
    kept: int
    logits: int
    loaded: bool
    streams: bool
    writes: bool
    maps: tuple[LinearMap, ...] = ()

    @property
    def tokens(self) -> int:
        """Calibration tokens of this process."""
        return -(-self.config.num_windows // self.ranks) * self.config.window

    @property
    def all_tokens(self) -> int:
        """Calibration tokens of all processes."""
        return self.config.num_windows * self.config.window

    @property
    def width(self) -> int:
        """m, inputs of the widest consumer."""
        return max(structure.width for structure in self.structures)

    @property
    def sums(self) -> list[tuple[int, int]]:
        """(layer, n) of every matrix (n, n) that the sweep sums: Gram matrices, or both sides of linear maps."""
        if not self.maps:
            gradients = [(x.layer, self.hidden) for x in self.structures if self.config.method == "surgeon"]
            return gradients + [(x.layer, x.width) for x in self.structures if self.config.collects_gram]
        if self.config.method == "magnitude":
            return []
        inputs = [(x.layer, x.columns) for x in self.maps if x.path == x.source]
        return inputs + ([(x.layer, x.rows) for x in self.maps] if self.config.sees_gradients else [])

    @property
    def layer_sums(self) -> int:
        """Elements of those matrices of the layer that has most."""
        elements = [0] * self.num_layers
        for layer, size in self.sums:
            elements[layer] += size**2
        return max(elements)

    @property
    def all_grams(self) -> int:
        """Elements of all Gram matrices."""
        return sum(structure.width**2 for structure in self.structures)

    @property
    def consumers(self) -> int:
        """Elements of all consumers' weights."""
        return self.hidden * sum(structure.width for structure in self.structures)

    @property
    def changed(self) -> int:
        """Elements of all weights that get new values."""
        return sum(x.rows * x.columns for x in self.maps) if self.maps else self.consumers

    def states(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens at one boundary."""
        return tokens * self.hidden * self.item


@dataclass(frozen=True)
class Holding:
    """How much of a model is in memory at once.

    Attributes:
        segment: consecutive layers held at once.
        num_slots: segments in memory at once; 2 reads ahead.
        stream_vocabulary: whether embeddings and head stay on disk.
        dense: where the dense model's states of the refit sweep's windows wait from the saliency sweep on, for every
            layer: "memory" or "disk"; None: nowhere, the refit sweep computes them again.
    """

    segment: int
    num_slots: int
    stream_vocabulary: bool
    dense: str | None = None

    def passes(self, num_layers: int) -> tuple[int, int]:
        """Segments, and those that a forward pass of its own runs through."""
        segments = -(-num_layers // self.segment)
        return segments, segments if self.stream_vocabulary else segments - 1


@dataclass(frozen=True)
class Demand:
    """What one phase takes.

    Attributes:
        memory: phase, or part of it → purpose → bytes where it computes, weights and what waits in a folder left out.
        waiting: bytes of states that wait at most at once.
        passed: bytes of states that go to a folder and come back, were none of them kept in memory.
        flops: floating-point operations of all processes, two a multiply-add.
        solve_flops: those of ridge solves, in float32.
    """

    memory: Mapping[Phase, Mapping[str, int]] = field(default_factory=dict)
    waiting: int = 0
    passed: int = 0
    flops: float = 0.0
    solve_flops: float = 0.0


def sizes_of(model: CausalLM, **rest: Any) -> Sizes:
    """The sizes of a model, whose weights may be on the meta device; `rest`: the other attributes."""
    family = family_of(model.config)
    layers = decoder_layers(model, family)
    parameters = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    ends = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return Sizes(
        num_layers=len(layers),
        hidden=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        structures=tuple(structures_of(model, family, rest["config"].structures)),
        maps=() if rest["config"].cuts else tuple(linear_maps(model, family)),
        layer=max(parameters),
        inside=sum(parameters),
        vocabulary_weights=sum(ends.values()),
        outside=sum(p.numel() for p in model.parameters()) - sum(parameters) - sum(ends.values()),
        **rest,
    )


def blas_bytes(width: int) -> int:
    """The BLAS's packed operands, which are never larger than the operands themselves."""
    return min(BLAS_BYTES, 3 * 4 * width**2)


def refit_bytes(sizes: Sizes, n: int) -> dict[str, int]:
    """One refit to n columns: G and W whole, G_SS, the gathered rest, right-hand sides and W', in float32."""
    d, m = sizes.hidden, sizes.width
    # W_P, and a few hundred rows at a time: of G, read and gathered, and of products. W_S, W_P G_PS, right-hand sides
    # and W'.
    gathered = 4 * d * (m - n) + (3 + 2) * 4 * GATHER_ROWS * m + 3 * 4 * PANEL_ROWS * m
    others = sizes.all_grams - m * m if not sizes.writes and sizes.config.collects_gram else 0
    return {
        "Gram matrices": 4 * (m * m + others),
        "ridge system": 4 * n * n + gathered,
        "right-hand sides": 4 * 4 * d * n + sizes.stored_item * d * m,
        "buffers of the BLAS": blas_bytes(m),
    }


def solve_flops(width: int, keep: float, hidden: int, *, refit: bool = True) -> float:
    """Of one ridge solve for n = keep·m columns: a Cholesky n³/3 and two triangular solves 2n²d.

    A refit also takes W_P G_PS, 2(m − n)nd, and two products of W with G for its residuals, 2m²d.
    """
    m, n = width, keep * width
    rest = 2 * (m - n) * n * hidden + 2 * m * m * hidden if refit else 0.0
    return n**3 / 3 + 2 * n * n * hidden + rest
