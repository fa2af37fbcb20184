"""The heal sweep: forward, layer by layer, on what the already pruned layers below produce.

On pruned inputs (`inputs="pruned"`): Gram, solve, cut, go on. On both (`inputs="both"`): refit on the dense model's
statistics, run the dense and the pruned model side by side, correct what has drifted apart, cut, go on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minisp import ops
from minisp.architecture import activation_kind, cut_, mlp_weights, other_down
from minisp.config import MinifyConfig
from minisp.layers import fast_layers
from minisp.mlp import watch
from minisp.reconstruction import Reconstruction, correct, reconstruct
from minisp.statistics import LayerStatistics
from minisp.stream import Stream
from minisp.sweep import enter
from minisp.windows import spread
from minisp.workplace import Workplace, record

# Every window passes a corrected layer three times: dense, pruned at full width, cut. From twice so many tokens on,
# every second one has to do, which bounds what the correction adds to a run. With 8192 instead of 16384 tokens,
# SmolLM2-135M at 80 % has ×1.227 or ×1.235 of its perplexity (the even or the odd windows) instead of ×1.226, in half
# the time.
FEW_TOKENS = 8192


def heal_count(count: int, window: int, ranks: int = 1) -> int:
    """On how many of the calibration windows a correction is made: at least one for every process."""
    return min(count, max(-(-count // 2), -(-FEW_TOKENS // window), ranks))


def heal_windows(windows: Tensor, config: MinifyConfig, ranks: int = 1) -> Tensor:
    """The calibration windows (N, L) that run through the heal sweep, evenly spread: the same whoever computes them."""
    if config.inputs != "both":
        return windows
    return windows[spread(len(windows), heal_count(windows.shape[0], windows.shape[1], ranks))]


def heal_sweep(
    stream: Stream, batches: Sequence[Tensor], kept: Sequence[Tensor], config: MinifyConfig, work: Workplace
) -> None:
    """Leave a record of every layer's reconstruction, each made on the pruned layers below it.

    Args:
        batches: this process's share of `heal_windows` (B, L) int64.
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
    first = _first_unhealed(kinds, work)
    for segment in stream.visit([range(index, index + 1) for index in range(first, count)]):
        index, layer = segment.start, stream.layers[segment.start]
        passing = partial(_states, stream, batches, work, index)
        entering = kinds[index][-1]
        with torch.no_grad(), fast_layers(stream.model):
            if both:
                _keep(passing("dense"), "dense", work, index, (count, len(batches)))
            # Together: what the first process has just written, a slower one must not take for an earlier run's.
            if work.ranks.most(not work.shared.has(record("result", index))):
                heal_layer = _correct_layer if both and index >= first_cut else _refit_layer
                result = heal_layer(stream, passing(entering), kept[index], config, work, index)
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
            if index + 1 < count and "healed" in kinds[index + 1]:
                _keep(passing(entering), "healed", work, index, (count, len(batches)))
        for kind in kinds[index]:
            work.own.drop(record(kind, index))


def _states(stream: Stream, batches: Sequence[Tensor], work: Workplace, index: int, kind: str) -> Iterator[Tensor]:
    """Run the windows through a layer as it is, from the states of a kind; yield those that leave it (B, L, d)."""
    for number, ids in enumerate(batches):
        hidden = enter(stream, work.own, range(index, index + 1), number, ids, kind=kind)
        yield stream.run_layer(index, hidden, stream.calls(ids))


def _keep(leaving: Iterable[Tensor], kind: str, work: Workplace, index: int, steps: tuple[int, int]) -> None:
    """Make the states that leave a layer a record; `steps` are the layers and the micro-batches."""
    layers, batches = steps
    with work.own.writing(record(kind, index + 1)) as append:
        for number, states in enumerate(leaving):
            append(str(number), states)
            work.progress(f"heal, layer {index}, {kind}", index * batches + number + 1, layers * batches)


def _first_unhealed(kinds: Sequence[Sequence[str]], work: Workplace) -> int:
    """The lowest layer that still has to be run: those below have results, and what enters it is known."""
    first, count = 0, len(kinds)
    for layer in range(count):
        if not work.shared.has(record("result", layer)):
            break
        if layer == count - 1 or all(work.own.has(record(kind, layer + 1)) for kind in kinds[layer + 1]):
            first = layer + 1
    return count - work.ranks.most(count - first)


def _refit_layer(
    stream: Stream, passing: Iterable[Tensor], kept: Tensor, config: MinifyConfig, work: Workplace, index: int
) -> Reconstruction:
    """Refit the kept units of a layer to what the whole layer computes from the pruned layers below it.

    As for `_correct_layer`: `passing` runs the pruned model's windows through the layer.
    """
    width = mlp_weights(stream.layers[index], stream.row).up.shape[0]
    if len(kept) == width:
        return Reconstruction(index, kept, None, 0.0, 0.0)
    kind = activation_kind(stream.model.config, stream.row)
    statistics = LayerStatistics.empty(width, gram=True, device=stream.device)
    with watch(stream.layers[index], stream.row, kind, statistics):
        for _ in passing:
            pass
    statistics.sum_over_(work.ranks)
    return reconstruct(index, statistics.finalize_(index), kept, stream.down_weight(index), config)


def _correct_layer(
    stream: Stream, passing: Iterable[Tensor], kept: Tensor, config: MinifyConfig, work: Workplace, index: int
) -> Reconstruction:
    """Refit the kept units of a layer on the dense model's statistics, then correct the drift behind it."""
    weight = stream.down_weight(index)
    layer, row = stream.layers[index], stream.row
    dense = work.statistics(index, gram=len(kept) < weight.shape[1], device=stream.device)
    result = reconstruct(index, dense, kept, weight, config)
    del dense
    refitted = weight if result.down is None else result.down
    result = replace(result, down=refitted)
    # At full width, with nothing where units are removed: the layer is cut when its weights are final.
    down = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    down[:, kept.to(down.device)] = refitted.to(down)
    drift = _Drift.empty(kept.to(stream.device), len(weight))
    with other_down(layer, row, down), watch(layer, row, activation_kind(stream.model.config, row), drift):
        for number, leaving in enumerate(passing):
            target = work.own.read(record("dense", index + 1), str(number), ahead=True)
            drift.add_(target.to(stream.device, non_blocking=True) - leaving)
    work.ranks.sum_(drift.gram, drift.cross, drift.energy)
    return correct(result, ops.mirror_(drift.gram), drift.cross.T.contiguous(), float(drift.energy), config)


@dataclass
class _Drift:
    """Sums of the regression of the drift E (T, d) on the kept activations X_S (T, n) of a layer that is watched.

    Attributes:
        kept: (n,) int64.
        gram: X_SᵀX_S (n, n) float32.
        cross: X_SᵀE (n, d) float32.
        energy: ‖E‖², () float64.
        passed: X_S of the last micro-batch.
    """

    kept: Tensor
    gram: Tensor
    cross: Tensor
    energy: Tensor
    passed: Tensor | None = None

    @classmethod
    def empty(cls, kept: Tensor, hidden: int) -> "_Drift":
        n, device = len(kept), kept.device
        energy = torch.zeros((), dtype=torch.float64, device=device)
        return cls(kept, torch.zeros(n, n, device=device), torch.zeros(n, hidden, device=device), energy)

    def update_(self, x: Tensor, sums: Tensor | None) -> None:
        """What the watched layer tells: its activations x (T, m)."""
        self.passed = x.index_select(1, self.kept)

    def add_(self, drift: Tensor) -> None:
        """The drift (…, d) behind the layer for the tokens that have just passed."""
        assert self.passed is not None
        flat = drift.reshape(-1, drift.shape[-1])
        self.energy += torch.linalg.vector_norm(flat, dtype=torch.float32).double().square()
        ops.gram_update_(self.gram, self.passed)
        ops.cross_update_(self.cross, self.passed, flat)
