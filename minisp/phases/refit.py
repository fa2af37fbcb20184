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

from minisp import ops
from minisp.config import MinifyConfig
from minisp.methods.reconstruction import Fit, correct, refit
from minisp.methods.statistics import Statistics
from minisp.models.edits import apply_, edits_of
from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.models.watch import watch
from minisp.phases.passage import Passage
from minisp.phases.run import Phase, Result, Run, naming
from minisp.phases.saliency import enter
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
            result, weight = _refit_on_dense(stream, structure, kept[place], config, run)
            if stream.checkpoint is None:
                apply_(stream.layers[structure.layer], edits_of(structure, kept[place], weight))
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

    def update_(self, x: Tensor, sums: Tensor | None) -> None:
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
            for structure, units in parts:
                is_last = structure is parts[-1][0]
                to_correct = passage if is_last and corrects and index >= first_cut else None
                _refit_one(sweep, structure, units, passage if is_last else None, to_correct)
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


def _refit_one(
    sweep: _Sweep, structure: Structure, kept: Tensor, passage: Passage | None, to_correct: Passage | None
) -> None:
    """Refit a structure, unless that is done, and cut the layer that is held.

    Args:
        passage: the pruned model's through the layer, for its last structure.
        to_correct: the same, where this structure takes over drift.
    """
    stream, run = sweep.stream, sweep.run
    layer = stream.layers[structure.layer]
    # Together: what the first process has just written, a slower one must not take for an earlier run's.
    if run.ranks.most(not run.has_result(structure)):
        if to_correct is not None:
            result, weight = _refit_and_correct(sweep, structure, kept, to_correct)
        elif sweep.config.corrects:
            result, weight = _refit_on_dense(stream, structure, kept, sweep.config, run)
        else:
            result, weight = _refit_on_pruned(sweep, structure, kept, passage)
        if run.ranks.first:
            run.keep_result(result, weight)
            run.shared.settle()
        del result, weight
        run.ranks.wait()
    found, weight = run.result(structure), run.weight(structure)
    if weight is not None:
        weight = weight.to(stream.device)
    apply_(layer, edits_of(structure, found.kept, weight))
    if stream.checkpoint is None:
        # The model has the new weights now.
        run.keep_result(found, None)


def _refit_on_dense(
    stream: Stream, structure: Structure, kept: Tensor, config: MinifyConfig, run: Run
) -> tuple[Result, Tensor | None]:
    """Refit to what the whole structure computed in the dense model, from its statistics."""
    if len(kept) == structure.num_units:
        return Result(structure, kept, Fit()), None
    found = run.statistics(structure, gram=True, device=stream.device)
    return _solved(structure, kept, found, stream.weight(structure), config)


def _refit_on_pruned(
    sweep: _Sweep, structure: Structure, kept: Tensor, passage: Passage | None
) -> tuple[Result, Tensor | None]:
    """Refit to what the whole structure computes from the pruned layers below it."""
    stream, run = sweep.stream, sweep.run
    if len(kept) == structure.num_units:
        return Result(structure, kept, Fit()), None
    if passage is None:
        kind = sweep.kinds[structure.layer][-1]
        passage = Passage(stream, sweep.batches, run, structure, kind, again=False)
    statistics = Statistics.empty(structure.num_units, structure.columns, gram=True, device=stream.device)
    for _, x, _ in passage.run(structure.columns_of(kept.to(stream.device))):
        statistics.update_(x, None)
    statistics.sum_over_(run.ranks)
    statistics.finalize_(structure)
    return _solved(structure, kept, statistics, stream.weight(structure), sweep.config)


def _solved(
    structure: Structure, kept: Tensor, statistics: Statistics, weight: Tensor, config: MinifyConfig
) -> tuple[Result, Tensor]:
    assert statistics.gram is not None
    with naming(structure):
        new, fit = refit(statistics.gram, structure.columns_of(kept), weight, statistics.num_tokens, config)
    return Result(structure, kept, fit), new


def _refit_and_correct(
    sweep: _Sweep, structure: Structure, kept: Tensor, passage: Passage
) -> tuple[Result, Tensor | None]:
    """Refit a structure on the dense model's statistics, cut it, then correct the drift behind its layer."""
    stream, run = sweep.stream, sweep.run
    result, weight = _refit_on_dense(stream, structure, kept, sweep.config, run)
    if weight is None:
        # Memory of its own: the layer's goes when the next one is read.
        weight = stream.weight(structure).clone()
    else:
        apply_(stream.layers[structure.layer], edits_of(structure, kept, weight))
    drift = _Drift.empty(structure.columns * len(kept), len(weight), stream.device)
    for number, x, passing in passage.run():
        target = run.own.read(Record.DENSE.of(structure.layer + 1), str(number), ahead=True)
        drift.add_(x, target, passage.join(x, passing))
    run.ranks.sum_(drift.gram, drift.cross, drift.energy)
    cross, energy = drift.cross.T.contiguous(), float(drift.energy)
    with naming(structure, ", drift correction"):
        weight, fit = correct(
            weight, result.fit, ops.mirror_(drift.gram), cross, energy, sweep.config.correction_damping
        )
    return Result(structure, kept, fit), weight


@dataclass
class _Drift:
    """Sums of the regression of the drift E (T, d) on the activations X_S (T, n) of a structure that is cut.

    Attributes:
        gram: X_SᵀX_S (n, n) float32.
        cross: X_SᵀE (n, d) float32.
        energy: ‖E‖², () float64.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, n: int, hidden: int, device: torch.device) -> "_Drift":
        energy = torch.zeros((), dtype=torch.float64, device=device)
        gram, cross = (torch.zeros(n, size, dtype=torch.float32, device=device) for size in (n, hidden))
        return cls(gram, cross, energy)

    def add_(self, x: Tensor, dense: Tensor, pruned: Tensor) -> None:
        """A micro-batch: x (T, n), and the states (B, L, d) behind the layer in both models.

        E is their difference in float32: in 16 bits it would be rounded before its square is taken.
        """
        drift = (dense.float() - pruned.float()).flatten(0, -2)
        self.energy += torch.linalg.vector_norm(drift).double().square()
        ops.gram_update_(self.gram, x)
        ops.cross_update_(self.cross, x, drift.to(x.dtype))
