"""Target `gguf`: one file for llama.cpp and what is built on it, written tensor by tensor through the gguf library.

Models whose layers have one width are written under their own architecture. Models of the Llama shape whose layers
differ are written as `deci`, the one architecture of the kind for which llama.cpp reads sizes layer by layer.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minisp.errors import BackendError, UnsupportedModelError
from minisp.export.gguf_tensors import DTYPES, Architecture, encoded, head_size, planned_tensors, stored_dtype
from minisp.export.gguf_tokenizer import add_tokenizer
from minisp.export.source import PHASE, Source
from minisp.models.families import activation_kind, decoder_layers
from minisp.phases.run import Progress
from minisp.store.writer import check_output, output_file

# Bytes that the header may take beside the tensors: the tokenizer is most of it.
HEADER_ROOM = 64 * 2**20


UNIFORM = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2", interleaved=False),
    "qwen3": Architecture("qwen3", interleaved=False),
}
PER_LAYER = {"llama": Architecture("deci", interleaved=True), "mistral": Architecture("deci", interleaved=True)}


def check(source: Source) -> None:
    """Refuse what llama.cpp cannot load, or would compute otherwise.

    Raises:
        UnsupportedModelError: llama.cpp has no architecture for the model, or not for its activation, rotary
            embedding or tokenizer.
        CheckpointError: there is no tokenizer, or it does not fit the model.
        BackendError: the gguf library is not installed.
    """
    gguf = _library()
    architecture = architecture_of(source)
    _check_config(source)
    # A writer without a file keeps what it is told.
    _add_tokenizer(gguf.GGUFWriter(None, architecture.name), source)


def write(source: Source, out: Path, progress: Progress, *, dtype: str | None = None) -> None:
    """Write a GGUF file that appears at `out` only once it is complete.

    Args:
        dtype: of the matrices, see `DTYPES`; None keeps what is stored. Vectors are always float32. A matrix whose
            rows are no multiple of 32 stays float16 where q8_0 is asked for.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or infinity.
        ConfigError: float16 where a value is too large for it.
        OutputError: `out` is taken, or cannot be written; nothing is left there.
    """
    gguf = _library()
    architecture = architecture_of(source)
    dtype = dtype or stored_dtype(source)
    tensors = planned_tensors(source, architecture, dtype)
    path = check_output(out, sum(tensor.num_bytes for tensor in tensors) + HEADER_ROOM, is_file=True)
    with output_file(path) as partial, contextlib.closing(gguf.GGUFWriter(partial, architecture.name)) as writer:
        writer.add_file_type(DTYPES[dtype].file_type)
        _add_metadata(writer, source)
        _add_tokenizer(writer, source)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # The library's own call takes whole tensors only.
        [file] = writer.fout
        writer.write_padding(file, file.tell())
        for done, tensor in enumerate(tensors):
            progress(PHASE, done, len(tensors))
            for piece in tensor.pieces(source.checkpoint):
                file.write(encoded(piece, tensor))
            writer.write_padding(file, tensor.num_bytes)
        progress(PHASE, len(tensors), len(tensors))


def architecture_of(source: Source) -> Architecture:
    """The architecture under which llama.cpp loads the model.

    Raises:
        UnsupportedModelError: there is none.
    """
    table = UNIFORM if source.is_uniform else PER_LAYER
    if source.model_type in table:
        return table[source.model_type]
    if source.model_type in UNIFORM:
        raise UnsupportedModelError(
            f"Target gguf: expected layers of one width, or a family for which llama.cpp reads the widths layer by "
            f"layer ({', '.join(PER_LAYER)}), got {source.model_type} with widths from {min(source.widths)} to "
            f"{max(source.widths)}. Minify with --widths uniform, or export --to padded first, and that folder --to "
            "gguf; or use hf-per-layer with another server."
        )
    raise UnsupportedModelError(
        f"Target gguf: expected one of {', '.join(UNIFORM)}, got {source.model_type}. Export --to "
        f"{'hf' if source.is_uniform else 'padded'} and convert that folder with llama.cpp's own converter, where it "
        "knows the family."
    )


def _add_tokenizer(writer: Any, source: Source) -> None:
    add_tokenizer(writer, source.checkpoint, rows=source.model.get_input_embeddings().weight.shape[0])


def _check_config(source: Source) -> None:
    """Refuse what the architecture cannot compute, for llama.cpp would load the file and compute something else."""
    config, rope = source.checkpoint.config, source.checkpoint.config.rope_parameters
    kinds = ("default", "linear", "llama3") if architecture_of(source).interleaved else ("default", "linear")
    if activation_kind(config, source.family) != "silu":
        found = f"the activation {getattr(config, source.family.mlp.activation_key)}, where llama.cpp computes silu"
    elif rope["rope_type"] not in kinds:
        found = f"a rotary embedding of type {rope['rope_type']}, where {', '.join(kinds)} can be expressed"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        found = f"a rotary embedding of {rope['partial_rotary_factor']:.0%} of each head, where it has to cover all"
    else:
        return
    raise UnsupportedModelError(
        f"Target gguf: expected what llama.cpp computes for {source.model_type}, got {found}. Export --to "
        f"{'hf' if source.is_uniform else 'hf-per-layer'} for another server."
    )


def _add_metadata(writer: Any, source: Source) -> None:
    config, rope = source.checkpoint.config, source.checkpoint.config.rope_parameters
    dim = head_size(config)
    layers = decoder_layers(source.model, source.family)
    writer.add_type("model")
    writer.add_name(source.checkpoint.folder.name)
    writer.add_quantization_version(_library().GGML_QUANT_VERSION)
    writer.add_vocab_size(source.model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_one_or_all(source.widths))
    writer.add_head_count(_one_or_all([len(layer.get_parameter("self_attn.q_proj.weight")) // dim for layer in layers]))
    writer.add_head_count_kv(
        _one_or_all([len(layer.get_parameter("self_attn.k_proj.weight")) // dim for layer in layers])
    )
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _context_length(config: Any) -> int:
    """Positions within which llama.cpp, which knows no sliding window for these families, computes the same."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = window is not None and (kinds is None or "sliding_attention" in kinds)
    return int(min(config.max_position_embeddings, window) if slides else config.max_position_embeddings)


def _one_or_all(values: Sequence[int]) -> int | Sequence[int]:
    return values[0] if len(set(values)) == 1 else values


def _library() -> Any:
    """The gguf library, which is an optional requirement."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise BackendError(
            "Target gguf: expected the package gguf, got no such package. Run pip install 'minisp[export]'."
        ) from error
