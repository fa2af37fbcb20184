"""What a run would do, from shapes alone: sizes, work, traffic, memory, and how many layers to hold at once."""

from dataclasses import dataclass, field

import psutil
import torch

from minisp.config import MinifyConfig, Resources, parse_size
from minisp.device import MEMORY_SHARE, free_main_memory, memory_limit
from minisp.errors import ConfigError
from minisp.methods.selection import allocate_widths, default_alignment, uniform_widths
from minisp.models.families import CausalLM, activation_kind, architecture_of, decoder_layers, layer_widths, unit_axes
from minisp.models.layers import autograd_bytes
from minisp.models.stream import LOGIT_BYTES
from minisp.ops import implementations
from minisp.phases.batches import heal_count
from minisp.phases.trials import trial_tokens
from minisp.plan.costs import disk_traffic, scratch_room, solve_flops, sweep_flops
from minisp.plan.layout import Layout, choose_layout, staging
from minisp.plan.rooms import HEAL, dense_bytes, make_rooms, passage_bytes, waiting_bytes, writes_behind
from minisp.plan.shape import Shape, shape_of
from minisp.plan.table import plan_table
from minisp.store.checkpoint import DTYPE_OF, Checkpoint
from minisp.store.tiers import Room
from minisp.text.calibration import check_window
from minisp.units import as_text

# Tokens of a micro-batch, the fastest first; the next one is tried where memory is so tight that layers are held in
# more than a few segments.
TOKENS_PER_BATCH = {"cpu": (512,), "cuda": (8192, 4096, 2048)}
FEW_SEGMENTS = 4


@dataclass(frozen=True)
class Source:
    """The model to plan for.

    Attributes:
        name: how to call it.
        model: a transformers causal language model, whose weights may be on the meta device.
        device, dtype: where and in what type it will compute.
        checkpoint: where its weights are; None for a model in memory.
        streams: whether layers stream from the checkpoint; else the model is in memory whole.
        writes: whether there is an output folder, and with it a scratch folder.
    """

    name: str
    model: CausalLM
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint | None
    streams: bool
    writes: bool

    @property
    def stored_bytes(self) -> int:
        """Size of the weights as stored, or in memory."""
        if self.checkpoint is not None:
            return self.checkpoint.num_bytes
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def tokenizer_bytes(self) -> int:
        """Size of the tokenizer's file."""
        path = self.checkpoint.folder / "tokenizer.json" if self.checkpoint is not None else None
        return path.stat().st_size if path is not None and path.is_file() else 0

    @property
    def stored_item(self) -> int:
        """Bytes of an element as stored: the largest type among the weights."""
        if self.checkpoint is None:
            return self.dtype.itemsize
        return max(DTYPE_OF[place.dtype].itemsize for place in self.checkpoint.tensors.values())


@dataclass(frozen=True)
class Plan:
    """What `minify` would do with this model and config.

    Attributes:
        config, resources: the options.
        model: folder, file, hub id, or class name of an in-memory model.
        model_type: transformers family.
        widths: width m of every layer before.
        kept_units: most units kept in all.
        alignment: widths are multiples of it.
        parameters, parameters_after: counts; after is an upper bound.
        parameters_per_unit: what one unit costs.
        bytes, bytes_after: weights on disk in the stored type; after is an upper bound.
        batch: calibration windows per micro-batch.
        segments: layers held together, in forward order.
        layout: what is held at once, and the memory that it takes by phase.
        rooms: by phase, bytes of waiting states that stay where it computes, or else in pinned main memory.
        behind: bytes that may wait for the disk in pinned main memory, where a GPU computes.
        streams: whether weights stream from disk.
        device, dtype: where and in what type it computes.
        implementations: who computes each operation of the engine, see `ops.implementations`.
        flops: floating-point operations of the sweeps; solve_flops: those of the ridge solves, in float32.
        traffic: bytes read from and written to disk, by purpose.
        scratch_bytes: disk that waiting states, statistics and results take at most at once; dense_bytes: what the
            dense states take of it, which are left out where the disk has less than four times that.
        base_memory: bytes that the process had before.
    """

    config: MinifyConfig
    resources: Resources
    model: str
    model_type: str
    widths: tuple[int, ...]
    kept_units: int
    alignment: int
    parameters: int
    parameters_after: int
    parameters_per_unit: int
    bytes: int
    bytes_after: int
    batch: int
    segments: tuple[range, ...]
    layout: Layout
    rooms: dict[str, Room]
    behind: int
    streams: bool
    device: str
    dtype: str
    implementations: dict[str, str]
    flops: float
    solve_flops: float
    traffic: dict[str, int]
    scratch_bytes: int
    dense_bytes: int
    base_memory: int = field(compare=False)

    def __str__(self) -> str:
        """The plan's table as text."""
        return as_text(plan_table(self))

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""
        return self.config.num_windows * self.config.window

    @property
    def write_room(self) -> int | None:
        """Bytes for the caches of what the model writes, beside its weights; None where it writes nothing."""
        if not self.writes_text:
            return None
        sweep = self.layout.peaks["saliency sweep"]
        return sum(sweep.values()) - sweep["weights"] - sweep["embeddings and head"]

    @property
    def writes_text(self) -> bool:
        """Whether the model can write text itself: it takes a pass for every token, with all of it in memory."""
        return len(self.segments) == 1 and not self.layout.stream_vocabulary

    @property
    def peak_memory(self) -> int:
        """Expected peak in bytes: of the whole process where a CPU computes, of what is allocated where a GPU does."""
        return self.layout.peak + (self.base_memory if self.device == "cpu" else 0)

    @property
    def disk_room(self) -> int:
        """Bytes that must be free where the scratch folder is; beside the output, both have to find room there."""
        return self.scratch_bytes - self.dense_bytes + (self.bytes_after if self.resources.scratch is None else 0)


def make_plan(source: Source, config: MinifyConfig, resources: Resources, *, ranks: int = 1) -> Plan:
    """Plan a run.

    Args:
        ranks: processes that share the windows.

    Raises:
        ConfigError: no widths satisfy keep, alignment and bounds, or no layout keeps the memory limit.
        CalibrationError: windows longer than the model's positions.
    """
    model = source.model
    row = architecture_of(model.config)
    widths = layer_widths(model, row)
    check_window(config.window, getattr(model.config, "max_position_embeddings", None))
    alignment = config.alignment or default_alignment(min(widths))
    kept_units = _kept_units(widths, config, alignment)
    parameters = sum(p.numel() for p in model.parameters())
    layers = decoder_layers(model, row)
    per_unit = sum(layers[0].get_parameter(n).numel() for n in unit_axes(layers[0], row)) // widths[0]
    after = parameters - per_unit * (sum(widths) - kept_units)
    base = psutil.Process().memory_info().rss
    kept = max(widths) - (alignment if config.keep < 1 else 0)
    batch, shape, layout = _fit(source, config, resources, ranks, kept, base)
    host = _host_room(source, resources, shape, layout, base)
    layout, rooms = make_rooms(
        shape, layout, _room_limit(source, resources, layout, base), host, on_disk=source.device.type == "cpu"
    )
    waits = waiting_bytes(shape, layout).get(HEAL, 0) + (dense_bytes(shape) if layout.dense == "memory" else 0)
    passage = passage_bytes(shape)
    again = 1 - max(0, min(passage, rooms.get(HEAL, Room()).device - waits)) / passage if passage else 0.0
    segments = tuple(range(i, min(i + layout.segment, len(layers))) for i in range(0, len(layers), layout.segment))
    stored_bytes = source.stored_bytes
    bytes_after = round(stored_bytes * after / parameters)
    return Plan(
        config=config,
        resources=resources,
        model=source.name,
        model_type=model.config.model_type,
        widths=tuple(widths),
        kept_units=kept_units,
        alignment=alignment,
        parameters=parameters,
        parameters_after=after,
        parameters_per_unit=per_unit,
        bytes=stored_bytes,
        bytes_after=bytes_after,
        batch=batch,
        segments=segments,
        layout=layout,
        rooms=rooms,
        behind=writes_behind(shape, layout, rooms, host),
        streams=source.streams,
        device=str(source.device),
        dtype=str(source.dtype).removeprefix("torch."),
        implementations=dict(implementations(source.device, source.dtype, activation_kind(model.config, row))),
        flops=sweep_flops(model, config, layout, again, ranks),
        solve_flops=solve_flops(widths, config, shape.hidden),
        traffic=disk_traffic(shape, layout, rooms, widths, bytes_after),
        scratch_bytes=scratch_room(shape, layout, rooms, widths),
        dense_bytes=dense_bytes(shape) if layout.dense == "disk" else 0,
        base_memory=base,
    )


def _fit(
    source: Source, config: MinifyConfig, resources: Resources, ranks: int, kept: int, base: int
) -> tuple[int, Shape, Layout]:
    """Windows per micro-batch, and with them the sizes and the layout that fits in memory."""
    what, limit, apart = memory_limit(resources, source.device, base)
    for tokens in TOKENS_PER_BATCH.get(source.device.type, TOKENS_PER_BATCH["cpu"]):
        batch = config.batch or max(1, tokens // config.window)
        shape = _shape(source, config, batch, ranks, kept)
        layout = choose_layout(shape, limit - apart, resources.segment, what, apart)
        if config.batch is not None or -(-shape.num_layers // layout.segment) <= FEW_SEGMENTS:
            break
    if source.device.type == "cuda" and resources.host_memory is not None:
        needed = base + staging(shape, layout)
        if needed > parse_size(resources.host_memory):
            raise ConfigError(
                f"Option host_memory: expected at least {needed / 1e9:.2f} GB for what passes through main memory on "
                f"its way to {source.device}, got {resources.host_memory}. Allow more, or pass a smaller segment."
            )
    return batch, shape, layout


def _room_limit(source: Source, resources: Resources, layout: Layout, base: int) -> int:
    """Bytes that a phase may take, with what waits in it."""
    if source.device.type != "cuda" and resources.host_memory is None:
        return layout.peak
    _, limit, apart = memory_limit(resources, source.device, base)
    return limit - apart


def _host_room(source: Source, resources: Resources, shape: Shape, layout: Layout, base: int) -> int:
    """Bytes of main memory that may be pinned for what waits beside a GPU."""
    if source.device.type != "cuda":
        return 0
    if resources.host_memory is None:
        return max(0, int(MEMORY_SHARE["cpu"] * free_main_memory()) - staging(shape, layout))
    return max(0, parse_size(resources.host_memory) - base - staging(shape, layout))


def _shape(source: Source, config: MinifyConfig, batch: int, ranks: int, kept: int) -> Shape:
    layers = decoder_layers(source.model, architecture_of(source.model.config))
    return shape_of(
        source.model,
        tokens=-(-config.num_windows // ranks) * config.window,
        batch_tokens=min(batch, config.num_windows) * config.window,
        item=source.dtype.itemsize,
        stored_item=source.stored_item,
        tokenizer=source.tokenizer_bytes,
        autograd=autograd_bytes(source.model, source.dtype, source.device),
        kept=kept,
        gram=config.collects_gram,
        trials=trial_tokens(config.num_windows * config.window, len(layers)) if config.measures else 0,
        heals=_heal_tokens(config, ranks),
        corrects=config.heals and config.inputs == "both",
        logits=LOGIT_BYTES.get(source.device.type, LOGIT_BYTES["cpu"]),
        loaded=source.checkpoint is None,
        streams=source.streams,
        writes=source.writes,
    )


def _heal_tokens(config: MinifyConfig, ranks: int) -> int:
    if not config.heals:
        return 0
    count = heal_count(config.num_windows, config.window, ranks) if config.inputs == "both" else config.num_windows
    return -(-count // ranks) * config.window


def _kept_units(widths: list[int], config: MinifyConfig, alignment: int) -> int:
    if config.keep < 1 and alignment >= max(widths):
        raise ConfigError(
            f"Alignment: expected less than the largest layer width, {max(widths)}, got {alignment}. Pass a smaller "
            "alignment; layers of one unit cannot be cut."
        )
    if config.widths == "uniform":
        return sum(uniform_widths(widths, config.keep, alignment=alignment))
    # Whatever the saliency will be: refused now rather than after the sweep where no widths fit the budget.
    allocate_widths(
        [torch.zeros(width) for width in widths], config.keep, alignment=alignment, min_keep=config.min_keep
    )
    return int(config.keep * sum(widths) + 1e-9)
