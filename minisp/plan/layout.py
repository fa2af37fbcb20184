"""How much memory a run needs, by phase and purpose, and the fastest layout that a limit allows.

A phase is over before the next one begins, so the peak is the largest phase, not their sum. What a phase itself takes
stands beside its code as `demand`; here the weights that are held meanwhile join it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

from minisp.device import HEAP_BYTES
from minisp.errors import ConfigError
from minisp.methods.statistics import PANEL_ROWS
from minisp.phases import decide, refit, shots, sweep, trials
from minisp.phases.run import Phase
from minisp.phases.sizes import Demand, Holding, Sizes
from minisp.store.ring import ring_bytes
from minisp.store.writer import PIECE_BYTES

# Memory of a loaded tokenizer for each byte of its file: 60 MB for SmolLM2's 3.5 MB, measured.
TOKENIZER_FACTOR = 18

# What shorter windows, or fewer at once, make smaller.
BY_BATCH = ("activations", "boundary states", "states and gradients")

Peaks = dict[Phase, dict[str, int]]
"""Phase → purpose → bytes."""


@dataclass(frozen=True)
class Layout(Holding):
    """How a run uses its memory.

    Attributes:
        peaks: bytes by phase and purpose, beside the process itself.
    """

    peaks: Peaks = field(default_factory=dict)

    @property
    def layer_slots(self) -> int:
        """Layers in memory at once where a phase visits one after the other: no more than the sweep holds."""
        return min(2, self.num_slots * self.segment)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(sum(purposes.values()) for purposes in self.peaks.values())


def demands(sizes: Sizes, holding: Holding, again: float = 0.0) -> dict[Phase, Demand]:
    """What each phase of a run takes.

    Args:
        again: share of the refit sweep's windows that pass a cut layer twice, see `refit.demand`.
    """
    if sizes.maps:
        return {Phase.SWEEP: sweep.demand(sizes, holding), Phase.UPDATE: shots.demand(sizes)}
    return {
        Phase.SWEEP: sweep.demand(sizes, holding),
        Phase.DECISION: decide.demand(sizes),
        Phase.TRIALS: trials.demand(sizes, holding.stream_vocabulary),
        Phase.REFIT_SWEEP: refit.demand(sizes, holding, again),
    }


def choose_layout(sizes: Sizes, limit: int, segment: int | None, what: str, base: int = 0) -> Layout:
    """The fastest layout within `limit` bytes: few segments recompute little, and what is held is read once.

    Args:
        segment: layers held at once, where it is given.
        what: how a message calls the limit.
        base: bytes that the process itself takes, for the message.

    Raises:
        ConfigError: nothing fits.
    """
    smallest: Layout | None = None
    for candidate in _candidates(sizes, segment):
        layout = Layout(*candidate, peaks=_peaks(sizes, Holding(*candidate)))
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


def staging(sizes: Sizes, layout: Layout) -> int:
    """Main memory in bytes that a run on a GPU takes: pinned copies of what is read, and what waits to be written.

    torch keeps pinned blocks when they are free again, and rounds each up to a power of two.
    """
    read = layout.segment * sizes.layer if sizes.streams else sizes.vocabulary_weights
    read = ring_bytes(read * sizes.stored_item) if sizes.streams else _power_of_two(read * sizes.stored_item)
    states = 6 * _power_of_two(sizes.states(sizes.batch_tokens)) + 3 * _power_of_two(PANEL_ROWS * 4 * sizes.width)
    written = 2 * sizes.layer * sizes.stored_item + _pieces(sizes)
    return read + states + written + TOKENIZER_FACTOR * sizes.tokenizer


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _candidates(sizes: Sizes, segment: int | None) -> Iterator[tuple[int, int, bool]]:
    """(segment, slots, whether the vocabulary streams) from fast to frugal."""
    whole = sizes.num_layers
    lengths = sorted({-(-whole // count) for count in range(1, whole + 1)}, reverse=True)
    if segment is not None:
        lengths = [min(segment, whole)]
    for stream_vocabulary in (False, True) if sizes.streams else (False,):
        for length in lengths:
            yield length, 2 if sizes.streams and length < whole else 1, stream_vocabulary
        if sizes.streams and lengths[-1] < whole:
            yield lengths[-1], 1, stream_vocabulary


def _peaks(sizes: Sizes, holding: Holding) -> Peaks:
    """The demands of all phases, and the weights that are in memory meanwhile."""
    held = holding.segment * holding.num_slots if sizes.streams else sizes.num_layers
    stored = sizes.stored_item if sizes.streams else sizes.item
    # Where the stored type is not the compute type, what is held is there in both.
    converted = sizes.layer * sizes.item if sizes.streams and sizes.item != sizes.stored_item else 0
    vocabulary = 0 if holding.stream_vocabulary else sizes.vocabulary_weights * sizes.item
    resident = {
        "weights": 0 if sizes.loaded else held * sizes.layer * stored + holding.segment * converted,
        "embeddings and head": 0 if sizes.loaded else vocabulary + sizes.outside * sizes.item,
        "tokenizer": TOKENIZER_FACTOR * sizes.tokenizer,
        "freed blocks": min(HEAP_BYTES, sweep.activation_bytes(sizes, holding.segment)),
    }
    after = resident | {"weights": 0} if sizes.streams else resident
    # One layer at a time, in the order of the layers.
    slots = min(2, holding.num_slots * holding.segment)
    again = after | {"weights": slots * sizes.layer * stored + converted} if sizes.streams else after
    beside = {Phase.SWEEP: resident, Phase.HEAD: resident, Phase.REFIT: after, Phase.UPDATE: after}
    beside[Phase.DECISION] = after
    peaks: Peaks = {}
    for demand in demands(sizes, holding).values():
        peaks |= {phase: beside.get(phase, again) | dict(taken) for phase, taken in demand.memory.items()}
    if sizes.writes:
        copied = {"a layer": 2 * sizes.layer * sizes.stored_item, "pieces": _pieces(sizes)}
        peaks[Phase.WRITING] = after | copied
    return peaks


def _pieces(sizes: Sizes) -> int:
    """Tensors on their way to the output, larger ones in pieces: made, waiting twice, written, hashed."""
    return 5 * min(PIECE_BYTES, max(sizes.layer, sizes.vocabulary_weights) * sizes.stored_item)
