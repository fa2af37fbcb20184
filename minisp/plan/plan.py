"""The plan: what a run would do, as a record, as a table and as JSON."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from minisp.config import MinifyConfig
from minisp.device import product_rate
from minisp.models.maps import LinearMap
from minisp.models.structures import UNITS, Structure
from minisp.phases.run import Phase
from minisp.plan.layout import Layout
from minisp.resources import Resources
from minisp.store.tiers import Room
from minisp.text.mixture import WRITTEN_SHARE, Shares
from minisp.units import as_text, megabytes, millions, spread

# Share of the rate of large matrix products that sweeps and solves reach: between 0.4 and 0.6 where it was measured.
REACHED = 0.5
# The same while the model writes, with one token of every text at a time.
WRITING_REACHES = 0.2


@dataclass(frozen=True)
class Plan:
    """What `minify` would do with this model and config.

    Attributes:
        config, resources: the options.
        model: folder, file, hub id, or class name of an in-memory model.
        model_type: transformers family.
        structures: what can be cut.
        maps: the linear maps where weights are set to zero; none where units are cut.
        alignment: MLP widths are multiples of it.
        parameters, parameters_after: counts; after is an upper bound.
        cuttable: parameters of all structures; kept_parameters: the most of them that stay.
        bytes, bytes_after: weights on disk in the stored type; after is an upper bound.
        batch: calibration windows per micro-batch.
        segments: layers held together, in forward order.
        layout: what is held at once, and the memory that it takes by phase.
        rooms: phase → bytes of hidden states that stay on the computing device, and bytes in pinned main memory.
        behind: bytes of pinned main memory for records on their way from a GPU to the disk.
        streams: whether weights stream from disk.
        device, dtype: where and in what type it computes.
        implementations: who computes each operation of the engine, see `ops.implementations`.
        work: by phase, floating-point operations of its sweeps, and those of its ridge solves, in float32.
        traffic: bytes read from and written to disk, by purpose.
        scratch_bytes: most disk space that states, statistics and results take at once.
        dense_bytes: the part of it that the dense states take. A disk with less than four times that gets none.
        base_memory: bytes that the process had before.
    """

    config: MinifyConfig
    resources: Resources
    model: str
    model_type: str
    structures: tuple[Structure, ...] = field(repr=False)
    maps: tuple[LinearMap, ...] = field(repr=False)
    alignment: int
    parameters: int
    parameters_after: int
    cuttable: int
    kept_parameters: int
    bytes: int
    bytes_after: int
    batch: int
    segments: tuple[range, ...]
    layout: Layout
    rooms: dict[Phase, Room]
    behind: int
    streams: bool
    device: str
    dtype: str
    implementations: dict[str, str]
    work: dict[Phase, tuple[float, float]]
    traffic: dict[str, int]
    scratch_bytes: int
    dense_bytes: int
    base_memory: int = field(compare=False)

    def __str__(self) -> str:
        """The plan's table as text."""
        return as_text(plan_table(self))

    @property
    def units(self) -> dict[str, tuple[int, ...]]:
        """Name of a kind of structure → its units in every layer."""
        names = dict.fromkeys(structure.name for structure in self.structures)
        return {name: tuple(x.num_units for x in self.structures if x.name == name) for name in names}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that run, and of some of them parts that the plan counts apart."""
        return tuple(self.layout.peaks)

    @property
    def flops(self) -> float:
        """Floating-point operations of the sweeps."""
        return sum(sweeps for sweeps, _ in self.work.values())

    @property
    def solve_flops(self) -> float:
        """Those of the ridge solves, in float32."""
        return sum(solves for _, solves in self.work.values())

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""
        return self.config.num_windows * self.config.window

    @property
    def write_room(self) -> int | None:
        """Bytes for the caches of what the model writes, beside its weights; None where it writes nothing."""
        if not self.writes_text:
            return None
        sweep = self.layout.peaks[Phase.SWEEP]
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


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain values for JSON."""
    left_out = ("structures", "maps")
    values = {item.name: _plain(getattr(plan, item.name)) for item in fields(plan) if item.name not in left_out}
    values["rooms"] = {phase: asdict(room) for phase, room in plan.rooms.items()}
    values["segments"] = [[segment.start, segment.stop] for segment in plan.segments]
    values["structures"] = {name: list(units) for name, units in plan.units.items()}
    values["maps"] = len(plan.maps)
    values |= {name: getattr(plan, name) for name in ("flops", "solve_flops", "peak_memory")}
    return values


def expected_seconds(plan: Plan, shares: Shares | None = None) -> dict[Phase, float]:
    """About how long each phase computes, in seconds, from the rates of matrix products measured here and now.

    Args:
        shares: of the windows, for the text that the run will have; None where nobody knows the text yet.
    """
    device = torch.device(plan.device)
    rate, solve_rate = (product_rate(device, dtype) for dtype in (getattr(torch, plan.dtype), torch.float32))
    seconds = {phase: (sweeps / rate + solves / solve_rate) / REACHED for phase, (sweeps, solves) in plan.work.items()}
    if plan.writes_text:
        share = WRITTEN_SHARE * plan.config.generic if shares is None else shares.written
        seconds[Phase.TEXT] = 2 * plan.parameters * share * plan.num_tokens / rate / WRITING_REACHES
    return seconds


def _share(keep: float) -> str:
    """A share in per cent: 80%, or 74.31% where it is no round one."""
    return f"{keep:.0%}" if round(100 * keep, 2) == round(100 * keep) else f"{keep:.2%}"


def _budget(plan: Plan) -> str:
    """What stays at most: weights, units where all of them cost the same, or parameters."""
    config = plan.config
    if not config.cuts:
        weights = sum(x.rows * x.columns for x in plan.maps)
        shots = f" in {config.shots} shots" if config.shots > 1 else ""
        return f"of {millions(weights)} weights in {len(plan.maps)} linear maps, {config.pattern}{shots}; others are 0"
    costs = {structure.parameters for structure in plan.structures}
    total = sum(structure.num_units for structure in plan.structures)
    if len(costs) == 1:
        return f"at most {plan.kept_parameters // costs.pop():,} of {total:,} units{_widths(plan)}"
    return f"at most {millions(plan.kept_parameters)} of {millions(plan.cuttable)} parameters{_widths(plan)}"


def _widths(plan: Plan) -> str:
    return f", {plan.config.widths} widths, multiples of {plan.alignment}"


def _method(config: MinifyConfig) -> str:
    """How what goes is chosen, and how the rest makes up for it."""
    labels = {"text": "", "sampled": ", labels drawn by the model", "both": ", labels of the text and drawn ones"}
    damping = "by cross-validation" if config.damping == "auto" else f"= {config.damping:g}"
    drift = ", drift corrected" if config.corrects else ""
    refit = f"ridge λ {damping} on the {config.refit_on} model{drift}" if config.reconstruct else "slicing only"
    if config.method == "taylor":
        return f"{config.saliency} saliency{labels[config.labels]}, {refit}"
    if config.method == "surgeon":
        after = f", {refit}" if config.cuts else ", correlated updates"
        dampings = f"λ {damping} of inputs, {config.gradient_damping:g} of gradients"
        return f"surgeon: Kronecker-factored curvature{labels[config.labels]} ({dampings}){after}"
    return {"sparsegpt": f"SparseGPT, λ {damping}", "wanda": "Wanda", "magnitude": "magnitude of the weights"}[
        config.method
    ]


def plan_table(plan: Plan, seconds: float | None = None, shares: Shares | None = None) -> Table:
    """The plan as a table for the terminal.

    Args:
        seconds: that the computation is expected to take, see `expected_seconds`; None leaves the time out.
        shares: of the windows, for the text that the run will have; None where nobody knows the text yet.
    """
    config = plan.config
    table = Table(title=escape(f"Plan: {plan.model} ({plan.model_type})"), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    sizes = [f"{spread(units)} {UNITS[name]} each" for name, units in plan.units.items()]
    table.add_row("layers", f"{plan.structures[-1].layer + 1} with {' and '.join(sizes)}")
    table.add_row("keep", f"{_share(config.keep)}: {_budget(plan)}")
    if config.target_size or config.target_params:
        table.add_row("target", f"at most {config.target_size or config.target_params}")
    if config.cuts:
        table.add_row("parameters", f"{millions(plan.parameters)} → at most {millions(plan.parameters_after)}")
        table.add_row("weights", f"{megabytes(plan.bytes)} → at most {megabytes(plan.bytes_after)}")
    for place, line in enumerate(_calibration(plan, shares)):
        table.add_row("" if place else "calibration", line)
    table.add_row("method", _method(config))
    layout = plan.layout
    held = f"{len(plan.segments)} segment(s) of {len(plan.segments[0])} layer(s)"
    ahead = ", the next one read meanwhile" if layout.num_slots > 1 else ""
    table.add_row("compute", f"{plan.device}, {plan.dtype}, {plan.batch} window(s) at once, {held}{ahead}")
    if layout.stream_vocabulary:
        table.add_row("", "embeddings and head stay on disk")
    kernels = dict.fromkeys(plan.implementations.values())
    by = "; ".join(f"{who}: {', '.join(n for n, w in plan.implementations.items() if w == who)}" for who in kernels)
    table.add_row("kernels", by)
    time = (
        f"; about {seconds / 60:.0f} min" if seconds and seconds > 90 else f"; about {seconds:.0f} s" if seconds else ""
    )
    table.add_row(
        "work", f"{plan.flops / 1e12:.1f} TFLOP in the sweeps, {plan.solve_flops / 1e12:.2f} in the solves{time}"
    )
    for phase, purposes in layout.peaks.items():
        parts = ", ".join(f"{name} {megabytes(size)}" for name, size in purposes.items() if size)
        table.add_row(f"memory, {phase}", f"{megabytes(sum(purposes.values()))}: {parts}")
    for phase, room in plan.rooms.items():
        where = "in memory" if plan.device == "cpu" else f"on {plan.device}"
        beside = f" and {megabytes(room.host)} in main memory" if room.host else ""
        table.add_row(f"states, {phase}", f"room for {megabytes(room.device)} {where}{beside}, the rest on disk")
    process = f" with the process itself ({megabytes(plan.base_memory)})" if plan.device == "cpu" else ""
    table.add_row("memory, peak", f"{megabytes(plan.peak_memory)}{process}")
    if plan.traffic:
        parts = ", ".join(f"{name} {megabytes(size)}" for name, size in plan.traffic.items() if size)
        table.add_row("disk traffic", f"{parts}; {megabytes(plan.scratch_bytes)} of room while it runs")
    return table


def _calibration(plan: Plan, shares: Shares | None) -> list[str]:
    """How much text, and what of it is generic, a line each."""
    config = plan.config
    some = f", saliency on {config.saliency_windows} of them" if config.saliency_windows else ""
    lines = [f"{config.num_windows} windows of {config.window} tokens ({plan.num_tokens:,}){some}"]
    generic = config.generic if shares is None else shares.generic
    if generic:
        parts = "Python's documentation and code; the model, which is not in memory whole, writes none"
        if plan.writes_text:
            parts = "half written by the model, one token after the other, half Python's documentation and code"
        unless = ", unless the text names builtin sources" if shares is None else ""
        lines.append(f"{generic:.0%} of them generic{unless}: {parts}")
    return lines
