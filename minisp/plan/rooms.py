"""How many bytes wait between the layers of each phase, and how many of them have room in memory.

A CPU without a stated limit keeps the run's peak where the largest phase has it anyway. A stated limit, and the memory
of a GPU, are there to be used; what a GPU has no room for waits in pinned main memory.
"""

from collections.abc import Mapping
from dataclasses import replace

from minisp.phases.run import Phase
from minisp.plan.layout import HELD, Layout
from minisp.plan.shape import Shape
from minisp.store.tiers import Room

# What waits in one of these phases still waits in what the plan counts apart.
DURING = {
    Phase.SWEEP: (Phase.SWEEP, Phase.HEAD),
    Phase.TRIALS: (Phase.TRIALS, Phase.TRIAL_OUTPUTS),
    Phase.REFIT_SWEEP: (Phase.REFIT_SWEEP,),
}
Rooms = Mapping[Phase, Room]
"""Phase → room in memory for what waits."""


def waiting_bytes(shape: Shape, layout: Layout) -> dict[Phase, int]:
    """States that wait at most at once, by phase."""
    segments, forward = passes(shape, layout)
    found: dict[Phase, int] = {}
    if segments > 1 or forward:
        # All boundaries; of gradients, those behind a segment, before it, and of the one whose statistics are written.
        found[Phase.SWEEP] = states(shape) * (forward + 3)
    if shape.trials:
        found[Phase.TRIALS] = 2 * (shape.num_layers + 1) * trial_states(shape)
    if shape.refits:
        # Into and out of a layer, of the dense and of the pruned model.
        found[Phase.REFIT_SWEEP] = 4 * refit_states(shape)
    return found


def passage_bytes(shape: Shape) -> int:
    """What a passage keeps of a layer, so that its windows need not run again: x and r, see `minisp.phases.passage`."""
    return shape.refits * (shape.kept + shape.hidden) * shape.item


def dense_bytes(shape: Shape) -> int:
    """The dense model's states of the refit sweep's windows behind every layer."""
    return shape.num_layers * refit_states(shape)


def make_rooms(
    shape: Shape, layout: Layout, limit: int, host: int, *, on_disk: bool
) -> tuple[Layout, dict[Phase, Room]]:
    """The layout with what waits in memory counted, and the room of each phase.

    A CPU reads states back from disk in less time than it computes them, a GPU does not.

    Args:
        limit: bytes that a phase may take where it computes.
        host: bytes of main memory beside a GPU that may be pinned.
        on_disk: whether the dense states may wait on disk.
    """
    if layout.dense is None and shape.writes and shape.corrects:
        found = make_rooms(shape, replace(layout, dense="memory"), limit, host, on_disk=False)
        if _lasts(found[1], waiting_bytes(shape, layout).get(Phase.SWEEP, 0), dense_bytes(shape)):
            return found
        layout = replace(layout, dense="disk" if on_disk else None)
    rooms, peaks = {}, dict(layout.peaks)
    dense = dense_bytes(shape) if layout.dense == "memory" else 0
    waits = waiting_bytes(shape, layout)
    for phase, during in DURING.items():
        waiting = waits.get(phase, 0)
        if phase not in peaks or waiting + dense == 0:
            continue
        counted = [name for name in during if name in peaks]
        # Without a folder it waits in memory whatever happens, and is counted there already.
        planned = 0 if shape.writes else waiting
        wanted = waiting - planned + dense + (passage_bytes(shape) if phase == Phase.REFIT_SWEEP else 0)
        device = min(max(0, limit - max(sum(peaks[name].values()) for name in counted)), wanted)
        # A pinned block is up to twice as large as what is in it.
        rooms[phase] = Room(device + planned, min(max(0, host), 2 * (waiting + dense)) if device < wanted else 0)
        peaks |= {name: peaks[name] | {HELD: peaks[name].get(HELD, 0) + device} for name in counted}
    return replace(layout, peaks=peaks), rooms


def _lasts(rooms: Rooms, waiting: int, dense: int) -> bool:
    """Whether the dense states find room in memory beside what waits in the sweep, and may stay where they are."""
    room = rooms[Phase.SWEEP]
    stays = min(room.device, dense)
    return room.device + room.host // 2 >= waiting + dense and all(other.device >= stays for other in rooms.values())


def spilled(shape: Shape, layout: Layout, rooms: Rooms, phase: Phase) -> float:
    """The share of what waits in a phase that goes to the scratch folder."""
    waiting, room = waiting_bytes(shape, layout).get(phase, 0), rooms.get(phase, Room())
    return max(0, waiting - room.device - room.host) / waiting if waiting else 0.0


def writes_behind(shape: Shape, layout: Layout, rooms: Rooms, host: int) -> int:
    """Bytes that may wait for the disk in pinned main memory: the Gram matrices of a segment, where there is room.

    Args:
        host: as for `make_rooms`; what waits there in a phase has it first.
    """
    left = host - max((room.host for room in rooms.values()), default=0)
    # A pinned block is up to twice as large as what is in it.
    return max(0, min(layout.segment * 4 * shape.width**2, left // 2))


def passes(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Segments, and those that a forward pass of its own runs through."""
    segments = -(-shape.num_layers // layout.segment)
    return segments, segments if layout.stream_vocabulary else segments - 1


def states(shape: Shape) -> int:
    """Bytes of the hidden states of all windows at one boundary."""
    return shape.tokens * shape.hidden * shape.item


def refit_states(shape: Shape) -> int:
    """Of the windows of the refit sweep."""
    return shape.refits * shape.hidden * shape.item


def trial_states(shape: Shape) -> int:
    """Of one trial cut."""
    return shape.trials * shape.hidden * shape.item
