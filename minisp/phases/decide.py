"""The decision: which units of every structure stay, from the statistics that the saliency sweep has left."""

from collections.abc import Sequence
from math import lcm

import torch
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.methods.curvature import Curvature, Factor
from minisp.methods.selection import Candidate, allocate, default_alignment, select
from minisp.methods.surgeon import column_costs
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.phases.run import Phase, Run, naming
from minisp.phases.sizes import Demand, Sizes, blas_bytes
from minisp.phases.trials import trial_ratios


def decide(stream: Stream, windows: Tensor, config: MinifyConfig, run: Run) -> list[Tensor]:
    """The units (n,) int64 sorted of every structure that stay.

    Args:
        windows: (N, L) calibration windows, for trial cuts.

    Raises:
        NumericalError: a ridge system of a trial cut cannot be solved, or a curvature's factor not be inverted.
        ConfigError: no sizes satisfy keep, alignment and bounds.
    """
    scores = [_scores(stream, structure, config, run) for structure in stream.structures]
    if config.measures:
        ratios = trial_ratios(stream, windows, scores, config, run)
        scores = [score * ratio for score, ratio in zip(scores, ratios, strict=True)]
    sizes = kept_sizes(stream.structures, scores, config)
    return select(scores, sizes, [structure.groups for structure in stream.structures])


def _scores(stream: Stream, structure: Structure, config: MinifyConfig, run: Run) -> Tensor:
    """Saliency (u,) of a structure's units; with the Surgeon, what removing their columns of the consumer costs."""
    if config.method == "taylor":
        return run.statistics(structure, gram=False).score(config.saliency)
    weight = stream.weight(structure).float()
    found = run.statistics(structure, gram=True, outputs=len(weight), device=stream.device)
    assert found.gram is not None and found.gradients is not None and config.damping != "auto"
    with naming(structure):
        inputs, gradients = Factor.of_(found.gram, config.damping), Factor.of_(found.gradients, config.gradient_damping)
        curvature = Curvature.independent(inputs, gradients, found.num_scored)
        places = structure.columns_of(torch.arange(structure.num_units, device=stream.device))
        return column_costs(curvature, weight, places.view(-1, structure.columns)) / found.num_scored


def demand(sizes: Sizes) -> Demand:
    """What the Surgeon's costs take: a Gram matrix, what its inverse is made from, and products of the weight."""
    if sizes.config.method != "surgeon":
        return Demand()
    m, d = sizes.width, sizes.hidden
    memory = {
        "factors": 4 * (4 * m * m + 2 * d * d),
        "weights": 4 * 3 * m * d,
        "buffers of the BLAS": blas_bytes(m),
    }
    flops = sum(7 / 3 * x.width**3 + 2 * d * d * x.width for x in sizes.structures)
    return Demand(memory={Phase.DECISION: memory}, solve_flops=flops)


def kept_sizes(structures: Sequence[Structure], scores: Sequence[Tensor], config: MinifyConfig) -> list[int]:
    """How many units of each structure stay, by these scores (u,) of each.

    Raises:
        ConfigError: as for `allocate`.
    """
    uniform = config.widths == "uniform"
    candidates = [
        Candidate(score, x.parameters, step_of(x, structures, config), x.name if uniform else str(x), x.groups)
        for x, score in zip(structures, scores, strict=True)
    ]
    return allocate(candidates, config.keep, min_keep=config.min_keep)


def step_of(structure: Structure, structures: Sequence[Structure], config: MinifyConfig) -> int:
    """In multiples of how many units a structure is kept: an equal number of heads, or aligned units, per device."""
    if structure.name != "mlp":
        return lcm(config.tp, structure.groups)
    widths = [x.num_units for x in structures if x.name == "mlp"]
    return config.tp * (config.alignment or default_alignment(min(widths)))
