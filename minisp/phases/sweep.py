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

from minisp.methods.statistics import PANEL_ROWS
from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.models.vocabulary import BLOCK_BYTES
from minisp.phases import partial
from minisp.phases.boundaries import Sweep, enter, head_gradient, head_tokens, run_forward
from minisp.phases.collection import Collection, K, S
from minisp.phases.run import Phase, Run
from minisp.phases.sizes import Demand, Holding, Sizes
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
    count = segments[-1].stop
    segments = _unfinished(segments, collection, run)
    if not segments:
        _drop_passing(run, count)
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
    _drop_passing(run, count)
    run.own.forget()


def _drop_passing(run: Run, count: int) -> None:
    """Drop what a run that was killed has left of states and gradients: the next sweep must not take it for its own."""
    for index in range(count + 1):
        run.own.drop(Record.STATES.of(index))
        run.own.drop(Record.GRADIENT.of(index))
    partial.drop(run.own)


def _finish(segment: range, run: Run) -> None:
    """Wait until the sums of a segment's layers are written; drop what they were made from."""
    run.shared.settle()
    run.own.settle()
    run.ranks.wait()
    run.own.drop(Record.STATES.of(segment.start))
    run.own.drop(Record.GRADIENT.of(segment.stop))
    if segment.start:
        run.save_if_due(Record.GRADIENT.of(segment.start))


def _unfinished(segments: Sequence[range], collection: Collection[K, S], run: Run) -> list[range]:
    """The segments, the last one perhaps shortened, that this run has to sweep.

    A layer is done if all records of its sums are there. The sweep goes in reverse, so it starts below the lowest done
    layer whose input gradient is there too.
    """
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
            sweep.advance(collection.what, segment)
            if segment.start == 0 and number >= first and time.monotonic() - saved >= tiers.SAVE_SECONDS:
                own.save(source)
                partial.save(own, records, number + 1)
                saved = time.monotonic()
    return records


@contextmanager
def _passing(sweep: Sweep, segment: range, first: int) -> Iterator[Callable[[int], Told]]:
    """Within the block, layers compute by the engine's operations. Yields, per micro-batch, who is told its states."""
    num_refit, own = sweep.batches.num_refit, sweep.run.own
    with ExitStack() as stack:
        stack.enter_context(fast_layers(sweep.stream.model))
        # A sweep that resumes in the middle of a segment does not run its first windows again: their states are lost.
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


def demand(sizes: Sizes, holding: Holding) -> Demand:
    """What a sweep takes.

    Memory: sums and activations of a segment, and what waits in memory where there is no folder. Work for a token and P
    parameters: forward 2P and backward 2P, 2P·(1 − 1/segments) of recomputing, and n² for each sum (n, n).
    """
    config, count, item = sizes.config, sizes.num_layers, sizes.item
    segments, forward = holding.passes(count)
    states, batch = sizes.states(sizes.tokens), sizes.states(sizes.batch_tokens)
    grams = holding.segment if sizes.writes else count
    memory = {
        Phase.SWEEP: {
            "Gram matrices": grams * 4 * sizes.layer_sums,
            "activations": activation_bytes(sizes, holding.segment),
            "boundary states": (0 if sizes.writes else (segments + 1) * states) + 6 * batch,
            "logits": 0 if holding.stream_vocabulary else 2 * min(sizes.logits, 2 * sizes.tokens * sizes.vocabulary),
            # Row panels on their way to the disk.
            "writing": 3 * PANEL_ROWS * 4 * sizes.width if sizes.writes and sizes.sums else 0,
        }
    }
    if holding.stream_vocabulary:
        tokens = min(max(head_tokens(sizes.hidden), sizes.batch_tokens), sizes.tokens)
        # Hidden states and gradients as read, joined and parted; the final norm's float32 copies, forward and backward;
        # the float32 gradient and what is added to it. Logits in float32 four times, and two blocks of the head's rows.
        held = tokens * sizes.hidden * (4 * item + 9 * 4)
        memory[Phase.HEAD] = {"states and gradients": held, "logits": (4 + 2) * BLOCK_BYTES}
    tokens, inside, head = sizes.all_tokens, sizes.inside, sizes.vocabulary * sizes.hidden
    scored = (config.saliency_windows or config.num_windows) * config.window if config.sees_gradients else 0
    recompute = 1 if holding.stream_vocabulary else 1 - 1 / segments
    flops = scored * (2 * inside * (2 + recompute) + (6 if holding.stream_vocabulary else 4) * head)
    if sizes.sums:
        # The others run forward only: to the boundaries, and again where the layers are watched.
        flops += tokens * sum(size**2 for _, size in sizes.sums) + (tokens - scored) * 2 * inside * (1 + recompute)
    return Demand(
        memory=memory,
        # All boundaries; of gradients, those behind a segment, before it, and of the one whose statistics are written.
        waiting=states * (forward + 3) if segments > 1 or forward else 0,
        # States are written once and read on both ways, gradients written and read.
        passed=states * (2 * forward + 3 * (segments - 1)) * config.shots,
        flops=float(flops * config.shots),
    )


def activation_bytes(sizes: Sizes, segment: int) -> int:
    """What autograd keeps for a micro-batch, and what one layer's backward adds for a moment."""
    # x and ∂L/∂x of the MLP, and of the hidden size what enters and leaves norms, attention and the layer. When
    # attention has its turn, the MLP's 2m are free again.
    passing = sizes.item * (2 * sizes.width + 8 * sizes.hidden)
    return sizes.batch_tokens * (segment * sizes.autograd + passing)
