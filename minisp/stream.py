"""A model as a stream of layers: only the layers that are held have weights in memory.

transformers' own modelling code does everything but the MLP. To learn what every layer is called with, the model's
forward runs once with stubs in place of its layers; for the loss, it runs with the last stub handing over the stored
hidden state, so that final norm, head and any logit caps are the model's own.

Shapes: B windows, L tokens per window, T = B·L, d hidden size, m units, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minisp import ops
from minisp.architecture import (
    WIDTHS_KEY,
    Architecture,
    CausalLM,
    architecture_of,
    decoder_layers,
    layer_widths,
    layers_path,
    mlp_weights,
    replace_parameter_,
    resize_,
    unit_axes,
)
from minisp.checkpoint import FLOATING, Checkpoint
from minisp.errors import CheckpointError, one_line

# Logits of one chunk of tokens: 16-bit logits and their gradient stay within this many bytes.
LOGIT_BYTES = 48 * 2**20


@dataclass(frozen=True)
class LayerCall:
    """The arguments, besides the hidden state, that the model passes to one decoder layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """A causal language model whose decoder layers are materialised only while held.

    Attributes:
        model: the transformers model; parameters of layers that are not held are on the meta device.
        row: its architecture.
        device, dtype: where and in what type it computes.
        checkpoint: where the weights come from; None when the model was in memory to begin with.
    """

    def __init__(self, model: CausalLM, device: torch.device, dtype: torch.dtype, checkpoint: Checkpoint | None):
        self.model = model
        self.row: Architecture = architecture_of(model.config)
        self.device = device
        self.dtype = dtype
        self.checkpoint = checkpoint
        self.layers = decoder_layers(model, self.row)
        self._calls: dict[tuple[int, ...], list[LayerCall]] = {}
        self._empty = [{name: p.data for name, p in layer.named_parameters()} for layer in self.layers]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> "Stream":
        """Everything but the decoder layers is read now; the layers' tensors are only looked up.

        Raises:
            UnsupportedModelError: unknown family.
            CheckpointError: a tensor is missing or has another shape than the config says.
        """
        model = skeleton(checkpoint)
        stream = cls(model, device, dtype, checkpoint)
        prefix = f"{layers_path(model, stream.row)}."
        stream._read(n for n, _ in model.named_parameters() if not n.startswith(prefix))
        model.tie_weights()
        for buffered in model.modules():
            for name, buffer in buffered.named_buffers(recurse=False):
                setattr(buffered, name, buffer.to(device))
        return stream

    @classmethod
    def from_module(cls, model: CausalLM) -> "Stream":
        """A model in memory, computed where and in the type that it has; nothing is ever released."""
        parameter = next(model.parameters())
        if parameter.is_meta:
            raise CheckpointError("Model: expected weights in memory, got a model on the meta device. Load it first.")
        return cls(model, parameter.device, parameter.dtype, None)

    @contextmanager
    def hold(self, indices: Iterable[int]) -> Iterator[list[nn.Module]]:
        """The layers with these indices, with their weights in memory for the length of the block."""
        indices = list(indices)
        path = layers_path(self.model, self.row)
        if self.checkpoint is not None:
            self._read(f"{path}.{i}.{name}" for i in indices for name in self._empty[i])
        try:
            yield [self.layers[i] for i in indices]
        finally:
            if self.checkpoint is not None:
                for i in indices:
                    for name, empty in self._empty[i].items():
                        replace_parameter_(self.layers[i], name, empty)

    def down_weight(self, index: int) -> Tensor:
        """The down projection (d, m) of a layer, in the stored dtype (not the compute type), on the device."""
        if self.checkpoint is None:
            return mlp_weights(self.layers[index], self.row).down.detach()
        name = f"{layers_path(self.model, self.row)}.{index}.{self.row.down}.weight"
        stored = self.checkpoint.stored_name(name, self.model.base_model_prefix)
        ((_, weight),) = self.checkpoint.read([stored])
        axis = unit_axes(self.layers[index], self.row)[f"{self.row.down}.weight"]
        return (weight if axis == 1 else weight.T).to(self.device)

    def calls(self, ids: Tensor) -> list[LayerCall]:
        """What every layer is called with for windows of this shape (B, L)."""
        if tuple(ids.shape) not in self._calls:
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
                raise _EnoughError
            return hidden

        with self._stubs(record), suppress(_EnoughError):
            self.model(input_ids=ids.to(self.device), use_cache=False)
        self._calls[tuple(ids.shape)] = calls
        return entering[0]

    def run_layer(self, index: int, hidden: Tensor, calls: Sequence[LayerCall]) -> Tensor:
        """The hidden state (B, L, d) after layer `index`, which must be held."""
        call = calls[index]
        result: Any = self.layers[index](hidden, *call.args, **call.kwargs)
        leaving: Tensor = result[0] if isinstance(result, tuple) else result
        return leaving

    def loss_gradient(self, hidden: Tensor, ids: Tensor) -> tuple[float, Tensor]:
        """Loss and its gradient at the last layer's output.

        The loss is the summed negative log likelihood (nats) of tokens 2…L of each window. Tokens go through the head
        in chunks, so that the logits stay within `LOGIT_BYTES`.

        Args:
            hidden: (B, L, d) output of the last layer.
            ids: (B, L) tokens.

        Returns:
            The loss, and ∂loss/∂hidden (B, L, d) in the dtype of `hidden`.
        """
        ids = ids.to(self.device)
        gradient = torch.zeros_like(hidden)
        step = max(1, LOGIT_BYTES // (4 * self.model.config.vocab_size * hidden.shape[0]))
        loss = 0.0
        for start in range(0, hidden.shape[1] - 1, step):
            stop = min(start + step, hidden.shape[1] - 1)
            chunk = hidden[:, start:stop].detach().requires_grad_()

            def hand_over(index: int, passing: Tensor, *_: Any, chunk: Tensor = chunk, **__: Any) -> Tensor:
                return chunk if index == len(self.layers) - 1 else passing

            with self._stubs(hand_over), torch.enable_grad():
                logits = self.model(input_ids=ids[:, start:stop], use_cache=False).logits
            chunk_loss, logit_gradient = ops.cross_entropy_gradient(logits.detach(), ids[:, start + 1 : stop + 1])
            gradient[:, start:stop] = torch.autograd.grad(logits, chunk, logit_gradient)[0]
            loss += chunk_loss
        return loss, gradient

    @contextmanager
    def _stubs(self, function: Any) -> Iterator[None]:
        originals = list(self.layers)
        for index, layer in enumerate(originals):
            self.layers[index] = _Stub(index, layer, function)
        try:
            yield
        finally:
            for index, layer in enumerate(originals):
                self.layers[index] = layer

    def _read(self, names: Iterable[str]) -> None:
        assert self.checkpoint is not None
        wanted = stored_names(self.checkpoint, self.model, names)
        for stored, tensor in self.checkpoint.read(wanted):
            for name in wanted[stored]:
                replace_parameter_(self.model, name, tensor.to(self.device, self.dtype, copy=True))


class _Stub(nn.Module):
    """Stands for a decoder layer in the model's forward; other attributes are those of the layer."""

    def __init__(self, index: int, layer: nn.Module, function: Any):
        super().__init__()
        self.__dict__.update(_index=index, _layer=layer, _function=function)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        leaving: Tensor = self._function(self._index, hidden, *args, **kwargs)
        return leaving

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class _EnoughError(Exception):
    """Raised by the last stub: the rest of the forward is not wanted."""


def skeleton(checkpoint: Checkpoint) -> CausalLM:
    """The transformers model of a checkpoint with every parameter on the meta device, frozen, in evaluation mode.

    Raises:
        UnsupportedModelError: unknown family or activation.
        CheckpointError: the config contradicts itself or the stored tensors.
    """
    row = architecture_of(checkpoint.config)
    widths = checkpoint.raw_config.get(WIDTHS_KEY)
    where = f"{checkpoint.folder}/config.json"
    # Before the model is built: a billion layers would be built for hours.
    count = checkpoint.config.num_hidden_layers
    more = f".{row.layers}.{count}."
    if not 0 < count <= len(checkpoint.tensors) or any(more in f".{name}" for name in checkpoint.tensors):
        raise CheckpointError(f"{where}: expected as many layers as are stored, at least one, got {count}. Correct it.")
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{where}: expected a buildable model, got: {one_line(error)} Correct it.") from error
    if widths is not None:
        full = layer_widths(model, row)
        if not isinstance(widths, list) or [type(w) is int and 0 < w <= full[0] for w in widths] != [True] * count:
            raise CheckpointError(
                f"{where}: expected {WIDTHS_KEY} to list {count} widths from 1 to {full[0]}, got {widths!r}. "
                "It was written with the weights: restore it from there."
            )
        resize_(model, row, widths)
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    stored_names(checkpoint, model, [name for name, _ in model.named_parameters()])
    return model


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The whole model in memory, read without running any code of the checkpoint; per-layer widths included."""
    stream = Stream.from_checkpoint(checkpoint, device, dtype)
    path = layers_path(stream.model, stream.row)
    stream._read(f"{path}.{i}.{name}" for i, empty in enumerate(stream._empty) for name in empty)
    return stream.model


@contextmanager
def frozen(model: CausalLM) -> Iterator[None]:
    """Within the block: evaluation mode and no parameter wants a gradient; both as before afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)


def stored_names(checkpoint: Checkpoint, model: CausalLM, names: Iterable[str]) -> dict[str, list[str]]:
    """Stored name → tensor names that it serves; the second name of a tied weight is left to `tie_weights`.

    Raises:
        CheckpointError: a tensor is missing, or its shape is not the model's.
    """
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    wanted: dict[str, list[str]] = {}
    for name in names:
        if name in tied:
            continue
        stored = checkpoint.stored_name(name, model.base_model_prefix)
        shape = tuple(model.get_parameter(name).shape)
        place = checkpoint.tensors[stored]
        if place.shape != shape or place.dtype not in FLOATING.values():
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {stored}: expected floating-point values of shape {shape}, which follows "
                f"from config.json, got {place.dtype} {place.shape}. The config and the weights belong to different "
                "models."
            )
        wanted.setdefault(stored, []).append(name)
    return wanted
