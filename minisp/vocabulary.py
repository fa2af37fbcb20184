"""Embeddings and head that stay on disk: rows are looked up, the loss is computed a block of the vocabulary at a time.

With h (T, d) the input of the head, W (V, d) its weight and z = h Wᵀ the logits, two passes over blocks of W give,
without ever holding (T, V) values (the first: Milakov & Gimelshein, 2018, "Online normalizer calculation for softmax"):

    lse_t = log Σ_v exp z_tv,    loss = Σ_t lse_t − z_t,target,
    ∂loss/∂h_t = Σ_v (exp(z_tv − lse_t) − 1[v = target]) W_v

Work: 6·T·V·d FLOPs where a resident head takes 4, since the logits are formed twice; V·d elements are read twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minisp.architecture import CausalLM
from minisp.checkpoint import Checkpoint
from minisp.errors import UnsupportedModelError
from minisp.files import helper_thread

# Float32 logits of one block: they, their 16-bit copy and the rows of W are what a block needs.
BLOCK_BYTES = 32 * 2**20


class StreamedVocabulary:
    """Stands in for a model's embedding and head, whose weights are never in memory whole.

    The embedding module looks its rows up on disk; the head module passes its input on, so that the model's own
    forward ends with h in place of the logits.

    Attributes:
        names: the model's parameters that must not be read.
    """

    def __init__(self, checkpoint: Checkpoint, model: CausalLM, device: torch.device, dtype: torch.dtype):
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise UnsupportedModelError(
                "Head: expected one without a bias to leave on disk, got one with a bias. Allow more memory "
                "(host_memory), so that it is held."
            )
        weights = (embedding.weight, head.weight)
        self.names = {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if any(parameter is weight for weight in weights)
        }
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._embedding = self._stored_name(model, embedding)
        self._head = self._stored_name(model, head)
        place = checkpoint.tensors[self._head]
        self._num_rows, self._row_bytes = place.shape[0], place.num_bytes // place.shape[0]
        self._thread = helper_thread("minisp-vocabulary")
        embedding.forward = self._look_up
        head.forward = nn.Identity().forward

    def loss_gradient(self, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        """Summed negative log likelihood (nats), and its gradient with respect to the head's input.

        Args:
            hidden: h (T, d).
            targets: (T,) int64.

        Returns:
            The loss, and the gradient (T, d) float32.
        """
        maximum = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)
        total, score = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for start, rows in self._blocks(len(hidden)):
            logits = (hidden @ rows.T).float()
            maximum, _ = _raise_maximum(logits, maximum, total)
            place, inside = _places(targets, start, len(rows))
            score += logits.gather(1, place)[:, 0].where(inside, 0)
        lse = maximum + total.log_()
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for start, rows in self._blocks(len(hidden)):
            share = (hidden @ rows.T).float().sub_(lse[:, None]).exp_()
            place, inside = _places(targets, start, len(rows))
            share.scatter_add_(1, place, -inside[:, None].float())
            gradient += share.to(self._dtype) @ rows
        return float((lse - score).sum(dtype=torch.float64)), gradient

    def divergences(self, wanted: Tensor, others: Sequence[Tensor]) -> list[float]:
        """Σ_t KL(softmax z_t ‖ softmax z'_t), in nats, of the head's logits z for `wanted` and z' for each of `others`.

        One pass over the vocabulary: KL = Σ_v p_v (z_v − z'_v) − lse z + lse z', each sum kept relative to the largest
        logit so far.

        Args:
            wanted, others: head inputs (T, d).
        """
        best = [hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32) for hidden in (wanted, *others)]
        total = [torch.zeros_like(maximum) for maximum in best]
        gap = [torch.zeros_like(maximum) for maximum in best[1:]]
        for _, rows in self._blocks(len(wanted)):
            logits = (wanted @ rows.T).float()
            best[0], kept = _raise_maximum(logits, best[0], total[0])
            share = (logits - best[0][:, None]).exp_()
            for place, hidden in enumerate(others):
                theirs = (hidden @ rows.T).float()
                best[place + 1], _ = _raise_maximum(theirs, best[place + 1], total[place + 1])
                gap[place].mul_(kept).add_((share * (logits - theirs)).sum(1))
        lse = [maximum + part.log() for maximum, part in zip(best, total, strict=True)]
        found = [g / total[0] - lse[0] + other for g, other in zip(gap, lse[1:], strict=True)]
        return [float(kl.sum(dtype=torch.float64)) for kl in found]

    def _stored_name(self, model: CausalLM, module: Any) -> str:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied = model.all_tied_weights_keys.get(name, name) if model.config.tie_word_embeddings else name
            if parameter is module.weight and name == tied:
                return self._checkpoint.stored_name(name, model.base_model_prefix)
        raise AssertionError("the weight is a parameter of the model")

    def _look_up(self, ids: Tensor) -> Tensor:
        rows, inverse = ids.unique(return_inverse=True)
        found = self._checkpoint.read_rows(self._embedding, rows.tolist())
        return found.to(self._device, self._dtype)[inverse]

    def _blocks(self, num_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows (v, d)) of the head, the next block being read meanwhile."""
        step = max(1, BLOCK_BYTES // max(4 * num_tokens, self._row_bytes))
        starts = range(0, self._num_rows, step)

        def read(start: int) -> Tensor:
            return self._checkpoint.read_rows(self._head, range(start, min(start + step, self._num_rows)))

        reading = self._thread.submit(read, 0)
        for start in starts:
            rows = reading.result()
            if start + step < self._num_rows:
                reading = self._thread.submit(read, start + step)
            yield start, rows.to(self._device, self._dtype)


def _raise_maximum(logits: Tensor, maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Take a block of logits (T, v) into `total` (T,), exponentials over that of the maximum (T,), in place.

    Returns:
        The new maximum, and the factor by which older sums shrank.
    """
    higher = torch.maximum(maximum, logits.amax(1))
    factor = (maximum - higher).exp_()
    total.mul_(factor).add_((logits - higher[:, None]).exp_().sum(1))
    return higher, factor


def _places(targets: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Where the targets lie in a block of the vocabulary: column (T, 1), and whether they do (T,)."""
    place = targets - start
    inside = (place >= 0) & (place < count)
    return place.clamp(0, count - 1)[:, None], inside
