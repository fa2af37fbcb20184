"""A model as a stream of layers: only the layers that are held have weights in memory.

transformers' own modelling code does everything but the MLP. To learn what every layer is called with, the model's
forward runs once with stubs in place of its layers; for the loss, it runs with the last stub handing over the stored
hidden state, so that final norm, head and any logit caps are the model's own.

Shapes: B windows, L tokens per window, T = B·L, d hidden size, m units, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minisp.device import trim_memory
from minisp.errors import CheckpointError
from minisp.models.calls import EnoughError, LayerCall, Stub, same_calls
from minisp.models.edits import Edit, apply_, replace_parameter_
from minisp.models.families import CausalLM, Family, decoder_layers, family_of, layers_path
from minisp.models.loader import Loader
from minisp.models.objective import Objective
from minisp.models.skeleton import materialise_, skeleton, stored_names
from minisp.models.structures import Structure, structures_of
from minisp.models.vocabulary import StreamedVocabulary
from minisp.store.checkpoint import DTYPE_OF, Checkpoint

# Logits of one chunk of tokens: 16-bit logits and their gradient stay within this many bytes. A GPU reads the head's
# weights from memory for every chunk: few chunks then.
LOGIT_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}


class Stream:
    """A causal language model whose decoder layers are materialised only while held.

    Attributes:
        model: the transformers model; parameters of layers that are not held are on the meta device.
        family: its row of data.
        structures: what can be removed from it, in the order in which it computes.
        device, dtype: where and in what type it computes.
        checkpoint: where the weights come from; None when the model was in memory to begin with.
        edits: what becomes of a layer's parameters when they are read; nothing, to begin with.
        vocabulary: embeddings and head, where they are left on disk.
    """

    def __init__(
        self,
        model: CausalLM,
        device: torch.device,
        dtype: torch.dtype,
        checkpoint: Checkpoint | None,
        structures: Sequence[str] = ("mlp",),
    ):
        self.model, self.device, self.dtype, self.checkpoint = model, device, dtype, checkpoint
        self.family: Family = family_of(model.config)
        self.structures: list[Structure] = structures_of(model, self.family, structures)
        self.layers = decoder_layers(model, self.family)
        self.vocabulary: StreamedVocabulary | None = None
        self.edits: Callable[[int], Sequence[Edit]] = lambda index: ()
        self._loader: Loader | None = None
        self._calls: dict[tuple[int, ...], list[LayerCall]] = {}
        self._calls_differ: bool | None = None
        # What takes the weights' place when a layer is released. A model in memory is never released: its old weights
        # must not be held here when it is cut.
        kept = self.layers if checkpoint is not None else ()
        self._empty = [{name: p.data for name, p in layer.named_parameters()} for layer in kept]

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_slots: int = 1,
        stream_vocabulary: bool = False,
        structures: Sequence[str] = ("mlp",),
    ) -> "Stream":
        """Everything but the decoder layers is read now; the layers' tensors are only looked up.

        Args:
            num_slots: segments in memory at once; 2 reads ahead.
            stream_vocabulary: leave embeddings and head on disk too, see `StreamedVocabulary`.
            structures: names of what can be removed.

        Raises:
            UnsupportedModelError: unknown family.
            CheckpointError: a tensor is missing or has another shape than the config says.
        """
        model = skeleton(checkpoint)
        stream = cls(model, device, dtype, checkpoint, structures)
        stream._loader = Loader(checkpoint, device, num_slots)
        prefix = f"{layers_path(model, stream.family)}."
        if stream_vocabulary:
            stream.vocabulary = StreamedVocabulary(checkpoint, model, device, dtype)
        left = stream.vocabulary.names if stream.vocabulary is not None else set()
        names = [n for n, _ in model.named_parameters() if not n.startswith(prefix) and n not in left]
        materialise_(model, checkpoint, names, device, dtype)
        if stream.vocabulary is not None:
            tried = torch.linspace(-100, 100, 401, dtype=dtype, device=device)[None]
            if not torch.equal(stream._behind_head(tried), tried):
                stream.vocabulary.behind = stream._behind_head
        return stream

    @classmethod
    def from_module(cls, model: CausalLM, structures: Sequence[str] = ("mlp",)) -> "Stream":
        """A model in memory, computed where and in the type that it has; nothing is ever released."""
        parameter = next(model.parameters())
        if parameter.is_meta:
            raise CheckpointError("Model: expected weights in memory, got a model on the meta device. Load it first.")
        return cls(model, parameter.device, parameter.dtype, None, structures)

    def visit(self, segments: Sequence[range]) -> Iterator[range]:
        """Yield segment after segment of layers, each with its weights in memory until the next one is asked for.

        The schedule: with two slots, segment i + 1 is read while segment i computes; with one, after it.
        """
        if self._loader is None:
            yield from segments
            return
        ahead = self._loader.num_slots - 1
        reading = deque(map(self._start, segments[: ahead + 1]))
        for place, segment in enumerate(segments):
            self._place(*reading.popleft())
            for index in segment:
                apply_(self.layers[index], self.edits(index))
            try:
                yield segment
            finally:
                for index in segment:
                    for name, empty in self._empty[index].items():
                        replace_parameter_(self.layers[index], name, empty)
            reading.extend(map(self._start, segments[place + ahead + 1 : place + ahead + 2]))

    def release(self, num_slots: int | None = None) -> None:
        """Give back the memory that `visit` reads into; another visit takes it anew, for so many segments at once."""
        if self._loader is not None:
            self._loader.num_slots = num_slots or self._loader.num_slots
            self._loader.release()
        trim_memory()

    def _start(self, segment: range) -> tuple[dict[str, list[str]], Future[dict[str, Tensor]]]:
        """Begin to read a segment: stored name → parameters that it is for, and what is being read."""
        assert self._loader is not None and self.checkpoint is not None
        path = layers_path(self.model, self.family)
        names = [f"{path}.{index}.{name}" for index in segment for name in self._empty[index]]
        wanted = stored_names(self.checkpoint, self.model, names)
        return wanted, self._loader.start(list(wanted))

    def _place(self, wanted: dict[str, list[str]], reading: Future[dict[str, Tensor]]) -> None:
        tensors = reading.result()
        for stored, names in wanted.items():
            for name in names:
                replace_parameter_(self.model, name, tensors[stored].to(self.dtype))

    def weight(self, structure: Structure) -> Tensor:
        """The weight (d, u·c) of a structure's consumer; see `parameter`."""
        weight = self.parameter(structure.layer, structure.weight)
        return weight.T if structure.transposed else weight

    def parameter(self, index: int, name: str) -> Tensor:
        """A parameter of a layer as it is stored, in the stored dtype (not the compute type), on the device.

        Where the layer is held and has it in that type, it is the layer's own, valid as long as that is.
        """
        held = self.layers[index].get_parameter(name).detach()
        if self.checkpoint is None:
            return held
        path = f"{layers_path(self.model, self.family)}.{index}.{name}"
        stored = self.checkpoint.stored_name(path, self.model.base_model_prefix)
        if not held.is_meta and DTYPE_OF[self.checkpoint.tensors[stored].dtype] == held.dtype:
            return held
        ((_, tensor),) = self.checkpoint.read([stored])
        return tensor.to(self.device)

    def structures_in(self, index: int) -> list[Structure]:
        """The structures of one layer."""
        return [structure for structure in self.structures if structure.layer == index]

    def calls(self, ids: Tensor) -> list[LayerCall]:
        """What every layer is called with for windows (B, L).

        Most families make it from the shape of the windows alone. That is tried once, on other tokens of the same
        shape; where it depends on the tokens, it is made anew for all windows.
        """
        if self._calls_differ is None:
            self.embed(ids)
            first = self._calls[tuple(ids.shape)]
            self.embed((ids + 1) % self.model.config.vocab_size)
            self._calls_differ = not same_calls(first, self._calls[tuple(ids.shape)])
        if self._calls_differ or tuple(ids.shape) not in self._calls:
            self.embed(ids)
        return self._calls[tuple(ids.shape)]

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The hidden state (B, L, d) that enters the first layer."""
        calls: list[LayerCall] = []
        entering: list[Tensor] = []

        def record(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            entering.append(hidden)
            calls.append(LayerCall(args, kwargs))
            if index == len(self.layers) - 1:
                raise EnoughError
            return hidden

        with self._stubs(record), suppress(EnoughError):
            self.model(input_ids=ids.to(self.device), use_cache=False)
        self._calls[tuple(ids.shape)] = calls
        return entering[0]

    def run_layer(self, index: int, hidden: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """The hidden state (B, L, d) after layer `index`, which must be held."""
        call = calls[index]
        result: Any = self.layers[index](hidden, *call.args, **call.kwargs)
        leaving: Tensor = result[0] if isinstance(result, tuple) else result
        return leaving

    def state_bytes(self, ids: Tensor) -> int:
        """Bytes of the hidden states (B, L, d) of windows (B, L)."""
        size: int = ids.numel() * self.model.config.hidden_size * self.dtype.itemsize
        return size

    def chunk(self, num_windows: int) -> int:
        """Tokens of each window whose logits are in memory at once."""
        size: int = 4 * self.model.config.vocab_size * num_windows
        return max(1, LOGIT_BYTES.get(self.device.type, LOGIT_BYTES["cpu"]) // size)

    def loss_gradient(self, hidden: Tensor, ids: Tensor, objective: Objective) -> tuple[float, Tensor]:
        """Loss and its gradient at the last layer's output.

        Tokens go through the head in chunks, so that the logits stay within `LOGIT_BYTES`; a streamed head takes all
        tokens at once, for it is read from disk each time.

        Args:
            hidden: (B, L, d) output of the last layer.
            ids: (B, L) tokens.
            objective: what the loss is.

        Returns:
            The loss, and ∂loss/∂hidden (B, L, d) in the dtype of `hidden`.
        """
        ids = ids.to(self.device)
        numbers = objective.numbers(ids)
        signs = objective.signs(numbers)
        gradient = torch.zeros_like(hidden)
        step = self.chunk(len(hidden)) if self.vocabulary is None else hidden.shape[1]
        loss = 0.0
        for start in range(0, hidden.shape[1] - 1, step):
            stop = min(start + step, hidden.shape[1] - 1)
            chunk = hidden[:, start:stop].detach().requires_grad_()
            targets, drawn = ids[:, start + 1 : stop + 1], None if numbers is None else numbers[:, start:stop]
            with self._stubs(partial(self._hand_over, chunk)), torch.enable_grad():
                leaving = self._leaving(ids[:, start:stop])
            if self.vocabulary is None:
                chunk_loss, grad_leaving = objective.gradient(leaving.detach(), targets, drawn, signs)
            else:
                chunk_loss, grad_leaving = self.vocabulary.loss_gradient(leaving.detach(), targets, drawn, signs)
            gradient[:, start:stop] = torch.autograd.grad(leaving, chunk, grad_leaving)[0]
            loss += chunk_loss
        return loss, gradient

    @torch.no_grad()
    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, L, V) for the states (B, L, d) behind all layers; where the head is streamed, its input."""
        with self._stubs(partial(self._hand_over, hidden)):
            return self._leaving(ids.to(self.device))

    def _leaving(self, ids: Tensor) -> Tensor:
        """The model's logits, within `_stubs`; where the head is streamed, its input."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits if self.vocabulary is None else self.vocabulary.entering

    def _behind_head(self, product: Tensor) -> Tensor:
        """What the model's own code makes of the output (T, v) of a streamed head."""
        assert self.vocabulary is not None
        nothing = product.new_zeros(1, 1, self.model.config.hidden_size)
        with self.vocabulary.giving(product[None]), self._stubs(partial(self._hand_over, nothing)):
            logits: Tensor = self.model(inputs_embeds=nothing, use_cache=False).logits
        return logits[0]

    def _hand_over(self, chunk: Tensor, index: int, passing: Tensor, *_: Any, **__: Any) -> Tensor:
        """What a stub does where only the end of the model is wanted: the last one hands over `chunk`."""
        return chunk if index == len(self.layers) - 1 else passing

    @contextmanager
    def _stubs(self, function: Any) -> Iterator[None]:
        originals = list(self.layers)
        for index, layer in enumerate(originals):
            self.layers[index] = Stub(index, layer, function)
        try:
            yield
        finally:
            for index, layer in enumerate(originals):
                self.layers[index] = layer
