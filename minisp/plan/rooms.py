"""Hidden states wait between the layers of a sweep: how many bytes, and how many of them stay in memory.

On a CPU without a stated limit, states stay in memory only as far as the largest phase's peak does not grow. With a
stated limit, or on a GPU, they fill what the limit leaves. States that a GPU has no room for go to pinned main memory.
"""

from collections.abc import Mapping
from dataclasses import replace

from minisp.methods.statistics import PANEL_ROWS
from minisp.phases.boundaries import head_tokens
from minisp.phases.passage import passage_bytes
from minisp.phases.refit import dense_bytes, refit_tokens
from minisp.phases.run import Phase
from minisp.phases.sizes import HELD, Sizes
from minisp.plan.layout import Layout, demands
from minisp.store.tiers import Room

# A phase whose states wait → the phases, or parts of one, during which they wait.
DURING = {
    Phase.SWEEP: (Phase.SWEEP, Phase.HEAD),
    Phase.TRIALS: (Phase.TRIALS, Phase.TRIAL_OUTPUTS),
    Phase.REFIT_SWEEP: (Phase.REFIT_SWEEP,),
}
Rooms = Mapping[Phase, Room]
"""Phase → room in memory for what waits."""


def make_rooms(
    sizes: Sizes, layout: Layout, limit: int, host: int, *, on_disk: bool
) -> tuple[Layout, dict[Phase, Room]]:
    """The layout with what waits in memory counted, and the room of each phase.

    A CPU reads states back from disk in less time than it computes them, a GPU does not.

    Args:
        limit: bytes that a phase may take where it computes.
        host: bytes of main memory beside a GPU that may be pinned.
        on_disk: whether the dense states may wait on disk.
    """
    waits = {phase: demand.waiting for phase, demand in demands(sizes, layout).items()}
    if layout.dense is None and sizes.writes and sizes.config.corrects:
        found = make_rooms(sizes, replace(layout, dense="memory"), limit, host, on_disk=False)
        if _lasts(found[1], waits[Phase.SWEEP], dense_bytes(sizes)):
            return found
        layout = replace(layout, dense="disk" if on_disk else None)
    rooms, peaks = {}, dict(layout.peaks)
    dense = dense_bytes(sizes) if layout.dense == "memory" else 0
    for phase, during in DURING.items():
        waiting = waits.get(phase, 0)
        if phase not in peaks or waiting + dense == 0:
            continue
        counted = [name for name in during if name in peaks]
        # Without a folder it waits in memory whatever happens, and is counted there already.
        planned = 0 if sizes.writes else waiting
        passage = passage_bytes(sizes, refit_tokens(sizes)) if phase == Phase.REFIT_SWEEP else 0
        wanted = waiting - planned + dense + passage
        device = min(max(0, limit - max(sum(peaks[name].values()) for name in counted)), wanted)
        # A pinned block is up to twice as large as what is in it.
        rooms[phase] = Room(device + planned, min(max(0, host), 2 * (waiting + dense)) if device < wanted else 0)
        peaks |= {name: peaks[name] | {HELD: peaks[name].get(HELD, 0) + device} for name in counted}
    return replace(layout, peaks=peaks), rooms


def _lasts(rooms: Rooms, waiting: int, dense: int) -> bool:
    """Whether the dense states fit in memory beside the sweep's own states, and fit in every later phase too."""
    room = rooms[Phase.SWEEP]
    stays = min(room.device, dense)
    return room.device + room.host // 2 >= waiting + dense and all(other.device >= stays for other in rooms.values())


def passes_again(sizes: Sizes, layout: Layout, rooms: Rooms) -> float:
    """The share of the refit sweep's windows that pass a cut layer twice, for want of room."""
    passage = passage_bytes(sizes, refit_tokens(sizes))
    if not passage:
        return 0.0
    waits = demands(sizes, layout)[Phase.REFIT_SWEEP].waiting
    waits += dense_bytes(sizes) if layout.dense == "memory" else 0
    return 1 - max(0, min(passage, rooms.get(Phase.REFIT_SWEEP, Room()).device - waits)) / passage


def writes_behind(sizes: Sizes, layout: Layout, rooms: Rooms, host: int) -> int:
    """Bytes that may wait for the disk in pinned main memory: the Gram matrices of a segment, where there is room.

    Args:
        host: as for `make_rooms`; what waits there in a phase has it first.
    """
    left = host - max((room.host for room in rooms.values()), default=0)
    # A pinned block is up to twice as large as what is in it.
    return max(0, min(layout.segment * 4 * sizes.layer_sums, left // 2))


def spilled(waiting: int, room: Room) -> float:
    """The share of what waits in a phase that goes to the scratch folder."""
    return max(0, waiting - room.device - room.host) / waiting if waiting else 0.0


def disk_traffic(sizes: Sizes, layout: Layout, rooms: Rooms, bytes_after: int) -> dict[str, int]:
    """Bytes to and from disk, by purpose; the system keeps in memory what it can of them.

    States that have room in memory are none of them; what is saved of them every few minutes is not counted.
    """
    if not sizes.writes:
        return {}
    needed = demands(sizes, layout)
    passed = {
        phase: int(spilled(demand.waiting, rooms.get(phase, Room())) * demand.passed)
        for phase, demand in needed.items()
    }
    segments, forward = layout.passes(sizes.num_layers)
    layers = sizes.num_layers * sizes.layer * sizes.stored_item
    vocabulary = sizes.vocabulary_weights * sizes.stored_item
    heads = -(-sizes.tokens // max(head_tokens(sizes.hidden), sizes.batch_tokens))
    later = sum(needed[phase].waiting > 0 for phase in (Phase.TRIALS, Phase.REFIT_SWEEP) if phase in needed)
    visits = sizes.config.shots * (1 + forward / segments) + later
    read = int(layers * (visits + 1)) + vocabulary * (1 + (2 * heads if layout.stream_vocabulary else 1))
    return {
        # The sweeps, and what is copied to the result.
        "weights read": read if sizes.streams else 0,
        "states": passed[Phase.SWEEP],
        "trials": passed.get(Phase.TRIALS, 0),
        "dense states": 2 * dense_bytes(sizes) if layout.dense == "disk" else 0,
        "refit states": passed.get(Phase.REFIT_SWEEP, 0),
        "statistics": 2 * sizes.config.shots * _panels(sizes),
        "refitted": 2 * sizes.config.shots * sizes.changed * sizes.stored_item,
        "result": bytes_after,
    }


def scratch_room(sizes: Sizes, layout: Layout, rooms: Rooms) -> int:
    """Bytes that what waits in the scratch folder takes at most at once."""
    if not sizes.writes:
        return 0
    needed = {phase: demand.waiting for phase, demand in demands(sizes, layout).items() if demand.waiting}
    # The boundary that is saved and the one that replaces it. Where states have no room in memory, the one that was
    # saved last stays beside them.
    saved = needed | {Phase.SWEEP: 2 * sizes.states(sizes.tokens)}
    passing = [
        saved[phase] if spilled(waiting, rooms.get(phase, Room())) == 0 else waiting + saved[phase] // 2
        for phase, waiting in needed.items()
    ]
    dense = dense_bytes(sizes) if layout.dense == "disk" else 0
    # The weights of one shot stay until all of the next one are there.
    weights = min(2, sizes.config.shots) * sizes.changed * sizes.stored_item
    return max(passing, default=0) + dense + _panels(sizes) + weights


def _panels(sizes: Sizes) -> int:
    """The sweep's sums in float32, a panel of rows at a time as far as the diagonal."""
    panels = [(start, min(start + PANEL_ROWS, n)) for _, n in sizes.sums for start in range(0, n, PANEL_ROWS)]
    return sum(4 * (stop - start) * stop for start, stop in panels)
