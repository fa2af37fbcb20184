"""The heal sweep: forward, layer by layer, on what the already pruned layers below produce: Gram, solve, cut, go on."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minisp.architecture import activation_kind, cut_, mlp_weights
from minisp.attention import fast_attention
from minisp.config import MinifyConfig
from minisp.mlp import watch
from minisp.reconstruction import Reconstruction, reconstruct
from minisp.statistics import LayerStatistics
from minisp.stream import Stream
from minisp.sweep import enter
from minisp.workplace import Workplace, record


def heal_sweep(
    stream: Stream, batches: Sequence[Tensor], kept: Sequence[Tensor], config: MinifyConfig, work: Workplace
) -> None:
    """Leave a record of every layer's reconstruction, each refitted on the pruned layers below it.

    The target is the full MLP on the same inputs, so the Gram matrix of those inputs is all that is needed.

    Args:
        batches: this process's calibration windows (B, L) int64.
        kept: per layer (n,) int64 sorted.

    Raises:
        NumericalError: a ridge system cannot be solved.
    """
    first, count = _first_unhealed(len(kept), work), len(kept)
    for segment in stream.visit([range(index, index + 1) for index in range(first, count)]):
        index, layer = segment.start, stream.layers[segment.start]
        with torch.no_grad(), fast_attention(stream.model.config):
            if not work.shared.has(record("result", index)):
                result = _heal_layer(stream, batches, kept[index], config, work, index)
                if work.ranks.first:
                    work.keep_result(result)
                    work.shared.settle()
                work.ranks.wait()
            found = work.result(index)
            if found.down is not None:
                cut_(layer, stream.row, found.kept.to(stream.device), found.down.to(stream.device))
            if stream.checkpoint is None:
                # The model has the new weights now.
                work.keep_result(replace(found, down=None))
            if index + 1 < count:
                _propagate(stream, batches, work, segment)
        work.own.drop(record("healed", index))


def _propagate(stream: Stream, batches: Sequence[Tensor], work: Workplace, segment: range) -> None:
    """Keep the states that leave a layer which has been cut."""
    index, steps = segment.start, len(stream.layers) * len(batches)
    with work.own.writing(record("healed", segment.stop)) as append:
        for number, ids in enumerate(batches):
            hidden = enter(stream, work.own, segment, number, ids, kind="healed")
            append(str(number), stream.run_layer(index, hidden, stream.calls(ids)))
            work.progress(f"heal, layer {index}", index * len(batches) + number + 1, steps)


def _first_unhealed(count: int, work: Workplace) -> int:
    """The lowest layer that still has to be run: those below have results, and their output is known."""
    first = 0
    for layer in range(count):
        if not work.shared.has(record("result", layer)):
            break
        if work.own.has(record("healed", layer + 1)) or layer == count - 1:
            first = layer + 1
    return count - work.ranks.most(count - first)


def _heal_layer(
    stream: Stream, batches: Sequence[Tensor], kept: Tensor, config: MinifyConfig, work: Workplace, index: int
) -> Reconstruction:
    """Run the windows through a whole layer, and refit its kept units to what it computed."""
    width = mlp_weights(stream.layers[index], stream.row).up.shape[0]
    if len(kept) == width:
        return Reconstruction(index, kept, None, 0.0, 0.0)
    kind = activation_kind(stream.model.config, stream.row)
    statistics = LayerStatistics.empty(width, gram=True, device=stream.device)
    with watch(stream.layers[index], stream.row, kind, statistics):
        for number, ids in enumerate(batches):
            hidden = enter(stream, work.own, range(index, index + 1), number, ids, kind="healed")
            stream.run_layer(index, hidden, stream.calls(ids))
    statistics.sum_over_(work.ranks)
    return reconstruct(index, statistics.finalize_(index), kept, stream.down_weight(index), config)
