"""A checkpoint as a transformers model: its skeleton on the meta device, some of its weights in memory, or all."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from minisp.errors import CheckpointError, one_line
from minisp.models.edits import replace_parameter_, resize_
from minisp.models.families import CausalLM, Family, family_of
from minisp.models.structures import Structure, heads_of, structures_of
from minisp.store.checkpoint import FLOATING, Checkpoint

# Keys in config.json that list, where layers differ, every layer's MLP width, its key heads, and its query heads where
# they are not so many for each key head as the config says. Key heads are cut before query heads.
KEYS = {"mlp": "minisp_widths", "attention": "minisp_kv_heads", "queries": "minisp_query_heads"}


def skeleton(checkpoint: Checkpoint) -> CausalLM:
    """The transformers model of a checkpoint with every parameter on the meta device, frozen, in evaluation mode.

    Raises:
        UnsupportedModelError: unknown family.
        CheckpointError: the config contradicts itself or the stored tensors.
    """
    family = family_of(checkpoint.config)
    where = f"{checkpoint.folder}/config.json"
    # Before the model is built: a billion layers would be built for hours.
    count = checkpoint.config.num_hidden_layers
    more = f".{family.layers}.{count}."
    if not 0 < count <= len(checkpoint.tensors) or any(more in f".{name}" for name in checkpoint.tensors):
        raise CheckpointError(f"{where}: expected as many layers as are stored, at least one, got {count}. Correct it.")
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{where}: expected a buildable model, got: {one_line(error)} Correct it.") from error
    for name, key in KEYS.items():
        if (sizes := checkpoint.raw_config.get(key)) is not None:
            structures = structures_of(model, family, [name])
            if not isinstance(sizes, list) or len(sizes) != count or not all(map(_is_size, sizes, structures)):
                full, step = structures[0].num_units, structures[0].groups
                steps = f", multiples of {step}" if step > 1 else ""
                raise CheckpointError(
                    f"{where}: expected {key} to list {count} sizes from {step} to {full}{steps}, got {sizes!r}. "
                    "It was written with the weights: restore it from there."
                )
            resize_(model, structures, sizes)
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    stored_names(checkpoint, model, [name for name, _ in model.named_parameters()])
    return model


def _is_size(size: Any, structure: Structure) -> bool:
    return type(size) is int and 0 < size <= structure.num_units and size % structure.groups == 0


def materialise_(
    model: CausalLM, checkpoint: Checkpoint, names: Iterable[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Read the parameters `names` of a skeleton, tie what is tied, and move its buffers to the device.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the model's, or cannot be read.
    """
    wanted = stored_names(checkpoint, model, names)
    for stored, tensor in checkpoint.read(wanted):
        for name in wanted[stored]:
            replace_parameter_(model, name, tensor.to(device, dtype))
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The whole model in memory, read without running any code of the checkpoint; per-layer widths included."""
    model = skeleton(checkpoint)
    materialise_(model, checkpoint, [name for name, _ in model.named_parameters()], device, dtype)
    return model


def size_keys(family: Family, config: Any, structures: Sequence[Structure], sizes: Sequence[int]) -> Mapping[str, Any]:
    """What config.json says of the structures' sizes after a run, in the order of its attributes.

    One number where all layers have one size and the stock class can have it; else the list, which the modelling file
    reads, beside the numbers that the stock class is built with.
    """
    by_name: dict[str, list[int]] = {}
    for structure, size in zip(structures, sizes, strict=True):
        by_name.setdefault(structure.name, []).append(size)
    keys: dict[str, Any] = {}
    if (widths := by_name.get("mlp")) is not None:
        keys[family.mlp.width_key] = max(widths)
        if len(set(widths)) > 1:
            keys[KEYS["mlp"]] = widths
    if heads := [x.heads(size) for x, size in zip(structures, sizes, strict=True) if x.head_dim]:
        keys |= _head_keys(family, config, heads)
    return keys


def _head_keys(family: Family, config: Any, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What config.json says of the (H, H_kv) of every layer."""
    queries, head_dim = heads_of(config)
    before = queries, getattr(config, "num_key_value_heads", None) or queries
    whole = {"num_attention_heads": heads[0][0], "num_key_value_heads": heads[0][1], "head_dim": head_dim}
    if len(set(heads)) == 1 and family.attention.has_head_dim and _is_accepted(config, whole):
        return whole
    if set(heads) == {before}:
        return {}
    keys: dict[str, Any] = {"head_dim": head_dim} if family.attention.has_head_dim else {}
    if any(count != before[1] for _, count in heads):
        keys[KEYS["attention"]] = [count for _, count in heads]
    if any(count * before[1] != shared * before[0] for count, shared in heads):
        keys[KEYS["queries"]] = [count for count, _ in heads]
    return keys


def _is_accepted(config: Any, keys: Mapping[str, Any]) -> bool:
    """Whether the stock config class takes these values: some want heads that divide the hidden size."""
    try:
        type(config).from_dict({**config.to_dict(), **keys})
    except Exception:
        return False
    return True


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
