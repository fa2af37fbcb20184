"""What a run would do, from shapes alone: sizes, work, traffic, memory, and how many layers to hold at once."""

from dataclasses import dataclass

import psutil
import torch

from minisp.config import MinifyConfig, group_of
from minisp.device import MEMORY_SHARE, free_main_memory, memory_limit
from minisp.errors import ConfigError
from minisp.models.families import CausalLM, activation_kind, family_of
from minisp.models.layers import autograd_bytes
from minisp.models.stream import LOGIT_BYTES
from minisp.models.structures import Structure, structures_of
from minisp.ops import implementations
from minisp.phases.decide import kept_sizes, step_of
from minisp.phases.refit import dense_bytes
from minisp.phases.sizes import Sizes, sizes_of
from minisp.plan.layout import Layout, choose_layout, demands, staging
from minisp.plan.plan import Plan
from minisp.plan.rooms import disk_traffic, make_rooms, passes_again, scratch_room, writes_behind
from minisp.plan.targets import with_target
from minisp.resources import Resources
from minisp.store.checkpoint import DTYPE_OF, Checkpoint
from minisp.text.calibration import check_window
from minisp.units import parse_size

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


def make_plan(source: Source, config: MinifyConfig, resources: Resources, *, ranks: int = 1) -> Plan:
    """Plan a run.

    Args:
        ranks: processes that share the windows.

    Raises:
        ConfigError: no widths satisfy keep, alignment and bounds, or no layout keeps the memory limit.
        CalibrationError: windows longer than the model's positions.
    """
    model = source.model
    family = family_of(model.config)
    structures = structures_of(model, family, config.structures)
    check_window(config.window, getattr(model.config, "max_position_embeddings", None))
    cuttable = sum(structure.num_units * structure.parameters for structure in structures)
    parameters = sum(p.numel() for p in model.parameters())
    config = with_target(config, structures, parameters, source.stored_bytes, source.checkpoint)
    kept_parameters = _kept_parameters(structures, config)
    after = parameters - (cuttable - kept_parameters)
    base = psutil.Process().memory_info().rss
    kept = max(_most_kept(x, step_of(x, structures, config), config) * x.columns for x in structures)
    batch, sizes, layout = _fit(source, config, resources, ranks, kept, base)
    _check_groups(sizes)
    host = _host_room(source, resources, sizes, layout, base)
    limit = _room_limit(source, resources, layout, base)
    layout, rooms = make_rooms(sizes, layout, limit, host, on_disk=source.device.type == "cpu")
    needed = demands(sizes, layout, passes_again(sizes, layout, rooms))
    count, step = sizes.num_layers, layout.segment
    segments = tuple(range(i, min(i + step, count)) for i in range(0, count, step))
    bytes_after = round(source.stored_bytes * after / parameters)
    return Plan(
        config=config,
        resources=resources,
        model=source.name,
        model_type=model.config.model_type,
        structures=tuple(structures),
        maps=sizes.maps,
        alignment=max(step_of(structure, structures, config) for structure in structures),
        parameters=parameters,
        parameters_after=after,
        cuttable=cuttable,
        kept_parameters=kept_parameters,
        bytes=source.stored_bytes,
        bytes_after=bytes_after,
        batch=batch,
        segments=segments,
        layout=layout,
        rooms=rooms,
        behind=writes_behind(sizes, layout, rooms, host),
        streams=source.streams,
        device=str(source.device),
        dtype=str(source.dtype).removeprefix("torch."),
        implementations=dict(implementations(source.device, source.dtype, activation_kind(model.config, family))),
        work={phase: (demand.flops, demand.solve_flops) for phase, demand in needed.items()},
        traffic=disk_traffic(sizes, layout, rooms, bytes_after),
        scratch_bytes=scratch_room(sizes, layout, rooms),
        dense_bytes=dense_bytes(sizes) if layout.dense == "disk" else 0,
        base_memory=base,
    )


def _fit(
    source: Source, config: MinifyConfig, resources: Resources, ranks: int, kept: int, base: int
) -> tuple[int, Sizes, Layout]:
    """Windows per micro-batch, and with them the sizes and the layout that fits in memory."""
    what, limit, apart = memory_limit(resources, source.device, base)
    for tokens in TOKENS_PER_BATCH.get(source.device.type, TOKENS_PER_BATCH["cpu"]):
        batch = config.batch or max(1, tokens // config.window)
        sizes = _sizes(source, config, batch, ranks, kept)
        layout = choose_layout(sizes, limit - apart, resources.segment, what, apart)
        if config.batch is not None or -(-sizes.num_layers // layout.segment) <= FEW_SEGMENTS:
            break
    if source.device.type == "cuda" and resources.host_memory is not None:
        needed = base + staging(sizes, layout)
        if needed > parse_size(resources.host_memory):
            raise ConfigError(
                f"Option host_memory: expected at least {needed / 1e9:.2f} GB for what passes through main memory on "
                f"its way to {source.device}, got {resources.host_memory}. Allow more, or pass a smaller segment."
            )
    return batch, sizes, layout


def _room_limit(source: Source, resources: Resources, layout: Layout, base: int) -> int:
    """Bytes that a phase may take, with what waits in it."""
    if source.device.type != "cuda" and resources.host_memory is None:
        return layout.peak
    _, limit, apart = memory_limit(resources, source.device, base)
    return limit - apart


def _host_room(source: Source, resources: Resources, sizes: Sizes, layout: Layout, base: int) -> int:
    """Bytes of main memory that may be pinned for what waits beside a GPU."""
    if source.device.type != "cuda":
        return 0
    if resources.host_memory is None:
        return max(0, int(MEMORY_SHARE["cpu"] * free_main_memory()) - staging(sizes, layout))
    return max(0, parse_size(resources.host_memory) - base - staging(sizes, layout))


def _sizes(source: Source, config: MinifyConfig, batch: int, ranks: int, kept: int) -> Sizes:
    return sizes_of(
        source.model,
        config=config,
        ranks=ranks,
        batch_tokens=min(batch, config.num_windows) * config.window,
        item=source.dtype.itemsize,
        stored_item=source.stored_item,
        tokenizer=source.tokenizer_bytes,
        autograd=autograd_bytes(source.model, source.dtype, source.device, config.structures, tapped=not config.cuts),
        kept=kept,
        logits=LOGIT_BYTES.get(source.device.type, LOGIT_BYTES["cpu"]),
        loaded=source.checkpoint is None,
        streams=source.streams,
        writes=source.writes,
    )


def _check_groups(sizes: Sizes) -> None:
    """Refuse a pattern whose groups do not fill the rows of every map."""
    _, size = group_of(sizes.config.pattern) or (1, 1)
    for found in sizes.maps:
        if found.columns % size:
            raise ConfigError(
                f"Option pattern: expected one whose groups fill the {found.columns} inputs of {found}, got "
                f"{sizes.config.pattern}. Pass pattern='unstructured'."
            )


def _most_kept(structure: Structure, step: int, config: MinifyConfig) -> int:
    """The most units that a structure keeps which is cut."""
    return structure.num_units if config.keep == 1 or not config.cuts else (structure.num_units - 1) // step * step


def _kept_parameters(structures: list[Structure], config: MinifyConfig) -> int:
    """The most parameters of the structures that stay."""
    if not config.cuts:
        return sum(x.num_units * x.parameters for x in structures)
    for name in config.structures:
        mine = [structure for structure in structures if structure.name == name]
        largest, step = max(structure.num_units for structure in mine), step_of(mine[0], structures, config)
        if name == "mlp" and config.keep < 1 and step >= largest:
            raise ConfigError(
                f"Alignment: expected less than the largest layer width, {largest}, got {step}. Pass a smaller "
                "alignment or tp; layers of one unit cannot be cut."
            )
    # Whatever the saliency will be: refused now rather than after the sweep where no sizes fit the budget.
    sizes = kept_sizes(structures, [torch.zeros(x.num_units) for x in structures], config)
    if config.widths == "uniform":
        return sum(size * x.parameters for size, x in zip(sizes, structures, strict=True))
    # Whole units, where all cost the same.
    unit = structures[0].parameters if len({x.parameters for x in structures}) == 1 else 1
    return unit * int(config.keep * sum(x.num_units * x.parameters for x in structures) / unit + 1e-9)
