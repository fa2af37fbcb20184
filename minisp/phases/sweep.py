"""A calibration sweep over a streamed model: forward once, then in reverse; sums are collected on the way.

Layers are held a segment at a time. A forward pass keeps the hidden states at segment boundaries only;
then segments go in reverse: recompute, backward without weight gradients, sums on the way. One segment for the
whole model needs no forward pass of its own; one layer per segment needs the least memory. Work per token and layer of
P parameters: forward 2P and backward 2P FLOPs, plus 2P·(1 − 1/segments) of recomputing, plus n² for a sum (n, n).
Windows that are not scored have neither the backward pass nor a loss.

What is finished is a record, see `minisp.store.names`: a sweep that finds records goes on from them, to the same bits
(on a GPU as far as the backward of its attention adds up in a fixed order, which torch does not promise).
The first segment, which is the only one where the model fits in memory whole, leaves no gradient, so that its sums can
be kept every few minutes before it is finished.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.phases import partial
from minisp.phases.boundaries import Sweep, enter, head_gradient, run_forward
from minisp.phases.collection import Collection, K, S
from minisp.phases.run import Run
from minisp.store import tiers
from minisp.store.names import Record

Told: TypeAlias = Callable[[int, Tensor], None]
"""Told a layer and the states that leave it."""


def sweep_layers(sweep: Sweep, segments: Sequence[range], collection: Collection[K, S]) -> None:
    """Leave a record of sums for every key of the collection.

    Args:
        segments: consecutive layers held together, in forward order; they cover all layers.

    Raises:
        NumericalError: sums that are not finite.
    """
    stream, run = sweep.stream, sweep.run
    segments = _unfinished(segments, collection, run)
    if not segments:
        return
    head_first, forward = _forward_passes(stream, segments, run)
    done = 0

    def advance(phase: str, segment: range) -> None:
        nonlocal done
        done += len(segment)
        run.progress(f"{phase}, layers {segment.start}-{segment.stop - 1}", done, steps)

    sweep = replace(sweep, advance=advance)
    steps = sum(len(segment) * len(sweep.through(segment)) for segment in forward)
    steps += len(sweep.batches.ids) * sum(map(len, segments))
    visits = stream.visit([*forward, *reversed(segments)])
    for segment in islice(visits, len(forward)):
        run_forward(sweep, segment)
        run.save_if_due(Record.STATES.of(segment.stop))
    if head_first:
        head_gradient(sweep)
    behind: range | None = None
    for segment in visits:
        records = _run_backward(sweep, segment, collection)
        # What the segment before has left is written by now: nobody waits for the disk.
        if behind is not None:
            _finish(behind, run)
        for key in reversed(list(records)):
            sums = records.pop(key)
            sums.sum_over_(run.ranks)
            sums.finalize_(key)
            if run.ranks.first:
                run.keep(collection.name(key), sums.tensors())
            del sums
        behind = segment
    _finish(segment, run)
    run.own.forget()


def _finish(segment: range, run: Run) -> None:
    """Wait until the sums of a segment's layers are written; drop what they were made from."""
    run.shared.settle()
    run.own.settle()
    run.ranks.wait()
    run.own.drop(Record.STATES.of(segment.start))
    run.own.drop(Record.GRADIENT.of(segment.stop))
    if segment.start:
        run.save_if_due(Record.GRADIENT.of(segment.start))
        return
    partial.drop(run.own)


def _unfinished(segments: Sequence[range], collection: Collection[K, S], run: Run) -> list[range]:
    """The segments, or parts of them, whose sums no earlier run has left, together with the gradient to go on."""
    count = segments[-1].stop
    missing = {key.layer for key in collection.keys if not run.shared.has(collection.name(key))}
    there = [layer not in missing for layer in range(count)]
    known = [all(there[i:]) and (i == 0 or run.own.has(Record.GRADIENT.of(i))) for i in range(count)]
    lowest = run.ranks.everywhere([*known, True]).index(True)
    return [range(s.start, min(s.stop, lowest)) for s in segments if s.start < lowest]


def _forward_passes(stream: Stream, segments: Sequence[range], run: Run) -> tuple[bool, list[range]]:
    """Whether the head stands between the passes, and the segments that run forward first.

    What one process lacks, all compute again: a boundary is saved by all together, so they have to meet at each.
    """
    own, last = run.own, len(stream.layers)
    # A streamed head is read for many windows at once.
    known, *there = run.ranks.everywhere(
        [own.has(Record.GRADIENT.of(last)), *(own.has(Record.STATES.of(segment.stop)) for segment in segments)]
    )
    head_first = stream.vocabulary is not None and segments[-1].stop == last and not known
    through = segments if head_first else segments[:-1]
    return head_first, [segment for segment, has in zip(through, there, strict=False) if not has]


def _run_backward(sweep: Sweep, segment: range, collection: Collection[K, S]) -> dict[K, S]:
    """The sums of a segment's keys; keeps the gradient at its input."""
    stream, own, scored = sweep.stream, sweep.run.own, sweep.batches.scored
    records, first = partial.begin(own, collection, segment)
    saved = time.monotonic()
    source = Record.GRADIENT.of(segment.stop)
    known = own.has(source)
    assert known or segment.stop == len(stream.layers), f"no gradient behind layer {segment.stop - 1}"
    sizes = sweep.sizes([number for number, flag in enumerate(scored) if flag])
    keeping = (
        own.writing(Record.GRADIENT.of(segment.start), sizes=sizes)
        if segment.start
        else nullcontext(lambda key, tensor: None)
    )
    with keeping as append, collection.watch(records), _passing(sweep, segment, first) as told:
        for number, ids in enumerate(sweep.batches.ids):
            if number >= first and (scored[number] or sweep.unscored):
                hidden = enter(stream, own, segment, number, ids)
                if scored[number]:
                    above = own.read(source, str(number), ahead=True) if known else None
                    append(str(number), _forward_backward(sweep, segment, hidden, ids, above, told(number)))
                else:
                    _forward(stream, segment, hidden, ids, told(number))
            sweep.advance("saliency", segment)
            if segment.start == 0 and number >= first and time.monotonic() - saved >= tiers.SAVE_SECONDS:
                own.save(source)
                partial.save(own, records, number + 1)
                saved = time.monotonic()
    return records


@contextmanager
def _passing(sweep: Sweep, segment: range, first: int) -> Iterator[Callable[[int], Told]]:
    """Within the block, layers compute as they do in every sweep; gives who is told what a micro-batch leaves."""
    num_refit, own = sweep.batches.num_refit, sweep.run.own
    with ExitStack() as stack:
        stack.enter_context(fast_layers(sweep.stream.model))
        # A sweep that goes on in the middle of a segment has passed some windows before: their states are gone.
        appends = {
            index: stack.enter_context(own.writing(Record.DENSE.of(index + 1), sizes=sweep.sizes(range(num_refit))))
            for index in (segment if sweep.dense and num_refit and first == 0 else ())
        }

        def told(number: int) -> Told:
            wanted = appends and number < num_refit
            return lambda index, leaving: appends[index](str(number), leaving.detach()) if wanted else None

        yield told


@torch.no_grad()
def _forward(stream: Stream, segment: range, hidden: Tensor, ids: Tensor, told: Told) -> None:
    """Pass a segment whose layers are watched."""
    for index in segment:
        hidden = stream.run_layer(index, hidden, stream.calls(ids))
        told(index, hidden)


def _forward_backward(
    sweep: Sweep, segment: range, hidden: Tensor, ids: Tensor, gradient: Tensor | None, told: Told
) -> Tensor:
    """Gradient at the segment's input, given the one at its output (or, for the last segment, the loss)."""
    stream = sweep.stream
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        leaving = hidden
        for index in segment:
            leaving = stream.run_layer(index, leaving, stream.calls(ids))
            told(index, leaving)
    if gradient is None:
        _, gradient = stream.loss_gradient(leaving.detach(), ids, sweep.objective)
    return torch.autograd.grad(leaving, hidden, gradient)[0]
