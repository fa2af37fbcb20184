"""The curvature sweep: Σ a aᵀ and Σ g gᵀ over calibration tokens, of the linear maps inside the layers.

It is a sweep like that for saliency, with taps on both sides of every linear map: its inputs a (T, C), which maps that
read the same input share, and the gradients g (T, R) of the summed loss at its outputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.methods.curvature import Curvature, Factor, FactorSum, with_bias
from minisp.models.maps import LinearMap, Tap, tapped
from minisp.phases.boundaries import Sweep
from minisp.phases.collection import Collection
from minisp.phases.run import Run, naming
from minisp.phases.sweep import sweep_layers
from minisp.store.names import Record


def curvature_sweep(sweep: Sweep, segments: Sequence[range], maps: Sequence[LinearMap], shot: int) -> None:
    """Leave a record of sums for the inputs of every map and, of scored windows, for its output gradients.

    Args:
        segments: consecutive layers held together, in forward order; they cover all layers.
        shot: which the sums are for.

    Raises:
        NumericalError: sums that are not finite.
    """
    stream = sweep.stream
    sizes = {tap: size for x in maps for tap, size in ((x.input, x.columns), (x.output_gradient, x.rows))}
    keys = [tap for tap in sizes if tap.side == "input" or any(sweep.batches.scored)]

    def watching(records: Mapping[Tap, FactorSum]) -> ExitStack:
        def told(found: LinearMap, x: Tensor, grad_y: Tensor | None) -> None:
            if found.path == found.source:
                records[found.input].update_(x)
            if grad_y is not None:
                records[found.output_gradient].update_(grad_y)

        stack = ExitStack()
        for layer in sorted({tap.layer for tap in records}):
            stack.enter_context(tapped(stream.layers[layer], [x for x in maps if x.layer == layer], told))
        return stack

    collection = Collection(
        what="curvature",
        keys=keys,
        name=lambda tap: factor_name(tap, shot),
        empty=lambda tap: FactorSum.empty(sizes[tap], stream.device),
        restored=lambda tap, read: FactorSum.from_tensors(read, stream.device),
        watch=watching,
    )
    sweep_layers(sweep, segments, collection)


def factor_name(tap: Tap, shot: int) -> str:
    """The name of the record of a tap's sums."""
    return Record.FACTOR.of(tap.layer, f"{shot}.{tap.path}.{tap.side}")


def curvatures(
    run: Run, maps: Sequence[LinearMap], shot: int, config: MinifyConfig, device: torch.device
) -> Iterator[tuple[LinearMap, Curvature]]:
    """The curvature of each map, from its records; maps that follow each other and read the same input share a factor.

    Raises:
        NumericalError: a diagonal that is negative or not finite.
    """
    known: tuple[Tap, bool] | None = None
    for found in maps:
        with naming(found):
            if (found.input, found.bias) != known:
                known, inputs = (found.input, found.bias), input_factor(run, found, shot, config, device)
            sums = _sums(run, found.output_gradient, shot, device)
            gradients = Factor.of_(sums.total, config.gradient_damping)
            yield found, Curvature.independent(inputs, gradients, sums.num_tokens)


def input_factor(
    run: Run, found: LinearMap, shot: int, config: MinifyConfig, device: torch.device, *, bias: bool = True
) -> Factor:
    """A of a map, damped; where the map has a bias, and `bias` is set, with the bias's place last."""
    sums = _sums(run, found.input, shot, device)
    total = with_bias(sums.total, sums.sums, sums.num_tokens) if found.bias and bias else sums.total
    assert config.damping != "auto"
    return Factor.of_(total, config.damping)


def _sums(run: Run, tap: Tap, shot: int, device: torch.device) -> FactorSum:
    name = factor_name(tap, shot)
    return FactorSum.from_tensors(lambda key: run.shared.read(name, key), device)
