"""The refit: what every structure's consumer becomes, from dense statistics alone or in a sweep over the pruned model.

`refit_structures` leaves a result for every structure. On the dense model's activations alone it takes one solve each.
The refit sweep goes forward, layer by layer. With `refit_on="pruned"` a layer is refitted on what the pruned layers
below it produce. With `correct_drift` it is refitted on the dense model's statistics first; then its last structure
takes over what it can of the drift between the dense and the pruned model, which run side by side.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.models.edits import cut_
from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.models.watch import watch
from minisp.phases.batches import correction_count
from minisp.phases.boundaries import enter
from minisp.phases.passage import Passage
from minisp.phases.run import Phase, Run
from minisp.phases.sizes import HELD, Demand, Holding, Sizes, refit_bytes, solve_flops
from minisp.phases.solve import refit_and_correct, refit_on_dense, refit_on_pruned
from minisp.store.names import Record


def refit_structures(
    stream: Stream, batches: Sequence[Tensor], kept: Sequence[Tensor], config: MinifyConfig, run: Run
) -> None:
    """Leave a result for every structure; a model in memory is cut on the way, and its results go without weights.

    Args:
        batches: this process's windows (B, L) int64 of the refit sweep, see `minisp.phases.batches`.
        kept: per structure (n,) int64 sorted.
        config: on what and how to refit.

    Raises:
        NumericalError: a ridge system cannot be solved.
    """
    if config.refit_sweep:
        _refit_sweep(stream, batches, kept, config, run)
        return
    for place in run.ranks.share(range(len(kept))):
        structure = stream.structures[place]
        if not run.has_result(structure):
            result, weight = refit_on_dense(stream, structure, kept[place], config, run)
            if stream.checkpoint is None:
                cut_(stream.layers[structure.layer], structure, kept[place], weight)
                weight = None
            run.keep_result(result, weight)
        run.progress(Phase.REFIT, place + 1, len(kept))
    run.shared.settle()
    run.ranks.wait()


@dataclass(frozen=True)
class _Sweep:
    """What every layer of one refit sweep needs.

    Attributes:
        batches: windows (B, L) of each micro-batch.
        sizes: bytes of their states.
        kinds: of the states that enter each layer, the pruned model's last.
    """

    stream: Stream
    batches: Sequence[Tensor]
    config: MinifyConfig
    run: Run
    sizes: Sequence[int]
    kinds: Sequence[Sequence[Record]]

    def keep(self, leaving: Iterable[Tensor], kind: Record, index: int) -> None:
        """Make the states that leave a layer a record."""
        count = len(self.kinds) * len(self.sizes)
        with self.run.own.writing(kind.of(index + 1), sizes=self.sizes) as append:
            for number, states in enumerate(leaving):
                append(str(number), states)
                step = index * len(self.sizes) + number + 1
                self.run.progress(f"{Phase.REFIT_SWEEP}, layer {index}, {kind.value}", step, count)

    def dense(self, index: int) -> Iterator[Tensor]:
        """Run the dense model's windows through a layer as it is; yield the states (B, L, d) that leave it.

        Its structures are watched, as in the saliency sweep, which may have kept these states: bit for bit the same.
        """
        stream, layer = self.stream, self.stream.layers[index]
        with ExitStack() as stack:
            for structure in stream.structures_in(index):
                stack.enter_context(watch(layer, structure, stream.model.config, _Nobody()))
            for number, ids in enumerate(self.batches):
                hidden = enter(stream, self.run.own, range(index, index + 1), number, ids, kind=Record.DENSE)
                yield stream.run_layer(index, hidden, stream.calls(ids))


class _Nobody:
    """Watches without asking for anything."""

    def update_(self, x: Tensor, sums: Tensor | None, grad_y: Tensor | None = None) -> None:
        """As `watch.Watcher`."""


def _refit_sweep(
    stream: Stream, batches: Sequence[Tensor], kept: Sequence[Tensor], config: MinifyConfig, run: Run
) -> None:
    """Refit layer by layer; states enter each in the pruned model, and in the dense one where drift is corrected."""
    count, own, corrects = len(stream.layers), run.own, config.corrects
    cut = [x.layer for x, units in zip(stream.structures, kept, strict=True) if len(units) < x.num_units]
    first_cut = min(cut, default=count)
    # Below the first cut layer, pruned and dense states are equal, so one kind is kept.
    kinds = [
        ([Record.DENSE] if corrects else []) + ([Record.PRUNED] if not corrects or i > first_cut else [])
        for i in range(count)
    ]
    sweep = _Sweep(stream, batches, config, run, [stream.state_bytes(ids) for ids in batches], kinds)
    first = _first_unfinished(sweep)
    for segment in stream.visit([range(index, index + 1) for index in range(first, count)]):
        index = segment.start
        parts = [(x, units) for x, units in zip(stream.structures, kept, strict=True) if x.layer == index]
        goes_on = index + 1 < count and Record.PRUNED in kinds[index + 1]
        passage = Passage(stream, batches, run, parts[-1][0], kinds[index][-1], again=goes_on)
        with torch.no_grad(), fast_layers(stream.model):
            if corrects and not own.has(Record.DENSE.of(index + 1)):
                sweep.keep(sweep.dense(index), Record.DENSE, index)
            for structure, units in parts[:-1]:
                through = Passage(stream, batches, run, structure, kinds[index][-1], again=False)
                _refit_one(sweep, structure, units, through, corrects=False)
            _refit_one(sweep, *parts[-1], passage, corrects=corrects and index >= first_cut)
            if goes_on:
                sweep.keep(passage.leaving(), Record.PRUNED, index)
        for kind in kinds[index]:
            own.drop(kind.of(index))
        if index + 1 < count:
            run.save_if_due(*(kind.of(index + 1) for kind in kinds[index + 1]))
    own.drop(Record.DENSE.of(count))
    own.forget()


def _first_unfinished(sweep: _Sweep) -> int:
    """The lowest layer that still has to be run: those below have results, and every process has what enters it."""
    run, kinds, structures = sweep.run, sweep.kinds, sweep.stream.structures
    missing = {structure.layer for structure in structures if not run.has_result(structure)}
    there = [layer not in missing for layer in range(len(kinds))]
    known = [all(there[:i]) and all(run.own.has(kind.of(i)) for kind in kinds[i]) for i in range(len(kinds))]
    flags = run.ranks.everywhere([True, *known[1:], all(there)])
    return max(layer for layer, flag in enumerate(flags) if flag)


def _refit_one(sweep: _Sweep, structure: Structure, kept: Tensor, passage: Passage, *, corrects: bool) -> None:
    """Refit a structure, unless that is done, and cut the layer that is held.

    Args:
        passage: the pruned model's through the layer, in which the structure is watched.
        corrects: whether this structure takes over drift.
    """
    stream, run, config = sweep.stream, sweep.run, sweep.config
    layer = stream.layers[structure.layer]
    # Together: what the first process has just written, a slower one must not take for an earlier run's.
    if run.ranks.most(not run.has_result(structure)):
        if corrects:
            result, weight = refit_and_correct(stream, structure, kept, config, run, passage)
        elif config.corrects:
            result, weight = refit_on_dense(stream, structure, kept, config, run)
        else:
            result, weight = refit_on_pruned(stream, structure, kept, config, run, passage)
        if run.ranks.first:
            run.keep_result(result, weight)
            run.shared.settle()
        del result, weight
        run.ranks.wait()
    found, weight = run.result(structure), run.weight(structure)
    if weight is not None:
        weight = weight.to(stream.device)
    cut_(layer, structure, found.kept, weight)
    if stream.checkpoint is None:
        # The model has the new weights now.
        run.keep_result(found, None)


def refit_tokens(sizes: Sizes) -> int:
    """Tokens of this process in the refit sweep; 0 where there is none."""
    config = sizes.config
    if not config.refit_sweep:
        return 0
    count = config.num_windows
    if config.corrects:
        count = correction_count(count, config.window, sizes.ranks)
    return -(-count // sizes.ranks) * config.window


def dense_bytes(sizes: Sizes) -> int:
    """The dense model's states of the refit sweep's windows behind every layer."""
    return sizes.num_layers * sizes.states(refit_tokens(sizes))


def demand(sizes: Sizes, holding: Holding, again: float = 0.0) -> Demand:
    """What the refit takes: its solves; and in its sweep, at full width, X_SᵀX_S, X_SᵀE and its transpose.

    Args:
        again: share of the refit sweep's windows that pass a cut layer twice, for want of room.
    """
    config, d, m, item = sizes.config, sizes.hidden, sizes.width, sizes.item
    solving, tokens = refit_bytes(sizes, sizes.kept), refit_tokens(sizes)
    solves = 0.0
    if config.keep < 1 and config.reconstruct:
        solves = sum(solve_flops(x.width, config.keep, d) for x in sizes.structures)
        if config.corrects:
            solves += sum(solve_flops(x.width, config.keep, d, refit=False) for x in sizes.structures)
    if not tokens:
        return Demand(memory={Phase.REFIT: solving}, solve_flops=solves)
    drift = {
        "Gram matrices": 4 * m**2 + 2 * 4 * m * d,
        "activations": sizes.batch_tokens * (4 * item * m + 8 * 4 * d + 2 * item * d),
        "cut layer": (3 * item + 2 * sizes.stored_item) * d * m,
    }
    # Into and out of a layer, of the dense and of the pruned model.
    waiting, states = 4 * sizes.states(tokens), sizes.states(tokens)
    in_memory = {} if sizes.writes else {HELD: waiting}
    largest = max(solving, drift, key=lambda part: sum(part.values()))
    return Demand(
        memory={Phase.REFIT: solving, Phase.REFIT_SWEEP: largest | in_memory},
        waiting=waiting,
        # Of the pruned model, and of the dense one where it runs again: written once and read twice.
        passed=(3 if holding.dense else 6) * sizes.num_layers * states,
        flops=_sweep_flops(sizes, holding, again),
        solve_flops=solves,
    )


def _sweep_flops(sizes: Sizes, holding: Holding, again: float) -> float:
    """Every window passes every layer once; then the consumer's product alone is repeated, or the whole layer is.

    The sums of the refit or of the correction come on top.
    """
    config, inside, consumers = sizes.config, sizes.inside, sizes.consumers
    cut = 2 * (inside - (1 - config.keep) * sum(x.parameters * x.num_units for x in sizes.structures))
    # What leaves the last layer is not wanted.
    second = (1 - 1 / sizes.num_layers) * (again * cut + (1 - again) * 2 * config.keep * consumers)
    if not config.corrects:
        return float(sizes.all_tokens * (2 * (inside - consumers) + sizes.all_grams + second))
    tokens = correction_count(config.num_windows, config.window, sizes.ranks) * config.window
    # The dense model, the pruned one, the drift's Gram matrix and cross product.
    sums = config.keep**2 * sizes.all_grams + 2 * config.keep * consumers
    return float(tokens * ((0 if holding.dense else 2 * inside) + cut + second + sums))
