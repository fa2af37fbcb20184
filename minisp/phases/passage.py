"""The pruned model's windows through one layer, where a structure's output is kept apart from the rest.

With x (T, n) the consumer's input, W (d, n) and b its weight and bias, and r (T, d) the stream that passes the
structure by, what leaves the layer is h = r + (x Wᵀ + b). x and r do not depend on W. So when W alone has changed, h
takes one product, 2nd FLOPs a token, instead of another pass through the layer, and is rounded as that pass would round
it.

That the layer adds the structure's output unscaled to the stream, with nothing behind it, is tried on a few tokens of
every layer. A layer that does not (OPT with its norm behind the MLP) runs again.

Shapes: B windows, L tokens per window, T = B·L, d hidden size, n columns that the consumer has now.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from minisp.models.stream import Stream
from minisp.models.structures import Structure, weight_view
from minisp.models.watch import watch
from minisp.phases.boundaries import enter
from minisp.phases.run import Run
from minisp.phases.sizes import Sizes
from minisp.store.names import Record

# Tokens on which a layer is asked whether it adds up.
TRIED_TOKENS = 16


@dataclass
class _Told:
    """The activations x (T, n) of the micro-batch that has just passed."""

    x: Tensor | None = None

    def update_(self, x: Tensor, sums: Tensor | None, grad_y: Tensor | None = None) -> None:
        self.x = x


class Passage:
    """One layer, and the windows that pass it; without gradients.

    Args:
        batches: this process's windows (B, L) int64, one micro-batch each.
        structure: whose layer must be held until the passage is done with.
        kind: of the states that enter the layer.
        again: whether `leaving` will be asked for after `run`.
    """

    def __init__(
        self,
        stream: Stream,
        batches: Sequence[Tensor],
        run: Run,
        structure: Structure,
        kind: Record,
        *,
        again: bool,
    ):
        self._stream, self._batches, self._own = stream, batches, run.own
        self._structure, self._kind = structure, kind
        self._layer = stream.layers[structure.layer]
        self._again, self._adds = again, False
        # The states that `leaving` yields need room until the next layer has read them: x and r get what is left.
        self._waits = sum(map(stream.state_bytes, batches))
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, keep: Tensor | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run the windows through the layer; yields (micro-batch, x (T, n), r (B, L, d)), see `join`.

        Where there is room, x and r stay for `leaving`.

        Args:
            keep: the columns (int64) of x that stay for it; None for all of them.
        """
        for number, ids in enumerate(self._batches):
            x, passing = self._through(number, ids)
            yield number, x, passing
            width = x.shape[1] if keep is None else len(keep)
            size = x.shape[0] * width * x.element_size() + passing.nbytes
            if self._again and self._adds and self._own.reserve(size, beside=self._waits):
                self._kept[number] = x if keep is None else x.index_select(1, keep), passing

    def leaving(self) -> Iterator[Tensor]:
        """h (B, L, d) of one micro-batch after the other, with the weights that the layer has now.

        Since `run`, at most the consumer's weight may have changed, and columns outside `keep` may be gone.
        """
        for number, ids in enumerate(self._batches):
            kept = self._kept.pop(number, None)
            yield self.join(*(self._through(number, ids) if kept is None else kept))
            if kept is not None:
                self._own.give_back(sum(tensor.nbytes for tensor in kept))

    def join(self, x: Tensor, passing: Tensor) -> Tensor:
        """h (B, L, d) of a micro-batch, with the weight that the consumer has now, from what `run` gave.

        Where a layer does not add up, what `run` gave beside x is h.
        """
        return self._sum(x, passing) if self._adds else passing

    def _through(self, number: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x and r of a micro-batch, or x and h."""
        index = self._structure.layer
        hidden = enter(self._stream, self._own, range(index, index + 1), number, ids, kind=self._kind)
        if number == 0:
            self._adds = self._adds_up(hidden[:1, :TRIED_TOKENS], ids[:1, :TRIED_TOKENS])
        return self._pass(hidden, ids, contributes=not self._adds)

    def _pass(self, hidden: Tensor, ids: Tensor, *, contributes: bool) -> tuple[Tensor, Tensor]:
        stream, told = self._stream, _Told()
        config = stream.model.config
        with watch(self._layer, self._structure, config, told, contributes=contributes):
            leaving = stream.run_layer(self._structure.layer, hidden, stream.calls(ids))
        assert told.x is not None
        return told.x, leaving

    def _sum(self, x: Tensor, passing: Tensor) -> Tensor:
        consumer = self._layer.get_submodule(self._structure.consumer)
        added = functional.linear(x, weight_view(consumer), getattr(consumer, "bias", None))
        return passing + added.view_as(passing)

    def _adds_up(self, hidden: Tensor, ids: Tensor) -> bool:
        """Whether h = r + (x Wᵀ + b), bit for bit, for a few tokens (1, L, d)."""
        _, whole = self._pass(hidden, ids, contributes=True)
        return torch.equal(whole, self._sum(*self._pass(hidden, ids, contributes=False)))


def passage_bytes(sizes: Sizes, tokens: int) -> int:
    """What a passage of so many tokens keeps of a layer, so that its windows need not run again: x and r."""
    return tokens * (sizes.kept + sizes.hidden) * sizes.item
