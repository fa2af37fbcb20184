"""Which calibration windows run through which sweep, in micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minisp.config import MinifyConfig
from minisp.ranks import Ranks
from minisp.text.windows import spread

# Correction runs each window through a layer twice, in the dense and in the pruned model, beside the drift's sums. To
# bound its cost it uses half of the windows, but at least so many tokens. With 8192 instead of
# 16384 tokens, SmolLM2-135M at 80 % has ×1.227 or ×1.235 of its perplexity (the even or the odd windows) instead of
# ×1.226, in half the time.
FEW_TOKENS = 8192


@dataclass(frozen=True)
class Batches:
    """One process's micro-batches.

    Attributes:
        ids: windows (B, L) int64 of each; those of the refit sweep come first.
        scored: whether saliency is computed on each; the others only add to the Gram matrices.
        num_refit: how many of them run through the refit sweep.
    """

    ids: Sequence[Tensor]
    scored: Sequence[bool]
    num_refit: int

    @classmethod
    def scoring(cls, ids: Sequence[Tensor]) -> "Batches":
        """Micro-batches that saliency is computed on, none of them for the refit sweep."""
        return cls(ids, [True] * len(ids), 0)

    @property
    def refit(self) -> Sequence[Tensor]:
        """Those of the refit sweep."""
        return self.ids[: self.num_refit]


def correction_count(count: int, window: int, ranks: int = 1) -> int:
    """On how many of the calibration windows a correction is made: at least one for every process."""
    return min(count, max(-(-count // 2), -(-FEW_TOKENS // window), ranks))


def refit_windows(count: int, window: int, config: MinifyConfig, ranks: int = 1) -> list[int]:
    """Which of `count` calibration windows run through the refit sweep: evenly spread, the same in every process."""
    if not config.refit_sweep:
        return []
    return spread(count, correction_count(count, window, ranks) if config.corrects else count)


def make_batches(windows: Tensor, config: MinifyConfig, batch: int, ranks: Ranks) -> Batches:
    """This process's share of calibration windows (N, L), `batch` of them at once.

    Which windows share a micro-batch, and their order, do not depend on how units are refitted. Records of an
    unfinished sweep, one tensor per micro-batch, then serve a run with another method (`reuse`).
    """
    count, window = windows.shape
    corrected = set(spread(count, correction_count(count, window, ranks.size)))
    scored = set(spread(count, config.saliency_windows or count))
    ids: list[Tensor] = []
    flags: list[bool] = []
    num_corrected = shared = 0
    for kind in ((True, True), (True, False), (False, True), (False, False)):
        rows = [row for row in range(count) if (row in corrected, row in scored) == kind]
        # The next process goes on where the kind before has ended, so that no process is left without windows.
        mine = rows[(ranks.rank - shared) % ranks.size :: ranks.size]
        shared += len(rows)
        found = [part for part in windows[mine].split(batch) if len(part)]
        ids += found
        flags += [kind[1]] * len(found)
        num_corrected += kind[0] * len(found)
    num_refit = 0 if not config.refit_sweep else num_corrected if config.corrects else len(ids)
    return Batches(ids, flags, num_refit)
