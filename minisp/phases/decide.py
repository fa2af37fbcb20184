"""The decision: which units of every structure stay, from the statistics that the saliency sweep has left."""

from collections.abc import Sequence

from torch import Tensor

from minisp.config import MinifyConfig
from minisp.methods.selection import Candidate, allocate, default_alignment, select
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.phases.run import Run
from minisp.phases.trials import trial_ratios


def decide(stream: Stream, windows: Tensor, config: MinifyConfig, run: Run) -> list[Tensor]:
    """The units (n,) int64 sorted of every structure that stay.

    Args:
        windows: (N, L) calibration windows, for trial cuts.

    Raises:
        NumericalError: a ridge system of a trial cut cannot be solved.
        ConfigError: no sizes satisfy keep, alignment and bounds.
    """
    scores = [run.statistics(structure, gram=False).score(config.saliency) for structure in stream.structures]
    if config.measures:
        ratios = trial_ratios(stream, windows, scores, config, run)
        scores = [score * ratio for score, ratio in zip(scores, ratios, strict=True)]
    return select(scores, kept_sizes(stream.structures, scores, config))


def kept_sizes(structures: Sequence[Structure], scores: Sequence[Tensor], config: MinifyConfig) -> list[int]:
    """How many units of each structure stay, by these scores (u,) of each.

    Raises:
        ConfigError: as for `allocate`.
    """
    uniform = config.widths == "uniform"
    candidates = [
        Candidate(score, x.parameters, step_of(x, structures, config), x.name if uniform else str(x))
        for x, score in zip(structures, scores, strict=True)
    ]
    return allocate(candidates, config.keep, min_keep=config.min_keep)


def step_of(structure: Structure, structures: Sequence[Structure], config: MinifyConfig) -> int:
    """In multiples of how many units a structure is kept: an equal number of heads, or aligned units, per device."""
    if structure.name != "mlp":
        return config.tp
    widths = [x.num_units for x in structures if x.name == "mlp"]
    return config.tp * (config.alignment or default_alignment(min(widths)))
