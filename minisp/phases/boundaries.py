"""The boundaries of a saliency sweep: hidden states between segments of layers, and the gradient behind the last one.

A forward pass keeps the states at segment boundaries. A streamed head is read from disk for many windows at once, so
its gradient is formed for all of them before the layers go in reverse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisp.models.layers import fast_layers
from minisp.models.objective import Objective
from minisp.models.stream import Stream
from minisp.phases.batches import Batches
from minisp.phases.run import Run
from minisp.store.names import Record
from minisp.store.tiers import Tiers

# Tokens that a streamed head takes at least at once: each time, its weights are read twice.
HEAD_TOKENS = 2048


@dataclass(frozen=True)
class Sweep:
    """What every pass of one sweep needs.

    Attributes:
        objective: what is differentiated.
        unscored: whether windows that are not scored pass too.
        dense: whether the states of the refit sweep's windows stay, of every layer.
        advance: told the phase and the segment after every micro-batch.
    """

    stream: Stream
    batches: Batches
    run: Run
    objective: Objective
    unscored: bool
    dense: bool = False
    advance: Callable[[str, range], None] = lambda phase, segment: None

    def through(self, segment: range) -> list[int]:
        """The micro-batches whose states leave a segment. Behind the last segment only scored ones do: for the loss."""
        last = segment.stop == len(self.stream.layers)
        return [i for i, scored in enumerate(self.batches.scored) if scored or (self.unscored and not last)]

    def sizes(self, numbers: Sequence[int]) -> list[int]:
        """Bytes of the states of micro-batches."""
        return [self.stream.state_bytes(self.batches.ids[number]) for number in numbers]


def enter(
    stream: Stream, own: Tiers, segment: range, number: int, ids: Tensor, *, kind: Record = Record.STATES
) -> Tensor:
    """The hidden state that enters a segment: embedded anew for the first one, kept for the others."""
    if segment.start == 0:
        return stream.embed(ids)
    return own.read(kind.of(segment.start), str(number), ahead=True)


def run_forward(sweep: Sweep, segment: range) -> None:
    """Keep the states that leave a segment."""
    stream, own, numbers = sweep.stream, sweep.run.own, sweep.through(segment)
    keeping = own.writing(Record.STATES.of(segment.stop), sizes=sweep.sizes(numbers))
    with keeping as append, torch.no_grad(), fast_layers(stream.model):
        for number in numbers:
            ids = sweep.batches.ids[number]
            hidden = enter(stream, own, segment, number, ids)
            for index in segment:
                hidden = stream.run_layer(index, hidden, stream.calls(ids))
            append(str(number), hidden)
            sweep.advance("forward", segment)


def head_tokens(hidden: int) -> int:
    """Tokens that a streamed head takes at once: d of them need 44·d² bytes, less than the Gram matrix of 3.4·d units.

    Args:
        hidden: d, the hidden size.
    """
    return max(HEAD_TOKENS, hidden)


def head_gradient(sweep: Sweep) -> None:
    """Keep the gradient at the last layer's output, many windows at a time."""
    stream, run, ids = sweep.stream, sweep.run, sweep.batches.ids
    last = len(stream.layers)
    numbers = sweep.through(range(last))
    per_group = max(1, head_tokens(stream.model.config.hidden_size) // max(part.numel() for part in ids))
    with run.own.writing(Record.GRADIENT.of(last), sizes=sweep.sizes(numbers)) as append:
        for start in range(0, len(numbers), per_group):
            group = numbers[start : start + per_group]
            hidden = [run.own.read(Record.STATES.of(last), str(number), ahead=True) for number in group]
            windows = torch.cat([ids[number] for number in group])
            _, gradient = stream.loss_gradient(torch.cat(hidden), windows, sweep.objective)
            for number, part in zip(group, gradient.split([len(ids[number]) for number in group]), strict=True):
                append(str(number), part)
            run.progress("head", min(start + per_group, len(numbers)), len(numbers))
    run.own.drop(Record.STATES.of(last))
