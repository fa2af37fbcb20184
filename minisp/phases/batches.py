"""Which calibration windows run through which sweep, in micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minisp.config import MinifyConfig
from minisp.ranks import Ranks
from minisp.text.windows import spread

# A window passes a corrected layer twice, in the dense and in the pruned model, beside the drift's sums. From twice so
# many tokens on, every second window has to do, which bounds what the correction adds to a run. With 8192 instead of
# 16384 tokens, SmolLM2-135M at 80 % has ×1.227 or ×1.235 of its perplexity (the even or the odd windows) instead of
# ×1.226, in half the time.
FEW_TOKENS = 8192


@dataclass(frozen=True)
class Batches:
    """One process's micro-batches.

    Attributes:
        ids: windows (B, L) int64 of each; those of the heal sweep come first.
        scored: whether saliency is computed on each; the others only add to the Gram matrices.
        heals: how many of them run through the heal sweep.
    """

    ids: Sequence[Tensor]
    scored: Sequence[bool]
    heals: int

    @classmethod
    def scoring(cls, ids: Sequence[Tensor]) -> "Batches":
        """Micro-batches that saliency is computed on, none of them for the heal sweep."""
        return cls(ids, [True] * len(ids), 0)

    @property
    def healed(self) -> Sequence[Tensor]:
        """Those of the heal sweep."""
        return self.ids[: self.heals]


def heal_count(count: int, window: int, ranks: int = 1) -> int:
    """On how many of the calibration windows a correction is made: at least one for every process."""
    return min(count, max(-(-count // 2), -(-FEW_TOKENS // window), ranks))


def heal_windows(count: int, window: int, config: MinifyConfig, ranks: int = 1) -> list[int]:
    """The rows of `count` calibration windows that run through the heal sweep, evenly spread: the same for everyone."""
    if not config.heals:
        return []
    return spread(count, heal_count(count, window, ranks) if config.inputs == "both" else count)


def make_batches(windows: Tensor, config: MinifyConfig, batch: int, ranks: Ranks) -> Batches:
    """This process's share of calibration windows (N, L), `batch` of them at once.

    Which windows share a micro-batch, and their order, do not depend on how units are refitted. Records of an
    unfinished sweep, one tensor per micro-batch, then serve a run with another method (`reuse`).
    """
    count, window = windows.shape
    corrected = set(spread(count, heal_count(count, window, ranks.size)))
    scored = set(spread(count, config.saliency_windows or count))
    ids: list[Tensor] = []
    flags: list[bool] = []
    num_corrected = 0
    for kind in ((True, True), (True, False), (False, True), (False, False)):
        rows = [row for row in range(count) if (row in corrected, row in scored) == kind]
        found = [part for part in ranks.share(windows[rows]).split(batch) if len(part)]
        ids += found
        flags += [kind[1]] * len(found)
        num_corrected += kind[0] * len(found)
    heals = {"both": num_corrected, "pruned": len(ids)}.get(config.inputs, 0) if config.heals else 0
    return Batches(ids, flags, heals)
