"""The heal sweep: forward, layer by layer, on what the already pruned layers below produce.

On pruned inputs (`inputs="pruned"`): Gram, solve, cut, go on. On both (`inputs="both"`): refit on the dense model's
statistics, run the dense and the pruned model side by side, correct what has drifted apart, cut, go on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisp import ops
from minisp.config import MinifyConfig
from minisp.methods.reconstruction import Reconstruction, correct, reconstruct
from minisp.methods.statistics import LayerStatistics
from minisp.models.families import activation_kind, cut_, mlp_weights
from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.models.watch import watch
from minisp.phases.passage import Passage
from minisp.phases.run import Workplace, record
from minisp.phases.saliency import enter


def heal_sweep(
    stream: Stream, batches: Sequence[Tensor], kept: Sequence[Tensor], config: MinifyConfig, work: Workplace
) -> None:
    """Leave a record of every layer's reconstruction, each made on the pruned layers below it.

    Args:
        batches: this process's share of the windows (B, L) int64, see `minisp.phases.batches`.
        kept: per layer (n,) int64 sorted.
        config: inputs, "pruned" or "both", and how to refit.

    Raises:
        NumericalError: a ridge system cannot be solved.
    """
    both, count = config.inputs == "both", len(kept)
    widths = [mlp_weights(layer, stream.row).up.shape[0] for layer in stream.layers]
    first_cut = next((i for i in range(count) if len(kept[i]) < widths[i]), count)
    # The states that enter each layer, the pruned model's last: as far as the first cut they are the dense one's.
    kinds = [(["dense"] if both else []) + (["healed"] if not both or i > first_cut else []) for i in range(count)]
    sizes = [stream.state_bytes(ids) for ids in batches]
    first = _first_unhealed(kinds, work)
    for segment in stream.visit([range(index, index + 1) for index in range(first, count)]):
        index, layer = segment.start, stream.layers[segment.start]
        heals_next = index + 1 < count and "healed" in kinds[index + 1]
        passage = Passage(stream, batches, work, index, kinds[index][-1], again=heals_next)
        with torch.no_grad(), fast_layers(stream.model):
            if both and not work.own.has(record("dense", index + 1)):
                _keep(_dense(stream, batches, work, index), "dense", sizes, work, index, count)
            # Together: what the first process has just written, a slower one must not take for an earlier run's.
            if work.ranks.most(not work.shared.has(record("result", index))):
                heal_layer = _correct_layer if both and index >= first_cut else _refit_layer
                result = heal_layer(stream, passage, kept[index], config, work, index)
                if work.ranks.first:
                    work.keep_result(result)
                    work.shared.settle()
                del result
                work.ranks.wait()
            found = work.result(index)
            if found.down is not None:
                cut_(layer, stream.row, found.kept.to(stream.device), found.down.to(stream.device))
            if stream.checkpoint is None:
                # The model has the new weights now.
                work.keep_result(replace(found, down=None))
            del found
            if heals_next:
                _keep(passage.leaving(), "healed", sizes, work, index, count)
        for kind in kinds[index]:
            work.own.drop(record(kind, index))
        if index + 1 < count:
            work.save_if_due(*(record(kind, index + 1) for kind in kinds[index + 1]))
    work.own.drop(record("dense", count))
    work.own.forget()


def _dense(stream: Stream, batches: Sequence[Tensor], work: Workplace, index: int) -> Iterator[Tensor]:
    """Run the dense model's windows through a layer as it is; yield the states (B, L, d) that leave it.

    The MLP is the engine's, as in the saliency sweep, which may have kept these states: bit for bit the same.
    """
    with watch(stream.layers[index], stream.row, activation_kind(stream.model.config, stream.row), _Nobody()):
        for number, ids in enumerate(batches):
            hidden = enter(stream, work.own, range(index, index + 1), number, ids, kind="dense")
            yield stream.run_layer(index, hidden, stream.calls(ids))


class _Nobody:
    """Watches without asking for anything."""

    def update_(self, x: Tensor, sums: Tensor | None) -> None:
        """As `mlp.Watcher`."""


def _keep(leaving: Iterable[Tensor], kind: str, sizes: Sequence[int], work: Workplace, index: int, count: int) -> None:
    """Make the states that leave a layer, of `sizes` bytes, a record; `count` is the number of layers."""
    with work.own.writing(record(kind, index + 1), sizes=sizes) as append:
        for number, states in enumerate(leaving):
            append(str(number), states)
            work.progress(f"heal, layer {index}, {kind}", index * len(sizes) + number + 1, count * len(sizes))


def _first_unhealed(kinds: Sequence[Sequence[str]], work: Workplace) -> int:
    """The lowest layer that still has to be run: those below have results, and every process has what enters it."""
    count = len(kinds)
    there = [work.shared.has(record("result", layer)) for layer in range(count)]
    known = [all(there[:layer]) and all(work.own.has(record(k, layer)) for k in kinds[layer]) for layer in range(count)]
    flags = work.ranks.everywhere([True, *known[1:], all(there)])
    return max(layer for layer, flag in enumerate(flags) if flag)


def _refit_layer(
    stream: Stream, passage: Passage, kept: Tensor, config: MinifyConfig, work: Workplace, index: int
) -> Reconstruction:
    """Refit the kept units of a layer to what the whole layer computes from the pruned layers below it.

    As for `_correct_layer`: `passage` is the pruned model's through the layer.
    """
    width = mlp_weights(stream.layers[index], stream.row).up.shape[0]
    if len(kept) == width:
        return Reconstruction(index, kept, None, 0.0, 0.0)
    statistics = LayerStatistics.empty(width, gram=True, device=stream.device)
    for _, x, _ in passage.run(kept.to(stream.device)):
        statistics.update_(x, None)
    statistics.sum_over_(work.ranks)
    return reconstruct(index, statistics.finalize_(index), kept, stream.down_weight(index), config)


def _correct_layer(
    stream: Stream, passage: Passage, kept: Tensor, config: MinifyConfig, work: Workplace, index: int
) -> Reconstruction:
    """Refit the kept units of a layer on the dense model's statistics, cut it, then correct the drift behind it."""
    weight = stream.down_weight(index)
    dense = work.statistics(index, gram=len(kept) < weight.shape[1], device=stream.device)
    result = reconstruct(index, dense, kept, weight, config)
    del dense
    if result.down is None:
        # Memory of its own: the layer's goes when the next one is read.
        result = replace(result, down=weight.clone())
    else:
        cut_(stream.layers[index], stream.row, kept.to(stream.device), result.down)
    drift = _Drift.empty(len(kept), len(weight), stream.device)
    for number, x, passing in passage.run():
        target = work.own.read(record("dense", index + 1), str(number), ahead=True)
        drift.add_(x, target, passage.join(x, passing))
    work.ranks.sum_(drift.gram, drift.cross, drift.energy)
    return correct(result, ops.mirror_(drift.gram), drift.cross.T.contiguous(), float(drift.energy), config)


@dataclass
class _Drift:
    """Sums of the regression of the drift E (T, d) on the activations X_S (T, n) of a layer that is cut.

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
