"""The heal sweep: forward, layer by layer, on what the already pruned layers below produce.

On pruned inputs (`inputs="pruned"`): Gram, solve, cut, go on. On both (`inputs="both"`): refit on the dense model's
statistics, run the dense and the pruned model side by side, correct what has drifted apart, cut, go on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisp import ops
from minisp.architecture import activation_kind, cut_, mlp_weights, other_down
from minisp.attention import fast_attention
from minisp.config import MinifyConfig
from minisp.mlp import watch
from minisp.reconstruction import Reconstruction, correct, reconstruct
from minisp.statistics import LayerStatistics
from minisp.stream import Stream
from minisp.sweep import enter
from minisp.windows import spread
from minisp.workplace import Workplace, record

# Every window passes a corrected layer three times: dense, pruned at full width, cut. From so many tokens on, every
# second one has to do, which bounds what the correction adds to a run. With 8192 instead of 16384 tokens, SmolLM2-135M
# at 80 % has ×1.227 or ×1.235 of its perplexity (the even or the odd windows) instead of ×1.226, in half the time.
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
    both = config.inputs == "both"
    first, count = _first_unhealed(len(kept), work, both), len(kept)
    widths = [mlp_weights(layer, stream.row).up.shape[0] for layer in stream.layers]
    for segment in stream.visit([range(index, index + 1) for index in range(first, count)]):
        index, layer = segment.start, stream.layers[segment.start]
        drifts = both and any(len(kept[i]) < widths[i] for i in range(index + 1))
        with torch.no_grad(), fast_attention(stream.model.config):
            if both:
                _propagate(stream, batches, work, segment, "dense")
            # Together: what the first process has just written, a slower one must not take for an earlier run's.
            if work.ranks.most(not work.shared.has(record("result", index))):
                heal_layer = _correct_layer if drifts else _refit_layer
                result = heal_layer(stream, batches, kept[index], config, work, index)
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
            if index + 1 < count:
                _propagate(stream, batches, work, segment, "healed")
        for kind in ("healed", "dense"):
            work.own.drop(record(kind, index))


def _propagate(stream: Stream, batches: Sequence[Tensor], work: Workplace, segment: range, kind: str) -> None:
    """Keep the states that leave a layer: `dense` before, `healed` after it has been cut."""
    index, steps = segment.start, len(stream.layers) * len(batches)
    with work.own.writing(record(kind, segment.stop)) as append:
        for number, ids in enumerate(batches):
            hidden = enter(stream, work.own, segment, number, ids, kind=kind)
            append(str(number), stream.run_layer(index, hidden, stream.calls(ids)))
            work.progress(f"heal, layer {index}, {kind}", index * len(batches) + number + 1, steps)


def _first_unhealed(count: int, work: Workplace, both: bool) -> int:
    """The lowest layer that still has to be run: those below have results, and their output is known."""
    first = 0
    for layer in range(count):
        if not work.shared.has(record("result", layer)):
            break
        known = work.own.has(record("healed", layer + 1)) and (not both or work.own.has(record("dense", layer + 1)))
        if known or layer == count - 1:
            first = layer + 1
    return count - work.ranks.most(count - first)


def _refit_layer(
    stream: Stream, batches: Sequence[Tensor], kept: Tensor, config: MinifyConfig, work: Workplace, index: int
) -> Reconstruction:
    """Refit the kept units of a layer to what the whole layer computes from the pruned layers below it."""
    width = mlp_weights(stream.layers[index], stream.row).up.shape[0]
    if len(kept) == width:
        return Reconstruction(index, kept, None, 0.0, 0.0)
    kind = activation_kind(stream.model.config, stream.row)
    statistics = LayerStatistics.empty(width, gram=True, device=stream.device)
    with watch(stream.layers[index], stream.row, kind, statistics):
        for _ in _states(stream, batches, work, index):
            pass
    statistics.sum_over_(work.ranks)
    return reconstruct(index, statistics.finalize_(index), kept, stream.down_weight(index), config)


def _correct_layer(
    stream: Stream, batches: Sequence[Tensor], kept: Tensor, config: MinifyConfig, work: Workplace, index: int
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
        for number, leaving in enumerate(_states(stream, batches, work, index)):
            target = work.own.read(record("dense", index + 1), str(number), ahead=True)
            drift.add_(target.to(stream.device, non_blocking=True) - leaving)
    work.ranks.sum_(drift.gram, drift.cross, drift.energy)
    return correct(result, ops.mirror_(drift.gram), drift.cross.T.contiguous(), float(drift.energy), config)


def _states(stream: Stream, batches: Sequence[Tensor], work: Workplace, index: int) -> Iterator[Tensor]:
    """Run the windows of the pruned model through a layer; yield the states (B, L, d) that leave it."""
    for number, ids in enumerate(batches):
        hidden = enter(stream, work.own, range(index, index + 1), number, ids, kind="healed")
        yield stream.run_layer(index, hidden, stream.calls(ids))


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
