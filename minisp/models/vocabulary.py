"""Embeddings and head that stay on disk: rows are looked up, the loss is computed a block of the vocabulary at a time.

Let h (T, d) be the input of the head, W (V, d) its weight and z = f(h Wᵀ) the logits. f is what the model makes of the
head's output, element by element: mostly nothing, in some families a soft cap or a factor. Two passes over blocks of W
give, without ever holding (T, V) values (the first: Milakov & Gimelshein, 2018, "Online normalizer calculation for
softmax"),

    lse_t = log Σ_v exp z_tv,    loss = Σ_t lse_t − z_t,label,
    ∂loss/∂h_t = Σ_v f'(h_t W_vᵀ) (exp(z_tv − lse_t) − 1[v = label]) W_v

Work: 6·T·V·d FLOPs where a resident head takes 4, since the logits are formed twice; V·d elements are read twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minisp.errors import UnsupportedModelError
from minisp.models.families import CausalLM
from minisp.store.checkpoint import Checkpoint
from minisp.store.files import helper_thread

# Float32 logits of one block: they, their 16-bit copy and the rows of W are what a block needs.
BLOCK_BYTES = 32 * 2**20
# The least probability of a label that counts in the loss, as 87 nats; the gradient takes them as they are.
TINY = torch.finfo(torch.float32).tiny


class StreamedVocabulary:
    """Stands in for a model's embedding and head, whose weights are never in memory whole.

    The embedding module looks its rows up on disk, and is otherwise its own code. The head module notes its input.

    Attributes:
        names: the model's parameters that must not be read.
        entering: h (B, L, d), what entered the head last.
        behind: f; None where it changes nothing.
    """

    entering: Tensor

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
        self.behind: Callable[[Tensor], Tensor] | None = None
        self._given: Tensor | None = None
        self._module = embedding
        embedding.forward = self._look_up
        head.forward = self._enter_head

    def loss_gradient(
        self, hidden: Tensor, targets: Tensor, drawn: Tensor | None = None, signs: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """Summed negative log likelihood (nats), and its gradient with respect to the head's input.

        Args:
            hidden: h (B, L, d).
            targets: (B, L) int64, labels of the text.
            drawn: (B, L) numbers in [0, 1): the labels are drawn by them, see `minisp.ops.sampling`.
            signs: (B,) ±1 of each window: the gradient for drawn labels is added to that of the text, with this sign.

        Returns:
            The loss, of the text where there are signs, and the gradient (B, L, d) in the dtype of `hidden`.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        lse = self._normaliser(flat)
        of_text = drawn is None or signs is not None
        loss, gradient = self._gradient(flat, lse, targets, None) if of_text else (0.0, flat.new_zeros(()))
        if drawn is not None:
            other_loss, other = self._gradient(flat, lse, targets, drawn)
            if signs is None:
                loss, gradient = other_loss, other
            else:
                gradient += other * signs.repeat_interleave(hidden.shape[1])[:, None]
        return loss, gradient.view_as(hidden).to(hidden.dtype)

    def _normaliser(self, hidden: Tensor) -> Tensor:
        """lse (T,) float32 for the head's inputs (T, d)."""
        maximum = hidden.new_full((len(hidden),), float("-inf"), dtype=torch.float32)
        total = torch.zeros_like(maximum)
        for _, rows in self._blocks(len(hidden)):
            maximum, _ = _raise_maximum(self._logits(hidden @ rows.T), maximum, total)
        return maximum + total.log_()

    def _gradient(self, hidden: Tensor, lse: Tensor, targets: Tensor, drawn: Tensor | None) -> tuple[float, Tensor]:
        """The loss, and the gradient (T, d) float32, for labels of one kind."""
        labels = _Labels(targets.reshape(-1), None if drawn is None else drawn.reshape(-1), self._num_rows)
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros_like(lse)
        for start, rows in self._blocks(len(hidden)):
            product = hidden @ rows.T
            share = self._logits(product).sub_(lse[:, None]).exp_()
            place, inside = labels.places(start, share)
            loss -= share.gather(1, place)[:, 0].clamp_min(TINY).log().where(inside, 0)
            share.scatter_add_(1, place, -inside[:, None].float())
            gradient += self._slope(product, share.to(self._dtype)) @ rows
        return float(loss.sum(dtype=torch.float64)), gradient

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
            logits = self._logits(wanted @ rows.T)
            best[0], kept = _raise_maximum(logits, best[0], total[0])
            share = (logits - best[0][:, None]).exp_()
            for place, hidden in enumerate(others):
                theirs = self._logits(hidden @ rows.T)
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
        """What the embedding module gives for ids (B, L), by its own code on the rows that they need."""
        rows, places = ids.unique(return_inverse=True)
        found = self._checkpoint.read_rows(self._embedding, rows.tolist()).to(self._device, self._dtype)
        module = self._module
        whole, padding = module.weight, module.padding_idx
        # Padding matters to gradients of the weight alone, and its row has another place here.
        module.weight, module.padding_idx = nn.Parameter(found, requires_grad=False), None
        try:
            embedded: Tensor = type(module).forward(module, places)
        finally:
            module.weight, module.padding_idx = whole, padding
        return embedded

    def _enter_head(self, hidden: Tensor) -> Tensor:
        """The head's forward: it records its input, and returns what `giving` has set, or else the input."""
        self.entering = hidden
        return hidden if self._given is None else self._given

    @contextmanager
    def giving(self, product: Tensor) -> Iterator[None]:
        """Within the block, the head's output is `product`, whatever enters it."""
        self._given = product
        try:
            yield
        finally:
            self._given = None

    def _logits(self, product: Tensor) -> Tensor:
        """f of the head's output (T, v), in float32; a tensor that may be overwritten."""
        return product.float() if self.behind is None else self.behind(product).to(torch.float32, copy=True)

    def _slope(self, product: Tensor, grad: Tensor) -> Tensor:
        """The gradient (T, v) of the head's output, from that of the logits."""
        if self.behind is None:
            return grad
        product = product.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.behind(product)
        return torch.autograd.grad(logits, product, grad.to(logits.dtype))[0]

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


class _Labels:
    """Where the labels lie, block after block of the vocabulary.

    Args:
        targets: (T,) int64.
        drawn: (T,) numbers in [0, 1) that decide instead, or None.
        num_rows: V.
    """

    def __init__(self, targets: Tensor, drawn: Tensor | None, num_rows: int):
        self._targets, self._left, self._num_rows = targets, drawn, num_rows

    def places(self, start: int, share: Tensor) -> tuple[Tensor, Tensor]:
        """Column (T, 1) of each label in the block (T, v) of probabilities from `start` on, and whether it is there."""
        count = share.shape[1]
        if self._left is None:
            place = self._targets - start
            inside = (place >= 0) & (place < count)
            return place.clamp(0, count - 1)[:, None], inside
        # What is left of a number once the tokens before have had their shares; below 0 the label has been drawn.
        found = self._left < 0
        place = torch.searchsorted(share.cumsum(1), self._left[:, None], right=True)
        inside = ~found & ((place[:, 0] < count) | (start + count == self._num_rows))
        self._left = torch.where(inside | found, -1, (self._left - share.sum(1)).clamp_min(0))
        return place.clamp_(max=count - 1), inside
