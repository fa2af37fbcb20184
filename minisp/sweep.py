"""The saliency sweep over a streamed model: forward once, then in reverse.

Layers are held a segment at a time. A forward pass keeps the hidden states at segment boundaries only;
then segments go in reverse: recompute, backward without weight gradients, statistics on the way. One segment for the
whole model needs no forward pass of its own; one layer per segment needs the least memory. Work per token and layer of
P parameters: forward 2P and backward 2P FLOPs, plus 2P·(1 − 1/segments) of recomputing, plus m² for the Gram matrix.

What is finished is a record, see `minisp.workplace`: a sweep that finds records goes on from them, to the same bits
(on a GPU as far as the backward of its attention adds up in a fixed order, which torch does not promise).
The first segment, which is the only one where the model fits in memory whole, leaves no gradient, so that its sums can
be kept every few minutes before it is finished.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from itertools import islice

import torch
from torch import Tensor

from minisp.architecture import activation_kind, mlp_weights
from minisp.layers import fast_layers
from minisp.mlp import watch
from minisp.scratch import Scratch
from minisp.statistics import LayerStatistics
from minisp.stream import Stream
from minisp.workplace import Workplace, record

# Tokens that a streamed head takes at least at once: each time, its weights are read twice.
HEAD_TOKENS = 2048
# What a run that is killed loses at most of the first segment's sweep.
SAVE_SECONDS = 180.0
# Written in turn, so that one of them is always whole.
PARTIAL = (record("partial", 0), record("partial", 1))


def saliency_sweep(
    stream: Stream, batches: Sequence[Tensor], segments: Sequence[range], work: Workplace, *, gram: bool
) -> None:
    """Leave a record of statistics for every layer.

    Args:
        batches: this process's calibration windows (B, L) int64, one micro-batch each.
        segments: consecutive layers held together, in forward order; they cover all layers.
        gram: collect Gram matrices too.

    Raises:
        NumericalError: statistics that are not finite.
    """
    segments = _unfinished(segments, work)
    if not segments:
        return
    # A streamed head is read for many windows at once, so that it stands between the passes.
    head_first = (
        stream.vocabulary is not None
        and segments[-1].stop == len(stream.layers)
        and not work.own.has(record("gradient", len(stream.layers)))
    )
    through = segments if head_first else segments[:-1]
    forward = [segment for segment in through if not work.own.has(record("states", segment.stop))]
    steps = len(batches) * sum(len(segment) for segment in [*forward, *segments])
    done = 0

    def advance(phase: str, segment: range) -> None:
        nonlocal done
        done += len(segment)
        work.progress(f"{phase}, layers {segment.start}-{segment.stop - 1}", done, steps)

    visits = stream.visit([*forward, *reversed(segments)])
    for segment in islice(visits, len(forward)):
        _run_forward(stream, batches, segment, work.own, advance)
    if head_first:
        _head_gradient(stream, batches, work)
    for segment in visits:
        records = _run_backward(stream, batches, segment, work.own, gram, advance)
        for index in reversed(segment):
            statistics = records.pop(index)
            statistics.sum_over_(work.ranks)
            statistics.finalize_(index)
            if work.ranks.first:
                work.keep_statistics(index, statistics)
            del statistics
        work.shared.settle()
        work.own.settle()
        work.ranks.wait()
        work.own.drop(record("states", segment.start))
        work.own.drop(record("gradient", segment.stop))
        for name in PARTIAL:
            work.own.drop(name)


def _unfinished(segments: Sequence[range], work: Workplace) -> list[range]:
    """The segments, or parts of them, whose statistics no earlier run has left, together with the gradient to go on."""
    lowest = segments[-1].stop
    for layer in reversed(range(lowest)):
        if not work.shared.has(record("statistics", layer)):
            break
        if layer == 0 or work.own.has(record("gradient", layer)):
            lowest = layer
    lowest = work.ranks.most(lowest)
    return [range(s.start, min(s.stop, lowest)) for s in segments if s.start < lowest]


def _run_forward(
    stream: Stream, batches: Sequence[Tensor], segment: range, own: Scratch, advance: Callable[[str, range], None]
) -> None:
    """Keep the states that leave a segment."""
    keeping = own.writing(record("states", segment.stop))
    with keeping as append, torch.no_grad(), fast_layers(stream.model):
        for number, ids in enumerate(batches):
            hidden = enter(stream, own, segment, number, ids)
            for index in segment:
                hidden = stream.run_layer(index, hidden, stream.calls(ids))
            append(str(number), hidden)
            advance("forward", segment)


def head_tokens(hidden: int) -> int:
    """Tokens that a streamed head takes at once: d of them need 44·d² bytes, less than the Gram matrix of 3.4·d units.

    Args:
        hidden: d, the hidden size.
    """
    return max(HEAD_TOKENS, hidden)


def _head_gradient(stream: Stream, batches: Sequence[Tensor], work: Workplace) -> None:
    """Keep the gradient at the last layer's output, many windows at a time."""
    last = len(stream.layers)
    per_group = max(1, head_tokens(stream.model.config.hidden_size) // max(ids.numel() for ids in batches))
    with work.own.writing(record("gradient", last)) as append:
        for start in range(0, len(batches), per_group):
            group = list(batches[start : start + per_group])
            hidden = [work.own.read(record("states", last), str(start + i)) for i in range(len(group))]
            _, gradient = stream.loss_gradient(torch.cat(hidden).to(stream.device), torch.cat(group))
            for i, part in enumerate(gradient.split([len(ids) for ids in group])):
                append(str(start + i), part)
            work.progress("head", min(start + per_group, len(batches)), len(batches))
    work.own.drop(record("states", last))


def _run_backward(
    stream: Stream,
    batches: Sequence[Tensor],
    segment: range,
    own: Scratch,
    gram: bool,
    advance: Callable[[str, range], None],
) -> dict[int, LayerStatistics]:
    """The statistics of a segment's layers; keeps the gradient at its input."""
    records, first = _begin(stream, segment, own, gram)
    saved = time.monotonic()
    source = record("gradient", segment.stop)
    known = own.has(source)
    assert known or segment.stop == len(stream.layers), f"no gradient behind layer {segment.stop - 1}"
    keeping = own.writing(record("gradient", segment.start)) if segment.start else nullcontext(_nowhere)
    with keeping as append, _watch_all(stream, records), fast_layers(stream.model):
        for number, ids in enumerate(batches):
            if number < first:
                advance("saliency", segment)
                continue
            hidden = enter(stream, own, segment, number, ids)
            above = own.read(source, str(number), ahead=True).to(stream.device, non_blocking=True) if known else None
            append(str(number), _forward_backward(stream, segment, hidden, ids, above))
            advance("saliency", segment)
            if segment.start == 0 and time.monotonic() - saved >= SAVE_SECONDS:
                _save(records, own, number + 1)
                saved = time.monotonic()
    return records


def _begin(stream: Stream, segment: range, own: Scratch, gram: bool) -> tuple[dict[int, LayerStatistics], int]:
    """The sums of a segment's layers to go on with, and the micro-batches that are in them already."""
    widths = {i: mlp_weights(stream.layers[i], stream.row).up.shape[0] for i in segment}
    facts = {name: own.facts(name) for name in PARTIAL if segment.start == 0 and own.has(name)}
    usable = {name: found["batches"] for name, found in facts.items() if found["layers"] == len(segment)}
    if not usable:
        return {i: LayerStatistics.empty(w, gram=gram, device=stream.device) for i, w in widths.items()}, 0
    newest = max(usable, key=lambda name: usable[name])

    def kept(index: int) -> LayerStatistics:
        def read(key: str) -> Tensor:
            return own.read(newest, f"{index} {key}")

        return LayerStatistics.from_tensors(read, gram=gram, device=stream.device)

    return {i: kept(i) for i in segment}, usable[newest]


def _save(records: dict[int, LayerStatistics], own: Scratch, batches: int) -> None:
    """Keep the sums of so many micro-batches, in place of the older ones of two, where the disk has ample room."""
    size = sum(tensor.nbytes for statistics in records.values() for _, tensor in statistics.tensors())
    if own.free_bytes() < 4 * size:
        return
    there = {name: own.facts(name)["batches"] if own.has(name) else 0 for name in PARTIAL}
    with own.writing(min(there, key=lambda name: there[name]), batches=batches, layers=len(records)) as append:
        for index, statistics in records.items():
            for key, tensor in statistics.tensors():
                append(f"{index} {key}", tensor)


def enter(stream: Stream, own: Scratch, segment: range, number: int, ids: Tensor, *, kind: str = "states") -> Tensor:
    """The hidden state that enters a segment: embedded anew for the first one, kept for the others."""
    if segment.start == 0:
        return stream.embed(ids)
    return own.read(record(kind, segment.start), str(number), ahead=True).to(stream.device, non_blocking=True)


def _forward_backward(stream: Stream, segment: range, hidden: Tensor, ids: Tensor, gradient: Tensor | None) -> Tensor:
    """Gradient at the segment's input, given the one at its output (or, for the last segment, the loss)."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        leaving = hidden
        for index in segment:
            leaving = stream.run_layer(index, leaving, stream.calls(ids))
    if gradient is None:
        _, gradient = stream.loss_gradient(leaving.detach(), ids)
    return torch.autograd.grad(leaving, hidden, gradient)[0]


def _nowhere(key: str, tensor: Tensor) -> None:
    """Nobody asks for the gradient below the first layer."""


def _watch_all(stream: Stream, records: dict[int, LayerStatistics]) -> ExitStack:
    kind = activation_kind(stream.model.config, stream.row)
    stack = ExitStack()
    for index, statistics in records.items():
        stack.enter_context(watch(stream.layers[index], stream.row, kind, statistics))
    return stack
