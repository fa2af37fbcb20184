"""What a run costs, from shapes alone: floating-point operations, and bytes to and from disk."""

from collections.abc import Sequence

from minisp.allocation import TRIAL_CUT, trial_tokens
from minisp.architecture import CausalLM, architecture_of, decoder_layers, layer_widths
from minisp.batches import heal_count
from minisp.config import MinifyConfig
from minisp.memory import Layout, Shape
from minisp.statistics import PANEL_ROWS
from minisp.sweep import HEAD_TOKENS


def sweep_flops(model: CausalLM, config: MinifyConfig, num_segments: int, layout: Layout) -> float:
    """Floating-point operations of the sweeps and the trial cuts, two a multiply-add."""
    row = architecture_of(model.config)
    layers, widths = decoder_layers(model, row), layer_widths(model, row)
    tokens = config.num_windows * config.window
    inside = sum(p.numel() for p in layers.parameters())
    head = model.config.vocab_size * model.config.hidden_size
    recompute = 1 if layout.stream_vocabulary else 1 - 1 / num_segments
    gram = sum(m * m for m in widths)
    total = tokens * (2 * inside * (2 + recompute) + (6 if layout.stream_vocabulary else 4) * head + gram)
    if config.heals and config.inputs == "pruned":
        total += tokens * 2 * inside * (1 + config.keep)
    if config.heals and config.inputs == "both":
        # The dense model once, the pruned one at full width and then cut; the drift's Gram matrix and cross product.
        heals = heal_count(config.num_windows, config.window) * config.window
        total += heals * (2 * inside * (2 + config.keep) + config.keep**2 * gram)
        total += heals * 2 * config.keep * sum(widths) * model.config.hidden_size
    if config.measures:
        total += trial_tokens(tokens, len(layers)) * len(layers) * (inside + head)
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
        if config.inputs == "both":
            n = config.keep * m
            total += n**3 / 3 + 2 * n * n * hidden
    return total


def disk_traffic(shape: Shape, layout: Layout, widths: Sequence[int], bytes_after: int) -> dict[str, int]:
    """Bytes to and from disk, by purpose; the system keeps in memory what it can of them."""
    if not shape.writes:
        return {}
    segments, forward = _passes(shape, layout)
    layers = shape.num_layers * shape.layer * shape.stored_item
    vocabulary = shape.vocabulary_weights * shape.stored_item
    heads = -(-shape.tokens // max(HEAD_TOKENS, shape.batch_tokens))
    visits = 1 + forward / segments + (shape.trials > 0) + (shape.heals > 0)
    return {
        # The sweeps, the down projections once more, and what is copied to the result.
        "weights read": int(layers * (visits + 1.3)) + vocabulary * (1 + (2 * heads if layout.stream_vocabulary else 1))
        if shape.streams
        else 0,
        # States are written once and read on both ways, gradients written and read.
        "states": _states(shape) * (2 * forward + 3 * (segments - 1)),
        # The states of every trial below a layer pass it.
        "trials": shape.num_layers * (shape.num_layers + 2) * _trial_states(shape),
        # Of the dense and of the pruned model: both are written once and read twice.
        "heal states": 6 * shape.num_layers * _heal_states(shape),
        "statistics": 2 * _panels(shape, widths),
        "refitted": 2 * sum(widths) * shape.hidden * shape.stored_item,
        "result": bytes_after,
    }


def scratch_room(shape: Shape, layout: Layout, widths: Sequence[int]) -> int:
    """Bytes that what waits in the scratch folder takes at most at once."""
    if not shape.writes:
        return 0
    _, forward = _passes(shape, layout)
    passing = [_states(shape) * (forward + 2)]
    passing += [2 * (shape.num_layers + 1) * _trial_states(shape), 4 * _heal_states(shape)]
    return max(passing) + _panels(shape, widths) + sum(widths) * shape.hidden * shape.stored_item


def _passes(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Segments, and those that a forward pass of its own runs through."""
    segments = -(-shape.num_layers // layout.segment)
    return segments, segments if layout.stream_vocabulary else segments - 1


def _states(shape: Shape) -> int:
    return shape.tokens * shape.hidden * shape.item


def _heal_states(shape: Shape) -> int:
    return shape.heals * shape.hidden * shape.item


def _trial_states(shape: Shape) -> int:
    return shape.trials * shape.hidden * shape.item


def _panels(shape: Shape, widths: Sequence[int]) -> int:
    """Gram matrices in float32, a panel of rows at a time as far as the diagonal."""
    if not shape.gram:
        return 0
    panels = [(start, min(start + PANEL_ROWS, m)) for m in widths for start in range(0, m, PANEL_ROWS)]
    return sum(4 * (stop - start) * stop for start, stop in panels)
