"""How much of a layer's saliency is real: cutting each layer alone, and measuring what that does to the model's output.

Scores compare the units of one layer well, and layers less well: they are a second-order estimate around the dense
model, for units that go without a refit, from the gradients of single labels. So every layer l is tried once: the
units P_l with the least saliency, a third of them, are cut and the rest refitted, and

    r_l = mean over tokens of KL(dense ‖ l cut) / Σ_{j ∈ P_l} s_j

turns its scores into nats. One ranking of r_l·s_j over all layers then sets the widths, which takes for granted that
the costs of layers add up. On SmolLM2-135M, r of the first seven layers is about 0.2, from layer 11 on 0.3 to 0.42.

All trials run in one forward sweep: at layer l the dense states pass, so do those of the l trials of the layers below,
and a new trial begins. Work: L²/2 layers for `trial_tokens`; the trials' states wait in the scratch folder, where a run
that was stopped finds those of the last layer that was finished.

Shapes: B windows, L tokens per window, d hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minisp.config import MinifyConfig
from minisp.methods.reconstruction import reconstruct
from minisp.models.families import other_down
from minisp.models.layers import fast_layers
from minisp.models.stream import Stream
from minisp.phases.run import Workplace, record
from minisp.text.windows import spread

RATIOS = "ratios"
# Of the record of the trials: the dense states beside theirs, and the saliency that every trial so far has removed.
DENSE, REMOVED = "dense", "removed"
# With other windows of so many tokens, most ratios of SmolLM2-135M were the same within a tenth.
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


def layer_ratios(
    stream: Stream, windows: Tensor, scores: Sequence[Tensor], config: MinifyConfig, work: Workplace
) -> list[float]:
    """`measure_ratios`, run by the first process of a run; a record of its own, which the others read."""
    if work.ranks.first and not work.shared.has(RATIOS):
        measured = measure_ratios(stream, windows, scores, config, work)
        with work.shared.writing(RATIOS) as append:
            append(RATIOS, torch.tensor(measured, dtype=torch.float64))
        work.shared.settle()
    work.ranks.wait()
    found: list[float] = work.shared.read(RATIOS, RATIOS).tolist()
    return found


@torch.no_grad()
def measure_ratios(
    stream: Stream, windows: Tensor, scores: Sequence[Tensor], config: MinifyConfig, work: Workplace
) -> list[float]:
    """r_l of every layer, in nats per unit of saliency.

    Args:
        windows: (N, L) calibration windows; a few, spread evenly, are used.
        scores: per layer (m_l,) saliency.
        work: holds the statistics of every layer, Gram matrices included.

    Raises:
        NumericalError: a ridge system cannot be solved.
    """
    count = len(scores)
    tokens = trial_tokens(windows.numel(), count)
    ids = windows[spread(len(windows), max(1, tokens // windows.shape[1])), :tokens]
    own, size = work.own, stream.state_bytes(ids)
    first = max((index for index in range(count + 1) if own.has(record("trials", index))), default=0)
    dense = own.read(record("trials", first), DENSE) if first else stream.embed(ids)
    removed: list[float] = list(own.facts(record("trials", first))[REMOVED]) if first else []
    for segment in stream.visit([range(index, index + 1) for index in range(first, count)]):
        index, calls = segment.start, stream.calls(ids)
        order = scores[index].argsort(descending=True, stable=True)
        kept = order[: len(order) - max(1, int(TRIAL_CUT * len(order)))].sort().values.cpu()
        removed.append(float(scores[index].sum() - scores[index][kept].sum()))
        keeping = own.writing(record("trials", index + 1), sizes=[size] * (index + 2), **{REMOVED: removed})
        with keeping as append, fast_layers(stream.model):
            for trial in range(index):
                states = own.read(record("trials", index), str(trial), ahead=True)
                append(str(trial), stream.run_layer(index, states, calls))
            with other_down(stream.layers[index], stream.row, _trial_down(stream, index, kept, config, work)):
                append(str(index), stream.run_layer(index, dense, calls))
            dense = stream.run_layer(index, dense, calls)
            append(DENSE, dense)
        own.drop(record("trials", index))
        if own.due:
            # Without the other processes, which wait for the ratios.
            own.save(record("trials", index + 1))
            own.forget(record("trials", index + 1))
        work.progress("trial cuts", index + 1, count)
    measured: list[float] = []
    few = slice(None, None, TRIAL_STRIDE)
    for start in range(0, count, COMPARED_AT_ONCE):
        names = map(str, range(start, min(start + COMPARED_AT_ONCE, count)))
        trials = [own.read(record("trials", count), name)[:, few] for name in names]
        measured += divergences(stream, dense[:, few], trials, ids[:, few])
    own.drop(record("trials", count))
    own.forget()
    return ratios(measured, removed)


def trial_tokens(tokens: int, num_layers: int) -> int:
    """On how many tokens to try: on a deep model and few calibration tokens, trials would cost more than the sweeps."""
    return min(TRIAL_TOKENS, max(FEWEST_TRIAL_TOKENS, tokens // num_layers), tokens)


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
    step = max(1, stream.logit_bytes // (4 * stream.model.config.vocab_size * len(ids)))
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


def _trial_down(stream: Stream, index: int, kept: Tensor, config: MinifyConfig, work: Workplace) -> Tensor:
    """The refitted down projection (d, m) at full width, zero where units are removed."""
    weight = stream.down_weight(index)
    statistics = work.statistics(index, gram=True, device=stream.device)
    result = reconstruct(index, statistics, kept, weight, config, residuals=False)
    down = torch.zeros_like(weight)
    assert result.down is not None
    down[:, kept.to(down.device)] = result.down.to(down)
    return down
