"""A plan as a person sees it, and as JSON."""

from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from rich.markup import escape
from rich.table import Table

from minisp.device import product_rate
from minisp.text.mixture import WRITTEN_SHARE, Shares
from minisp.units import megabytes, millions

Plan: TypeAlias = Any
"""A `minisp.plan.planner.Plan`, whose `str` is this table: importing it here would close a circle of imports."""

# Share of the rate of large matrix products that sweeps and solves reach: between 0.4 and 0.6 where it was measured.
REACHED = 0.5
# The same while the model writes, with one token of every text at a time.
WRITING_REACHES = 0.2


def plan_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain values for JSON."""
    values = asdict(plan)
    values["segments"] = [[segment.start, segment.stop] for segment in plan.segments]
    values["widths"] = list(plan.widths)
    values["peak_memory"] = plan.peak_memory
    return values


def expected_seconds(plan: Plan, shares: Shares | None = None) -> float:
    """About how long a run computes, in seconds, from the rates of matrix products measured here and now.

    Args:
        shares: of the windows, for the text that the run will have; None where nobody knows the text yet.
    """
    device = torch.device(plan.device)
    rate = product_rate(device, getattr(torch, plan.dtype))
    seconds = (plan.flops / rate + plan.solve_flops / product_rate(device, torch.float32)) / REACHED
    if plan.writes_text:
        share = WRITTEN_SHARE * plan.config.generic if shares is None else shares.written
        seconds += 2 * plan.parameters * share * plan.num_tokens / rate / WRITING_REACHES
    return float(seconds)


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
    low, high = min(plan.widths), max(plan.widths)
    width = f"{low}" if low == high else f"{low} to {high}"
    table.add_row("layers", f"{len(plan.widths)}, MLP width {width}")
    units = f"at most {plan.kept_units:,} of {sum(plan.widths):,} units"
    table.add_row("keep", f"{config.keep:.0%}: {units}, {config.widths} widths, multiples of {plan.alignment}")
    table.add_row("parameters", f"{millions(plan.parameters)} → at most {millions(plan.parameters_after)}")
    table.add_row("weights", f"{megabytes(plan.bytes)} → at most {megabytes(plan.bytes_after)}")
    for place, line in enumerate(_calibration(plan, shares)):
        table.add_row("" if place else "calibration", line)
    damping = "by cross-validation" if config.damping == "auto" else f"= {config.damping:g}"
    refit = f"ridge λ {damping} on {config.inputs} inputs" if config.reconstruct else "slicing only"
    table.add_row(
        "method",
        f"{config.saliency} saliency{', labels drawn by the model' if config.labels == 'sampled' else ''}, {refit}",
    )
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
