"""The saliency sweep: saliency sums and Gram matrices of every structure."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from minisp.methods.statistics import PANEL_ROWS, Statistics
from minisp.models.objective import Objective
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.models.vocabulary import BLOCK_BYTES
from minisp.models.watch import watch
from minisp.phases.batches import Batches
from minisp.phases.boundaries import Sweep, head_tokens
from minisp.phases.collection import Collection
from minisp.phases.run import Phase, Run
from minisp.phases.sizes import Demand, Holding, Sizes
from minisp.phases.sweep import sweep_layers
from minisp.store.names import Record

NEXT_TOKEN = Objective()


def saliency_sweep(
    stream: Stream,
    batches: Batches,
    segments: Sequence[range],
    run: Run,
    *,
    objective: Objective = NEXT_TOKEN,
    gram: bool,
    dense: bool = False,
) -> None:
    """Leave a record of statistics for every structure.

    Args:
        batches: this process's calibration windows.
        segments: consecutive layers held together, in forward order; they cover all layers.
        objective: what is differentiated.
        gram: collect Gram matrices too.
        dense: keep the states that leave each layer, of the windows of the refit sweep, as `Record.DENSE`.

    Raises:
        NumericalError: statistics that are not finite.
    """
    device = stream.device

    def watching(records: Mapping[Structure, Statistics]) -> ExitStack:
        stack = ExitStack()
        for structure, statistics in records.items():
            stack.enter_context(watch(stream.layers[structure.layer], structure, stream.model.config, statistics))
        return stack

    collection = Collection(
        keys=stream.structures,
        name=lambda x: Record.STATISTICS.of(x.layer, x.name),
        empty=lambda x: Statistics.empty(x.num_units, x.columns, gram=gram, device=device),
        restored=lambda x, read: Statistics.from_tensors(read, x.columns, gram=gram, device=device),
        watch=watching,
    )
    sweep_layers(Sweep(stream, batches, run, objective, unscored=gram, dense=dense), segments, collection)


def demand(sizes: Sizes, holding: Holding) -> Demand:
    """What the sweep takes.

    Memory: statistics and activations of a segment, and what waits in memory where there is no folder. Work for a token
    and P parameters: forward 2P and backward 2P, 2P·(1 − 1/segments) of recomputing, and m² for each Gram matrix.
    """
    config, count, item = sizes.config, sizes.num_layers, sizes.item
    segments, forward = holding.passes(count)
    states, batch = sizes.states(sizes.tokens), sizes.states(sizes.batch_tokens)
    grams = holding.segment if sizes.writes else count
    memory = {
        Phase.SWEEP: {
            "Gram matrices": grams * 4 * sizes.layer_gram if config.collects_gram else 0,
            "activations": activation_bytes(sizes, holding.segment),
            "boundary states": (0 if sizes.writes else (segments + 1) * states) + 6 * batch,
            "logits": 0 if holding.stream_vocabulary else 2 * min(sizes.logits, 2 * sizes.tokens * sizes.vocabulary),
            # Row panels on their way to the disk.
            "writing": 3 * PANEL_ROWS * 4 * sizes.width if sizes.writes and config.collects_gram else 0,
        }
    }
    if holding.stream_vocabulary:
        tokens = min(max(head_tokens(sizes.hidden), sizes.batch_tokens), sizes.tokens)
        # Hidden states and gradients as read, joined and parted; the final norm's float32 copies, forward and backward;
        # the float32 gradient and what is added to it. Logits in float32 four times, and two blocks of the head's rows.
        held = tokens * sizes.hidden * (4 * item + 9 * 4)
        memory[Phase.HEAD] = {"states and gradients": held, "logits": (4 + 2) * BLOCK_BYTES}
    tokens, inside, head = sizes.all_tokens, sizes.inside, sizes.vocabulary * sizes.hidden
    scored = (config.saliency_windows or config.num_windows) * config.window
    recompute = 1 if holding.stream_vocabulary else 1 - 1 / segments
    flops = scored * (2 * inside * (2 + recompute) + (6 if holding.stream_vocabulary else 4) * head)
    if config.collects_gram:
        # The others run forward only: to the boundaries, and again where the layers are watched.
        flops += tokens * sizes.all_grams + (tokens - scored) * 2 * inside * (1 + recompute)
    return Demand(
        memory=memory,
        # All boundaries; of gradients, those behind a segment, before it, and of the one whose statistics are written.
        waiting=states * (forward + 3) if segments > 1 or forward else 0,
        # States are written once and read on both ways, gradients written and read.
        passed=states * (2 * forward + 3 * (segments - 1)),
        flops=float(flops),
    )


def activation_bytes(sizes: Sizes, segment: int) -> int:
    """What autograd keeps for a micro-batch, and what one layer's backward adds for a moment."""
    # x and ∂L/∂x of the MLP, and of the hidden size what enters and leaves norms, attention and the layer. When
    # attention has its turn, the MLP's 2m are free again.
    passing = sizes.item * (2 * sizes.width + 8 * sizes.hidden)
    return sizes.batch_tokens * (segment * sizes.autograd + passing)
