"""How much memory a run needs, by phase and purpose, and the fastest layout that a limit allows.

Shapes: T tokens, B·L tokens of a micro-batch, d hidden size, m units, n kept units, V vocabulary. Every figure is the
largest layer's. A phase is over before the next one begins, so the peak is the largest phase, not their sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from minisp.device import HEAP_BYTES
from minisp.errors import ConfigError
from minisp.methods.statistics import PANEL_ROWS
from minisp.models.vocabulary import BLOCK_BYTES
from minisp.ops.ridge import ROWS
from minisp.phases.run import Phase
from minisp.phases.saliency import head_tokens
from minisp.phases.trials import COMPARED_AT_ONCE, TRIAL_CUT
from minisp.plan.shape import Shape
from minisp.store.ring import ring_bytes
from minisp.store.writer import PIECE_BYTES

# Memory of a loaded tokenizer for each byte of its file: 60 MB for SmolLM2's 3.5 MB, measured.
TOKENIZER_FACTOR = 18

# What the BLAS keeps for its packed operands, once a layer was solved.
BLAS_BYTES = 64 * 2**20

# What shorter windows, or fewer at once, make smaller.
BY_BATCH = ("activations", "boundary states", "states and gradients")

# Where states that wait in memory are counted among a phase's.
HELD = "waiting states"

Peaks = dict[Phase, dict[str, int]]
"""Phase → purpose → bytes."""


@dataclass(frozen=True)
class Layout:
    """How a run uses its memory.

    Attributes:
        segment: consecutive layers held at once.
        num_slots: segments in memory at once; 2 reads ahead.
        stream_vocabulary: whether embeddings and head stay on disk.
        peaks: bytes by phase and purpose, beside the process itself.
        dense: where the dense model's states of the refit sweep's windows wait from the saliency sweep on, for every
            layer: "memory" or "disk"; None: nowhere, the refit sweep computes them again.
    """

    segment: int
    num_slots: int
    stream_vocabulary: bool
    peaks: Peaks
    dense: str | None = None

    @property
    def layer_slots(self) -> int:
        """Layers in memory at once where a phase visits one after the other: no more than the sweep holds."""
        return min(2, self.num_slots * self.segment)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(sum(purposes.values()) for purposes in self.peaks.values())


def choose_layout(shape: Shape, limit: int, segment: int | None, what: str, base: int = 0) -> Layout:
    """The fastest layout within `limit` bytes: few segments recompute little, and what is held is read once.

    Args:
        segment: layers held at once, where it is given.
        what: how a message calls the limit.
        base: bytes that the process itself takes, for the message.

    Raises:
        ConfigError: nothing fits.
    """
    smallest: Layout | None = None
    for candidate in _candidates(shape, segment):
        layout = Layout(*candidate, peaks=_peaks(shape, *candidate))
        if layout.peak <= limit:
            return layout
        if smallest is None or layout.peak < smallest.peak:
            smallest = layout
    assert smallest is not None
    phase, purposes = max(smallest.peaks.items(), key=lambda item: sum(item[1].values()))
    largest = max(purposes, key=lambda name: purposes[name])
    raise ConfigError(
        f"{what}: expected at least {ceil((smallest.peak + base) / 1e6) / 1e3:.3f} GB, "
        f"got {(limit + base) / 1e9:.3f} GB. With "
        f"{smallest.segment} layer(s) at once the {phase} takes {smallest.peak / 1e9:.3f} GB, most of it for {largest} "
        f"({purposes[largest] / 1e9:.3f} GB), beside {base / 1e9:.3f} GB for the process itself. Allow more"
        f"{', or pass shorter windows (window), or fewer at once (batch)' if largest in BY_BATCH else ''}."
    )


def staging(shape: Shape, layout: Layout) -> int:
    """Main memory in bytes that a run on a GPU takes: pinned copies of what is read, and what waits to be written.

    torch keeps pinned blocks when they are free again, and rounds each up to a power of two.
    """
    read = layout.segment * shape.layer if shape.streams else shape.vocabulary_weights
    read = ring_bytes(read * shape.stored_item) if shape.streams else _power_of_two(read * shape.stored_item)
    states = 6 * _power_of_two(shape.batch_tokens * shape.hidden * shape.item)
    states += 3 * _power_of_two(PANEL_ROWS * 4 * shape.width)
    written = 2 * shape.layer * shape.stored_item + _pieces(shape)
    return read + states + written + TOKENIZER_FACTOR * shape.tokenizer


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _candidates(shape: Shape, segment: int | None) -> Iterator[tuple[int, int, bool]]:
    """(segment, slots, whether the vocabulary streams) from fast to frugal."""
    whole = shape.num_layers
    sizes = sorted({-(-whole // count) for count in range(1, whole + 1)}, reverse=True)
    if segment is not None:
        sizes = [min(segment, whole)]
    for stream_vocabulary in (False, True) if shape.streams else (False,):
        for size in sizes:
            yield size, 2 if shape.streams and size < whole else 1, stream_vocabulary
        if shape.streams and sizes[-1] < whole:
            yield sizes[-1], 1, stream_vocabulary


def _peaks(shape: Shape, segment: int, num_slots: int, stream_vocabulary: bool) -> Peaks:
    held = segment * num_slots if shape.streams else shape.num_layers
    stored = shape.stored_item if shape.streams else shape.item
    # Where the stored type is not the compute type, what is held is there in both.
    converted = shape.layer * shape.item if shape.streams and shape.item != shape.stored_item else 0
    vocabulary = 0 if stream_vocabulary else shape.vocabulary_weights * shape.item
    resident = {
        "weights": 0 if shape.loaded else held * shape.layer * stored + segment * converted,
        "embeddings and head": 0 if shape.loaded else vocabulary + shape.outside * shape.item,
        "tokenizer": TOKENIZER_FACTOR * shape.tokenizer,
        "freed blocks": min(HEAP_BYTES, _activations(shape, segment)),
    }
    after = resident | {"weights": 0} if shape.streams else resident
    # One layer at a time, in the order of the layers.
    slots = min(2, num_slots * segment)
    again = after | {"weights": slots * shape.layer * stored + converted} if shape.streams else after
    peaks = {Phase.SWEEP: resident | _sweep(shape, segment, stream_vocabulary)}
    if stream_vocabulary:
        peaks[Phase.HEAD] = resident | _head(shape)
    peaks[Phase.REFIT] = after | _reconstruction(shape, shape.kept)
    if shape.trials:
        peaks |= _trials(shape, again, stream_vocabulary)
    if shape.refits:
        peaks[Phase.REFIT_SWEEP] = again | _refit_sweep(shape)
    if shape.writes:
        copied = {"a layer": 2 * shape.layer * shape.stored_item, "pieces": _pieces(shape)}
        peaks[Phase.WRITING] = after | copied
    return peaks


def _sweep(shape: Shape, segment: int, stream_vocabulary: bool) -> dict[str, int]:
    """Statistics and activations of a segment, and what waits in memory where there is no folder."""
    d, m, item = shape.hidden, shape.width, shape.item
    boundaries = -(-shape.num_layers // segment)
    in_memory = 0 if shape.writes else (boundaries + 1) * shape.tokens * d * item
    grams = segment if shape.writes else shape.num_layers
    return {
        "Gram matrices": grams * 4 * m * m if shape.gram else 0,
        "activations": _activations(shape, segment),
        "boundary states": in_memory + 6 * shape.batch_tokens * d * item,
        "logits": 0 if stream_vocabulary else min(shape.logits, 2 * shape.tokens * shape.vocabulary) * 2,
        # Row panels on their way to the disk.
        "writing": 3 * PANEL_ROWS * 4 * m if shape.writes and shape.gram else 0,
    }


def _head(shape: Shape) -> dict[str, int]:
    """Many windows at once, through a head that is read a block at a time."""
    d, item = shape.hidden, shape.item
    tokens = min(max(head_tokens(shape.hidden), shape.batch_tokens), shape.tokens)
    # Hidden states and gradients as read, joined and parted; the final norm's float32 copies, forward and backward; the
    # float32 gradient and what is added to it.
    states = tokens * d * (4 * item + 9 * 4)
    # Logits in float32 four times, and two blocks of the head's rows.
    return {"states and gradients": states, "logits": (4 + 2) * BLOCK_BYTES}


def _refit_sweep(shape: Shape) -> dict[str, int]:
    """The refit, or, at full width, X_SᵀX_S, X_SᵀE and its transpose: of layers that are not cut too."""
    d, m, item = shape.hidden, shape.width, shape.item
    drift = {
        "Gram matrices": 4 * m**2 + 2 * 4 * m * d,
        "activations": shape.batch_tokens * (4 * item * m + 8 * 4 * d + 2 * item * d),
        "cut layer": (3 * item + 2 * shape.stored_item) * d * m,
    }
    # Into and out of a layer, of the dense and of the pruned model.
    waiting = {} if shape.writes else {HELD: 4 * shape.refits * d * item}
    return max(_reconstruction(shape, shape.kept), drift, key=lambda part: sum(part.values())) | waiting


def _trials(shape: Shape, again: dict[str, int], stream_vocabulary: bool) -> Peaks:
    """A layer refitted at two thirds of its width; run with zeros at full width; outputs compared, a few at once."""
    tokens = shape.trials
    blas = {"buffers of the BLAS": _blas(shape)}
    states = tokens * shape.hidden * shape.item
    waiting = 0 if shape.writes else 2 * (shape.num_layers + 1) * states
    down = {HELD: waiting, "states": 4 * states, "trial weights": 2 * shape.stored_item * shape.hidden * shape.width}
    passing = {"activations": tokens * (4 * shape.item * shape.width + 6 * 4 * shape.hidden)}
    logits = min(shape.logits, 4 * tokens * shape.vocabulary)
    compared = (6 + 2) * BLOCK_BYTES if stream_vocabulary else 4 * logits + logits // 2
    kept = shape.width - int(TRIAL_CUT * shape.width)
    return {
        Phase.TRIALS: again | down | max(_reconstruction(shape, kept), passing, key=lambda part: sum(part.values())),
        Phase.TRIAL_OUTPUTS: again
        | blas
        | {HELD: waiting // 2, "states": (COMPARED_AT_ONCE + 2) * states, "logits": compared},
    }


def _activations(shape: Shape, segment: int) -> int:
    """What autograd keeps for a micro-batch, and what one layer's backward adds for a moment."""
    # x and ∂L/∂x of the MLP, and of the hidden size what enters and leaves norms, attention and the layer. When
    # attention has its turn, the MLP's 2m are free again.
    passing = shape.item * (2 * shape.width + 8 * shape.hidden)
    return shape.batch_tokens * (segment * shape.autograd + passing)


def _reconstruction(shape: Shape, n: int) -> dict[str, int]:
    """One layer's solve for n units: G and W whole, G_SS, the gathered rest, right-hand sides and W', in float32."""
    d, m = shape.hidden, shape.width
    # W_P, and a few hundred rows at a time: of G, read and gathered, and of products. W_S, W_P G_PS, right-hand sides
    # and W'.
    gathered = 4 * d * (m - n) + (3 + 2) * 4 * ROWS * m + 3 * 4 * PANEL_ROWS * m
    sides = 4 * 4 * d * n
    grams = shape.num_layers - 1 if not shape.writes and shape.gram else 0
    return {
        "Gram matrices": 4 * m * m * (1 + grams),
        "ridge system": 4 * n * n + gathered,
        "right-hand sides": sides + shape.stored_item * d * m,
        "buffers of the BLAS": _blas(shape),
    }


def _pieces(shape: Shape) -> int:
    """Tensors on their way to the output, larger ones in pieces: made, waiting twice, written, hashed."""
    return 5 * min(PIECE_BYTES, max(shape.layer, shape.vocabulary_weights) * shape.stored_item)


def _blas(shape: Shape) -> int:
    """No more than it packs."""
    return min(BLAS_BYTES, 3 * 4 * shape.width**2)
