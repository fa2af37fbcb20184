"""The two passes over a streamed model: the saliency sweep (in reverse) and the heal sweep (forward).

Saliency sweep. Layers are held a segment at a time. A forward pass keeps the hidden states at segment boundaries only;
then segments go in reverse: recompute, backward without weight gradients, statistics on the way. One segment for the
whole model needs no forward pass of its own; one layer per segment needs the least memory. Work per token and layer of
P parameters: forward 2P and backward 2P FLOPs, plus 2P·(1 − 1/segments) of recomputing, plus m² for the Gram matrix.

Heal sweep. Forward, one layer at a time, on what the already pruned layers below produce: Gram, solve, cut, go on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from minisp.architecture import activation_kind, cut_, mlp_weights
from minisp.attention import fast_attention
from minisp.config import MinifyConfig
from minisp.mlp import watch
from minisp.reconstruction import Reconstruction, reconstruct
from minisp.statistics import LayerStatistics
from minisp.stream import Stream

Progress = Callable[[str, int, int], None]
"""Called with the phase, the steps done and the steps in all."""


def saliency_sweep(
    stream: Stream, batches: Sequence[Tensor], segments: Sequence[range], *, gram: bool, progress: Progress
) -> Iterator[tuple[int, LayerStatistics]]:
    """Yield (layer, statistics) for every layer, last layer first.

    Args:
        batches: calibration windows (B, L) int64, one micro-batch each.
        segments: consecutive layers held together, in forward order; they cover all layers.
        gram: collect Gram matrices too.

    Raises:
        NumericalError: statistics that are not finite.
    """
    num_layers = segments[-1].stop
    steps = len(batches) * (2 * num_layers - len(segments[-1]))
    done = 0

    def advance(phase: str, layers: int) -> None:
        nonlocal done
        done += layers
        progress(phase, done, steps)

    entering: list[list[Tensor]] = []
    for segment in segments[:-1]:
        with stream.hold(segment), torch.no_grad(), fast_attention(stream.model.config):
            entering.append([])
            for number, ids in enumerate(batches):
                hidden = _enter(stream, entering, len(entering) - 1, number, ids)
                for index in segment:
                    hidden = stream.run_layer(index, hidden, stream.calls(ids))
                entering[-1].append(hidden)
                advance(f"forward, layers {segment.start}-{segment.stop - 1}", len(segment))

    gradients: list[Tensor | None] = [None] * len(batches)
    for place in reversed(range(len(segments))):
        segment = segments[place]
        phase = f"saliency, layers {segment.start}-{segment.stop - 1}"
        records = {i: LayerStatistics.empty(w, gram=gram, device=stream.device) for i, w in _widths(stream, segment)}
        with stream.hold(segment), _watch_all(stream, records), fast_attention(stream.model.config):
            for number, ids in enumerate(batches):
                hidden = _enter(stream, entering, place, number, ids)
                if place:
                    entering[place - 1][number] = hidden.new_empty(0)
                gradients[number] = _forward_backward(stream, segment, hidden, ids, gradients[number])
                advance(phase, len(segment))
        for index in reversed(segment):
            yield index, records.pop(index).finalize_(index)


def heal_sweep(
    stream: Stream, batches: Sequence[Tensor], kept: Sequence[Tensor], config: MinifyConfig, progress: Progress
) -> Iterator[Reconstruction]:
    """Yield every layer's reconstruction, first layer first, each refitted on the pruned layers below it.

    The target is the full MLP on the same inputs, so the Gram matrix of those inputs is all that is needed.

    Args:
        batches: calibration windows (B, L) int64.
        kept: per layer (n,) int64 sorted.

    Raises:
        NumericalError: a ridge system cannot be solved.
    """
    kind = activation_kind(stream.model.config, stream.row)
    states = [stream.embed(ids) for ids in batches]
    for index, width in _widths(stream, range(len(stream.layers))):
        with stream.hold([index]) as (layer,), torch.no_grad(), fast_attention(stream.model.config):
            record = LayerStatistics.empty(width, gram=True, device=stream.device)
            result = Reconstruction(index, kept[index], None, 0.0, 0.0)
            if len(kept[index]) < width:
                with watch(layer, stream.row, kind, record):
                    for ids, hidden in zip(batches, states, strict=True):
                        stream.run_layer(index, hidden, stream.calls(ids))
                result = reconstruct(index, record.finalize_(index), kept[index], stream.down_weight(index), config)
                assert result.down is not None
                cut_(layer, stream.row, kept[index].to(stream.device), result.down)
            del record
            for number, ids in enumerate(batches):
                states[number] = stream.run_layer(index, states[number], stream.calls(ids))
                progress(f"heal, layer {index}", index * len(batches) + number + 1, len(stream.layers) * len(batches))
        yield result


def _enter(stream: Stream, entering: list[list[Tensor]], place: int, number: int, ids: Tensor) -> Tensor:
    """The hidden state that enters segment `place`: embedded anew for the first one, remembered for the others."""
    return stream.embed(ids) if place == 0 else entering[place - 1][number]


def _forward_backward(
    stream: Stream, segment: range, hidden: Tensor, ids: Tensor, gradient: Tensor | None
) -> Tensor | None:
    """Gradient at the segment's input, given the one at its output (or, for the last segment, the loss)."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        leaving = hidden
        for index in segment:
            leaving = stream.run_layer(index, leaving, stream.calls(ids))
    if gradient is None:
        _, gradient = stream.loss_gradient(leaving.detach(), ids)
    return torch.autograd.grad(leaving, hidden, gradient)[0]


def _widths(stream: Stream, segment: range) -> list[tuple[int, int]]:
    return [(i, mlp_weights(stream.layers[i], stream.row).up.shape[0]) for i in segment]


def _watch_all(stream: Stream, records: dict[int, LayerStatistics]) -> ExitStack:
    kind = activation_kind(stream.model.config, stream.row)
    stack = ExitStack()
    for index, record in records.items():
        stack.enter_context(watch(stream.layers[index], stream.row, kind, record))
    return stack
