"""Trial cuts: cut each structure alone, and measure the KL divergence of the model's output.

Scores compare the units of one structure well, and structures less well: they are a second-order estimate around the
dense model, for units that go without a refit, from the gradients of single labels. So every structure i is tried once:
the units P_i with the least saliency, a third of them, are cut and the rest refitted, and

    r_i = mean over tokens of KL(dense ‖ i cut) / Σ_{j ∈ P_i} s_j

turns its scores into nats. One ranking of r_i·s_j over all structures then sets their sizes, which takes for granted
that the costs of structures add up. On SmolLM2-135M, r of the MLPs of the first seven layers is about 0.2, from layer
11 on 0.3 to 0.42.

All trials run in one forward sweep: the dense states pass a layer, so do those of the trials of the layers below, and
the trials of its own structures begin. Work: for n structures in L layers, n·L/2 layers for `trial_tokens`. The trials'
states wait in the scratch folder, where a run that was stopped finds those of the last layer that was finished.

Shapes: B windows, L tokens per window, d hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.methods.reconstruction import refit
from minisp.models.edits import rewrite, tried
from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.models.vocabulary import BLOCK_BYTES
from minisp.phases.run import Phase, Run, naming
from minisp.phases.sizes import HELD, Demand, Sizes, blas_bytes, refit_bytes, solve_flops
from minisp.store.names import Record
from minisp.text.windows import spread

# Keys of the trials' record: the dense model's states, and the saliency that each trial has removed so far.
DENSE, REMOVED = "dense", "removed"
# Tokens that trials run on. On other 2048 tokens, most ratios of SmolLM2-135M agreed within a tenth.
TRIAL_TOKENS = 2048
FEWEST_TRIAL_TOKENS = 512
# The head is the dearer half of a trial: only at every second token is its output compared.
TRIAL_STRIDE = 2
# Trials whose states are in memory at once, while their outputs are compared with the dense model's.
COMPARED_AT_ONCE = 8
# Deep enough to stand clear of rounding in bfloat16.
TRIAL_CUT = 1 / 3
# A ratio further than this from the median is taken for an accident of the text.
LARGEST_FACTOR = 8.0


def trial_ratios(
    stream: Stream, windows: Tensor, scores: Sequence[Tensor], config: MinifyConfig, run: Run
) -> list[float]:
    """`measure_ratios`, run by the first process of a run; a record of its own, which the others read."""
    name = Record.RATIOS.value

    def make() -> tuple[dict[str, Tensor], dict[str, float]]:
        return {name: torch.tensor(measure_ratios(stream, windows, scores, config, run), dtype=torch.float64)}, {}

    run.once(name, make)
    found: list[float] = run.shared.read(name, name).tolist()
    return found


@torch.no_grad()
def measure_ratios(
    stream: Stream, windows: Tensor, scores: Sequence[Tensor], config: MinifyConfig, run: Run
) -> list[float]:
    """r_i of every structure, in nats per unit of saliency.

    Args:
        windows: (N, L) calibration windows; a few, spread evenly, are used.
        scores: per structure (u_i,) saliency.
        run: holds the statistics of every structure, Gram matrices included.

    Raises:
        NumericalError: a ridge system cannot be solved.
    """
    tokens = trial_tokens(windows.numel(), len(scores))
    ids = windows[spread(len(windows), max(1, tokens // windows.shape[1])), :tokens]
    dense, removed = _run_trials(stream, ids, scores, config, run)
    own, last = run.own, Record.TRIALS.of(len(stream.layers))
    measured: list[float] = []
    few = slice(None, None, TRIAL_STRIDE)
    for start in range(0, len(scores), COMPARED_AT_ONCE):
        names = map(str, range(start, min(start + COMPARED_AT_ONCE, len(scores))))
        trials = [own.read(last, name)[:, few] for name in names]
        measured += divergences(stream, dense[:, few], trials, ids[:, few])
    own.drop(last)
    own.forget()
    return ratios(measured, removed)


def _run_trials(
    stream: Stream, ids: Tensor, scores: Sequence[Tensor], config: MinifyConfig, run: Run
) -> tuple[Tensor, list[float]]:
    """Leave the states behind the last layer of every trial; gives the dense model's, and the saliency removed."""
    own, size, count = run.own, stream.state_bytes(ids), len(stream.layers)
    first = max((index for index in range(count + 1) if own.has(Record.TRIALS.of(index))), default=0)
    dense = own.read(Record.TRIALS.of(first), DENSE) if first else stream.embed(ids)
    removed: list[float] = list(own.facts(Record.TRIALS.of(first))[REMOVED]) if first else []
    for segment in stream.visit([range(index, index + 1) for index in range(first, count)]):
        index, calls, before = segment.start, stream.calls(ids), len(removed)
        mine = [place for place, structure in enumerate(stream.structures) if structure.layer == index]
        cuts = {place: _trial_units(scores[place]) for place in mine}
        removed += [float(scores[place].sum() - scores[place][kept].sum()) for place, kept in cuts.items()]
        sizes = [size] * (len(removed) + 1)
        keeping = own.writing(Record.TRIALS.of(index + 1), sizes=sizes, **{REMOVED: removed})
        with keeping as append, fast_layers(stream.model):
            for trial in range(before):
                states = own.read(Record.TRIALS.of(index), str(trial), ahead=True)
                append(str(trial), stream.run_layer(index, states, calls))
            for place, kept in cuts.items():
                structure = stream.structures[place]
                edit = rewrite(structure, _trial_weight(stream, structure, kept, config, run))
                with tried(stream.layers[index], [edit]):
                    append(str(place), stream.run_layer(index, dense, calls))
            dense = stream.run_layer(index, dense, calls)
            append(DENSE, dense)
        own.drop(Record.TRIALS.of(index))
        if own.due:
            # Without the other processes, which wait for the ratios.
            own.save(Record.TRIALS.of(index + 1))
            own.forget(Record.TRIALS.of(index + 1))
        run.progress(Phase.TRIALS, index + 1, count)
    return dense, removed


def _trial_units(scores: Tensor) -> Tensor:
    """The units (n,) that stay in a trial, sorted."""
    order = scores.argsort(descending=True, stable=True)
    return order[: len(order) - max(1, int(TRIAL_CUT * len(order)))].sort().values.cpu()


def trial_tokens(tokens: int, num_trials: int) -> int:
    """On how many tokens to try: with many trials and few calibration tokens, they would cost more than the sweeps."""
    return min(TRIAL_TOKENS, max(FEWEST_TRIAL_TOKENS, tokens // num_trials), tokens)


def ratios(measured: Sequence[float], removed: Sequence[float]) -> list[float]:
    """measured / removed, kept within a factor of the median; where nothing was removed, the median."""
    raw = torch.tensor([kl / score if score > 0 else float("nan") for kl, score in zip(measured, removed, strict=True)])
    median = raw.nanmedian()
    if not median > 0:
        return [1.0] * len(raw)
    bounded = raw.clamp(median / LARGEST_FACTOR, median * LARGEST_FACTOR)
    return [float(ratio) for ratio in torch.where(raw.isnan(), median, bounded)]


def divergences(stream: Stream, dense: Tensor, trials: Sequence[Tensor], ids: Tensor) -> list[float]:
    """Mean KL(dense ‖ trial) of the next-token distributions, in nats per token; states (B, L, d) behind all layers."""
    if stream.vocabulary is not None:
        flat = [stream.logits(states, ids).flatten(0, 1) for states in (dense, *trials)]
        return [total / ids.numel() for total in stream.vocabulary.divergences(flat[0], flat[1:])]
    totals = [0.0] * len(trials)
    step = stream.chunk(len(ids))
    for start in range(0, ids.shape[1], step):
        part = slice(start, start + step)
        wanted = stream.logits(dense[:, part], ids[:, part]).float()
        probability, normaliser = wanted.softmax(-1), wanted.logsumexp(-1)
        for place, trial in enumerate(trials):
            # KL = lse z' − lse z − Σ_v p_v (z'_v − z_v)
            got = stream.logits(trial[:, part], ids[:, part]).float()
            found = got.logsumexp(-1) - normaliser - got.sub_(wanted).mul_(probability).sum(-1)
            totals[place] += float(found.sum(dtype=torch.float64))
            del got
    return [total / ids.numel() for total in totals]


def _trial_weight(stream: Stream, structure: Structure, kept: Tensor, config: MinifyConfig, run: Run) -> Tensor:
    """The refitted weight (d, u·c) of the consumer at full width, zero where units are removed."""
    weight, columns = stream.weight(structure), structure.columns_of(kept)
    found = run.statistics(structure, gram=True, device=stream.device)
    assert found.gram is not None
    with naming(structure):
        fitted, _ = refit(found.gram, columns, weight, found.num_tokens, config, residuals=False)
    whole = torch.zeros_like(weight)
    whole[:, columns.to(whole.device)] = fitted.to(whole)
    return whole


def demand(sizes: Sizes, stream_vocabulary: bool) -> Demand:
    """What the trials take: a refit at two thirds of the width; a run with zeros at full width; outputs compared."""
    if not sizes.config.measures:
        return Demand()
    count, layers, item = len(sizes.structures), sizes.num_layers, sizes.item
    tokens = trial_tokens(sizes.all_tokens, count)
    states, weight = sizes.states(tokens), sizes.stored_item * sizes.hidden * sizes.width
    in_memory = 0 if sizes.writes else (count + 1) * states
    passing = {"activations": tokens * (4 * item * sizes.width + 6 * 4 * sizes.hidden)}
    solving = refit_bytes(sizes, sizes.width - int(TRIAL_CUT * sizes.width))
    logits = min(sizes.logits, 4 * tokens * sizes.vocabulary)
    compared = (6 + 2) * BLOCK_BYTES if stream_vocabulary else 4 * logits + logits // 2
    memory = {
        Phase.TRIALS: {HELD: 2 * in_memory, "states": 4 * states, "trial weights": 2 * weight}
        | max(solving, passing, key=lambda part: sum(part.values())),
        Phase.TRIAL_OUTPUTS: {
            "buffers of the BLAS": blas_bytes(sizes.width),
            HELD: in_memory,
            "states": (COMPARED_AT_ONCE + 2) * states,
            "logits": compared,
        },
    }
    # At a layer run the trials of the layers below, its own and the dense model: for n structures, n(L + 1)/2 + L
    # layers in all. The head takes every second token of all trials and of the dense model.
    passes = count * (layers + 1) / layers + 2
    return Demand(
        memory=memory,
        waiting=2 * (count + 1) * states,
        # The states of every trial below a layer pass it.
        passed=layers * (count + 2) * states,
        flops=tokens * (passes * sizes.inside + (count + 1) * sizes.vocabulary * sizes.hidden),
        solve_flops=sum(solve_flops(x.width, 1 - TRIAL_CUT, sizes.hidden) for x in sizes.structures)
        if sizes.config.reconstruct
        else 0.0,
    )
