"""Zeros in the linear maps: which weights go over all maps at once, and how the others make up for it, shot by shot.

A shot is a curvature sweep over the model as it is, a decision, and an update of every map. The weights after each
shot are records; the stream puts them in place when it reads a layer. The Surgeon's rules are those of
`minisp.methods.surgeon`; SparseGPT, Wanda and magnitude take one shot, see `minisp.methods.sparse`.

Shapes: W (R, C) of a map; where it has a bias, the Surgeon counts it as one more column, the last one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minisp.config import MinifyConfig, group_of
from minisp.methods import surgeon
from minisp.methods.curvature import Curvature
from minisp.methods.sparse import SparsityFacts, least, magnitude_scores, sparsegpt, sparsity_facts, wanda_scores
from minisp.methods.thresholds import CostHistogram, LineScores, line_threshold, linear_shots
from minisp.models.edits import Edit, apply_
from minisp.models.maps import LinearMap
from minisp.models.stream import Stream
from minisp.phases.boundaries import Sweep
from minisp.phases.curvature import curvature_sweep, curvatures, factor_name, input_factor
from minisp.phases.run import Phase, Run, naming
from minisp.phases.sizes import Demand, Sizes, blas_bytes
from minisp.store.names import Record


def sparsify(sweep: Sweep, segments: Sequence[range], maps: Sequence[LinearMap], config: MinifyConfig) -> None:
    """Leave the new weights of every map; a model in memory gets them at once.

    Args:
        sweep: over the calibration windows; magnitude needs none of them.
        segments: consecutive layers held together, in forward order; they cover all layers.

    Raises:
        NumericalError: a factor cannot be inverted.
    """
    stream, run = sweep.stream, sweep.run
    for number, share in enumerate(linear_shots(1 - config.keep, config.shots)):
        shot = _Shot(stream, run, maps, number, share, config)
        if number:
            stream.edits = shot.edits
        if run.ranks.most(any(not run.shared.has(sparse_name(x, number + 1)) for x in maps)):
            if config.method != "magnitude":
                curvature_sweep(sweep, segments, maps, number)
            shot.update_all()
        if run.ranks.first:
            for found in maps:
                for name in (factor_name(found.input, number), factor_name(found.output_gradient, number)):
                    run.shared.drop(name)
                run.shared.drop(sparse_name(found, number))
        run.ranks.wait()


def sparse_name(found: LinearMap, shot: int) -> str:
    """The name of the record of a map's weight after so many shots."""
    return Record.SPARSE.of(found.layer, f"{shot}.{found.path}")


def sparse_edits(run: Run, maps: Sequence[LinearMap], shot: int, index: int) -> list[Edit]:
    """What becomes of the parameters of a layer after so many shots."""
    named = [(found, sparse_name(found, shot)) for found in maps if found.layer == index]
    return [
        Edit(f"{found.path}.{key}", 0, None, run.shared.read(name, key))
        for found, name in named
        for key in run.shared.keys(name)
    ]


@dataclass(frozen=True)
class Sparse:
    """What became of one linear map.

    Attributes:
        facts: what is true of its zeros.
        cost: what the last shot costs by its curvature, in nats a token; None of methods without one.
    """

    found: LinearMap
    facts: SparsityFacts
    cost: float | None


def sparse_results(run: Run, maps: Sequence[LinearMap], shots: int) -> list[Sparse]:
    """What became of every map after so many shots."""
    facts = [run.shared.facts(sparse_name(found, shots)) for found in maps]
    return [Sparse(x, SparsityFacts(**f["sparsity"]), f["cost"]) for x, f in zip(maps, facts, strict=True)]


@dataclass(frozen=True)
class _Shot:
    """One shot.

    Attributes:
        number: of shots before it; its records of weights are those after `number + 1`.
        share: of the weights that are gone after it.
    """

    stream: Stream
    run: Run
    maps: Sequence[LinearMap]
    number: int
    share: float
    config: MinifyConfig

    def edits(self, index: int) -> list[Edit]:
        """What the shots before this one made of a layer's parameters."""
        return sparse_edits(self.run, self.maps, self.number, index)

    def update_all(self) -> None:
        """Update every map that an earlier run has not."""
        run = self.run
        threshold = self._threshold() if self.config.method == "surgeon" else torch.inf
        mine = [self.maps[place] for place in run.ranks.share(range(len(self.maps)))]
        left = [found for found in mine if not run.shared.has(sparse_name(found, self.number + 1))]
        for done, (found, weight, cost) in enumerate(self._updated(left, threshold)):
            self._keep(found, weight, cost)
            run.progress(f"{Phase.UPDATE}, shot {self.number + 1} of {self.config.shots}", done + 1, len(left))
        run.shared.settle()
        run.ranks.wait()

    def _threshold(self) -> float:
        """The cost up to which weights, or rows and columns, go: decided once, over all maps."""
        if self._grouped and self.number + 1 == self.config.shots:
            # All that the groups let go.
            return torch.inf
        name = Record.THRESHOLD.of(self.number)
        decide = self._line_threshold if self.config.pattern == "rows-columns" else self._element_threshold
        self.run.once(name, lambda: ({"threshold": torch.tensor(decide(), dtype=torch.float64)}, {}))
        return float(self.run.shared.read(name, "threshold"))

    def _element_threshold(self) -> float:
        histogram = CostHistogram()
        for found, curvature in self._scored():
            with naming(found):
                costs = self._costs(found, curvature, self._weight(found, bias=True))
                histogram.update_(costs[self._candidates(costs)])
        return histogram.threshold(self.share / (1 - self.config.keep) if self._grouped else self.share)

    def _line_threshold(self) -> float:
        scores = []
        for found, curvature in self._scored():
            with naming(found):
                scores.append(self._line_scores(found, curvature, self._weight(found, bias=True)))
        return line_threshold(scores, self.share)

    def _scored(self) -> Iterator[tuple[LinearMap, Curvature]]:
        for done, pair in enumerate(self._curvatures(self.maps)):
            yield pair
            phase = f"{Phase.UPDATE}, costs of shot {self.number + 1} of {self.config.shots}"
            self.run.progress(phase, done + 1, len(self.maps))

    def _curvatures(self, maps: Sequence[LinearMap]) -> Iterator[tuple[LinearMap, Curvature]]:
        return curvatures(self.run, maps, self.number, self.config, self.stream.device)

    @property
    def _grouped(self) -> bool:
        return group_of(self.config.pattern) is not None

    def _costs(self, found: LinearMap, curvature: Curvature, weight: Tensor) -> Tensor:
        """What each weight (R, C) costs, the bias left out: it never goes."""
        return surgeon.element_costs(curvature, weight)[:, : found.columns].float()

    def _candidates(self, costs: Tensor) -> Tensor:
        """The weights (R, C) bool that the pattern lets go; what went before costs nothing, and so is among them."""
        return least(costs, self.config.pattern, 0.0) if self._grouped else torch.ones_like(costs, dtype=torch.bool)

    def _line_scores(self, found: LinearMap, curvature: Curvature, weight: Tensor) -> LineScores:
        rows, columns = (torch.arange(size, device=weight.device)[:, None] for size in (found.rows, found.columns))
        return LineScores(surgeon.row_costs(curvature, weight, rows), surgeon.column_costs(curvature, weight, columns))

    def _updated(self, maps: Sequence[LinearMap], threshold: float) -> Iterator[tuple[LinearMap, Tensor, float | None]]:
        """Each map's new weight, (R, C) or with its bias (R, C + 1), and what the change costs in nats a token."""
        if self.config.method != "surgeon":
            for found in maps:
                with naming(found):
                    yield found, self._masked(found), None
            return
        tokens = self.config.num_windows * self.config.window
        for found, curvature in self._curvatures(maps):
            old = self._weight(found, bias=True)
            with naming(found):
                new = self._operated(found, curvature, old, threshold)
                cost = surgeon.change_cost(curvature, old, new) / tokens
            yield found, new, cost

    def _operated(self, found: LinearMap, curvature: Curvature, weight: Tensor, threshold: float) -> Tensor:
        """The Surgeon's new weight (R, C), with the bias's column where there is one."""
        if self.config.pattern == "rows-columns":
            rows_gone, columns_gone = self._line_scores(found, curvature, weight).removed(threshold)
            bias_stays = columns_gone.new_zeros(weight.shape[1] - found.columns)
            rows, columns = ((~gone).nonzero().flatten() for gone in (rows_gone, torch.cat([columns_gone, bias_stays])))
            if len(rows) == 0 or len(columns) == 0:
                return torch.zeros_like(weight)
            block = surgeon.update_lines(curvature, weight, rows, columns)
            return surgeon.scatter(block, rows, columns, (weight.shape[0], weight.shape[1]))
        costs = self._costs(found, curvature, weight)
        removed = torch.zeros_like(weight, dtype=torch.bool)
        removed[:, : found.columns] = self._candidates(costs) & (costs <= threshold)
        return surgeon.update_elements(curvature, weight, removed)

    def _masked(self, found: LinearMap) -> Tensor:
        """The new weight (R, C) of a method that sees no gradients."""
        weight, pattern = self._weight(found, bias=False), self.config.pattern
        if self.config.method == "magnitude":
            return weight.masked_fill(least(magnitude_scores(weight), pattern, self.share), 0)
        inputs = input_factor(self.run, found, self.number, self.config, self.stream.device, bias=False)
        if self.config.method == "sparsegpt":
            return sparsegpt(inputs, weight, pattern, self.share)
        scores = wanda_scores(weight, inputs.squares)
        return weight.masked_fill(least(scores, pattern, self.share, by_row=True), 0)

    def _weight(self, found: LinearMap, *, bias: bool) -> Tensor:
        """W (R, C) in float32 as earlier shots left it; `bias`: with the bias's column where the map has one."""

        def read(key: str) -> Tensor:
            if self.number and self.stream.checkpoint is not None:
                return self.run.shared.read(sparse_name(found, self.number), key).to(self.stream.device)
            return self.stream.parameter(found.layer, f"{found.path}.{key}")

        weight = (read("weight").T if found.transposed else read("weight")).float()
        return torch.cat([weight, read("bias").float()[:, None]], 1) if bias and found.bias else weight

    def _keep(self, found: LinearMap, new: Tensor, cost: float | None) -> None:
        """Make a map's new weight a record, in the stored dtype; in a model in memory, its parameters."""
        weight, stream = new[:, : found.columns], self.stream
        dtype = stream.parameter(found.layer, found.weight).dtype
        values = {"weight": (weight.T if found.transposed else weight).to(dtype).contiguous()}
        if found.bias:
            bias = new[:, -1].to(dtype) if new.shape[1] > found.columns else None
            values["bias"] = stream.parameter(found.layer, f"{found.path}.bias") if bias is None else bias.contiguous()
        facts = asdict(sparsity_facts(weight.to(dtype), self.config.pattern))
        if stream.checkpoint is None:
            apply_(stream.layers[found.layer], [Edit(f"{found.path}.{k}", 0, None, v) for k, v in values.items()])
            values = {}
        with self.run.shared.writing(sparse_name(found, self.number + 1), sparsity=facts, cost=cost) as append:
            for key, tensor in values.items():
                append(key, tensor)


def demand(sizes: Sizes) -> Demand:
    """What the decisions and the updates of all shots take: inverses, and for single weights the steps of the update.

    Memory: the largest map's factors with their inverses, and what a step holds of its weight. Work of a map (R, C):
    see docs/surgeon-math.md; costs are computed twice, for the decision and for the update.
    """
    config = sizes.config
    largest = max(sizes.maps, key=lambda x: x.rows**2 + x.columns**2)
    square = largest.rows**2 + largest.columns**2
    wide = max(largest.rows, largest.columns)
    memory = {"weights": 4 * 8 * largest.rows * largest.columns, "buffers of the BLAS": blas_bytes(wide)}
    flops = 0.0
    if config.method == "surgeon":
        memory["factors"] = 4 * 2 * square + 4 * 2 * wide**2
        steps = 0 if config.pattern == "rows-columns" else surgeon.STEPS
        for x in sizes.maps:
            inverses, product = 7 / 3 * (x.rows**3 + x.columns**3), 2 * x.rows * x.columns * (x.rows + x.columns)
            flops += 2 * inverses + 2 * steps * product + 2 * product
    elif config.method != "magnitude":
        memory["factors"] = 4 * 3 * largest.columns**2
    if config.method == "sparsegpt":
        flops = sum(x.rows * x.columns**2 + 2 / 3 * x.columns**3 for x in sizes.maps)
    return Demand(memory={Phase.UPDATE: memory}, solve_flops=flops * config.shots)
