"""What a run costs, from shapes alone: floating-point operations, and bytes to and from disk."""

from collections.abc import Sequence

from minisp.config import MinifyConfig
from minisp.methods.statistics import PANEL_ROWS
from minisp.models.families import CausalLM, decoder_layers, family_of, structures_of
from minisp.phases.batches import correction_count
from minisp.phases.run import Phase
from minisp.phases.saliency import head_tokens
from minisp.phases.trials import TRIAL_CUT, trial_tokens
from minisp.plan.layout import Layout
from minisp.plan.rooms import (
    Rooms,
    dense_bytes,
    passes,
    refit_states,
    spilled,
    states,
    trial_states,
    waiting_bytes,
)  # fmt: skip
from minisp.plan.shape import Shape


def sweep_flops(model: CausalLM, config: MinifyConfig, layout: Layout, again: float, ranks: int) -> float:
    """Floating-point operations of the sweeps and the trial cuts of all processes, two a multiply-add.

    Args:
        again: share of the refit sweep's windows that pass a cut layer twice, for want of room.
    """
    family = family_of(model.config)
    layers, structures = decoder_layers(model, family), structures_of(model, family)
    widths = [structure.width for structure in structures]
    tokens = config.num_windows * config.window
    inside = sum(p.numel() for p in layers.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    recompute = 1 if layout.stream_vocabulary else 1 - 1 / -(-len(layers) // layout.segment)
    gram = sum(m * m for m in widths) if config.collects_gram else 0
    down = sum(widths) * model.config.hidden_size
    scored = (config.saliency_windows or config.num_windows) * config.window
    total = tokens * gram + scored * (2 * inside * (2 + recompute) + (6 if layout.stream_vocabulary else 4) * head)
    if config.collects_gram:
        # The others run forward only: to the boundaries, and again where the layers are watched.
        total += (tokens - scored) * 2 * inside * (1 + recompute)
    # A passage through a layer that is cut, and, of its windows, the last product or another passage; what leaves the
    # last layer is not wanted.
    cut = 2 * (inside - (1 - config.keep) * sum(x.parameters * x.num_units for x in structures))
    second = (1 - 1 / len(layers)) * (again * cut + (1 - again) * 2 * config.keep * down)
    if config.refit_sweep and not config.corrects:
        total += tokens * (2 * (inside - down) + sum(m * m for m in widths) + second)
    if config.corrects:
        # The dense model, the pruned one, the drift's Gram matrix and cross product.
        heals = correction_count(config.num_windows, config.window, ranks) * config.window
        total += heals * (
            (0 if layout.dense else 2 * inside) + cut + second + config.keep**2 * gram + 2 * config.keep * down
        )
    if config.measures:
        # At layer l run the trials of the l layers below, its own and the dense model: L(L + 3)/2 layers in all.
        # The head takes every second token of all trials and of the dense model.
        total += trial_tokens(tokens, len(layers)) * ((len(layers) + 3) * inside + (len(layers) + 1) * head)
    return float(total)


def solve_flops(widths: Sequence[int], config: MinifyConfig, hidden: int) -> float:
    """Floating-point operations of the ridge solves: of the refit, of the trial cuts, of the correction.

    A solve of n units is a Cholesky n³/3 and two triangular solves 2n²d; a refit also takes W_P G_PS, 2(m − n)nd, and
    two products of W with G for its residuals, 2m²d.
    """
    if config.keep == 1 or not config.reconstruct:
        return 0.0
    cuts = [config.keep, 1 - TRIAL_CUT] if config.measures else [config.keep]
    total = 0.0
    for m in widths:
        for n in (keep * m for keep in cuts):
            total += n**3 / 3 + 2 * n * n * hidden + 2 * (m - n) * n * hidden + 2 * m * m * hidden
        if config.corrects:
            n = config.keep * m
            total += n**3 / 3 + 2 * n * n * hidden
    return total


def disk_traffic(shape: Shape, layout: Layout, rooms: Rooms, widths: Sequence[int], bytes_after: int) -> dict[str, int]:
    """Bytes to and from disk, by purpose; the system keeps in memory what it can of them.

    States that have room in memory are none of them; what is saved of them every few minutes is not counted.
    """
    if not shape.writes:
        return {}

    def share(phase: Phase) -> float:
        return spilled(shape, layout, rooms, phase)

    segments, forward = passes(shape, layout)
    layers = shape.num_layers * shape.layer * shape.stored_item
    vocabulary = shape.vocabulary_weights * shape.stored_item
    heads = -(-shape.tokens // max(head_tokens(shape.hidden), shape.batch_tokens))
    visits = 1 + forward / segments + (shape.trials > 0) + (shape.refits > 0)
    return {
        # The sweeps, and what is copied to the result.
        "weights read": int(layers * (visits + 1)) + vocabulary * (1 + (2 * heads if layout.stream_vocabulary else 1))
        if shape.streams
        else 0,
        # States are written once and read on both ways, gradients written and read.
        "states": int(share(Phase.SWEEP) * states(shape) * (2 * forward + 3 * (segments - 1))),
        # The states of every trial below a layer pass it.
        "trials": int(share(Phase.TRIALS) * shape.num_layers * (shape.num_layers + 2) * trial_states(shape)),
        "dense states": 2 * dense_bytes(shape) if layout.dense == "disk" else 0,
        # Of the pruned model, and of the dense one where it runs again: written once and read twice.
        "refit states": int(
            share(Phase.REFIT_SWEEP) * (3 if layout.dense else 6) * shape.num_layers * refit_states(shape)
        ),
        "statistics": 2 * _panels(shape, widths),
        "refitted": 2 * sum(widths) * shape.hidden * shape.stored_item,
        "result": bytes_after,
    }


def scratch_room(shape: Shape, layout: Layout, rooms: Rooms, widths: Sequence[int]) -> int:
    """Bytes that what waits in the scratch folder takes at most at once."""
    if not shape.writes:
        return 0
    # The boundary that is saved and the one that replaces it. Where states have no room in memory, the one that was
    # saved last stays beside them.
    saved = {Phase.SWEEP: 2 * states(shape), Phase.TRIALS: 2 * (shape.num_layers + 1) * trial_states(shape)}
    saved[Phase.REFIT_SWEEP] = 4 * refit_states(shape)
    passing = [
        saved[phase] if spilled(shape, layout, rooms, phase) == 0 else waiting + saved[phase] // 2
        for phase, waiting in waiting_bytes(shape, layout).items()
    ]
    dense = dense_bytes(shape) if layout.dense == "disk" else 0
    return max(passing, default=0) + dense + _panels(shape, widths) + sum(widths) * shape.hidden * shape.stored_item


def _panels(shape: Shape, widths: Sequence[int]) -> int:
    """Gram matrices in float32, a panel of rows at a time as far as the diagonal."""
    if not shape.gram:
        return 0
    panels = [(start, min(start + PANEL_ROWS, m)) for m in widths for start in range(0, m, PANEL_ROWS)]
    return sum(4 * (stop - start) * stop for start, stop in panels)
