"""The saliency sweep: saliency sums and Gram matrices of every structure."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from minisp.methods.statistics import Statistics
from minisp.models.objective import Objective
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.models.watch import watch
from minisp.phases.batches import Batches
from minisp.phases.boundaries import Sweep
from minisp.phases.collection import Collection
from minisp.phases.run import Run
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
    gradients: bool = False,
    dense: bool = False,
) -> None:
    """Leave a record of statistics for every structure.

    Args:
        batches: this process's calibration windows.
        segments: consecutive layers held together, in forward order; they cover all layers.
        objective: what is differentiated.
        gram: collect Gram matrices too.
        gradients: collect sums of output gradients too.
        dense: keep the states that leave each layer, of the windows of the refit sweep, as `Record.DENSE`.

    Raises:
        NumericalError: statistics that are not finite.
    """
    device, outputs = stream.device, stream.model.config.hidden_size if gradients else 0

    def watching(records: Mapping[Structure, Statistics]) -> ExitStack:
        stack = ExitStack()
        for structure, statistics in records.items():
            stack.enter_context(watch(stream.layers[structure.layer], structure, stream.model.config, statistics))
        return stack

    collection = Collection(
        what="saliency",
        keys=stream.structures,
        name=lambda x: Record.STATISTICS.of(x.layer, x.name),
        empty=lambda x: Statistics.empty(x.num_units, x.columns, gram=gram, outputs=outputs, device=device),
        restored=lambda x, read: Statistics.from_tensors(read, x.columns, gram=gram, outputs=outputs, device=device),
        watch=watching,
    )
    sweep_layers(Sweep(stream, batches, run, objective, unscored=gram, dense=dense), segments, collection)
