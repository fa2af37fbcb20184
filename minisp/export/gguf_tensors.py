"""The tensors of a GGUF file: names, shapes and element types, known before anything is read; then their bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minisp.errors import ConfigError
from minisp.export.source import Source
from minisp.store.checkpoint import Checkpoint
from minisp.store.files import tensor_bytes
from minisp.store.writer import PIECE_BYTES


@dataclass(frozen=True)
class ElementType:
    """How the elements of a matrix are stored.

    Attributes:
        kind: GGUF's number of the type.
        file_type: GGUF's number of a file that is mostly of the type.
        block: neighbours in a row that are stored together.
        block_bytes: what such a block takes.
    """

    kind: int
    file_type: int
    block: int
    block_bytes: int


DTYPES = {
    "f32": ElementType(kind=0, file_type=0, block=1, block_bytes=4),
    "f16": ElementType(kind=1, file_type=1, block=1, block_bytes=2),
    "bf16": ElementType(kind=30, file_type=32, block=1, block_bytes=2),
    # 32 signed bytes and one float16 that scales them.
    "q8_0": ElementType(kind=8, file_type=7, block=32, block_bytes=34),
}
# Element type as safetensors spells it → the nearest one here.
STORED_AS = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp sees a family.

    Attributes:
        name: as GGUF spells it.
        interleaved: whether its rotary embedding turns neighbouring columns of a head. transformers turns column i
            with column i + D/2, so the rows of q and k are then reordered.
    """

    name: str
    interleaved: bool


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written.

    Attributes:
        name: as GGUF spells it.
        shape: rows first, as in the checkpoint.
        dtype: key of `DTYPES`.
        stored: its name in the checkpoint; None where `value` is given.
        heads: into how many heads its rows are to be reordered; 0 leaves them as they are.
        value: what is not in the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str | None = None
    heads: int = 0
    value: Tensor | None = None

    @property
    def kind(self) -> int:
        """GGUF's number of the element type."""
        return DTYPES[self.dtype].kind

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        kind = DTYPES[self.dtype]
        return torch.Size(self.shape).numel() // kind.block * kind.block_bytes

    def pieces(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """The values, a number of rows at a time, in the stored dtype.

        Raises:
            CheckpointError: they cannot be read, or hold NaN or infinity.
        """
        if self.stored is None:
            assert self.value is not None
            yield self.value
            return
        place = checkpoint.tensors[self.stored]
        # Reordering moves rows within their head only, so pieces of whole heads can be reordered on their own.
        unit = place.num_rows // self.heads if self.heads else 1
        step = max(1, PIECE_BYTES * place.num_rows // max(place.num_bytes, 1) // unit) * unit
        for start in range(0, place.num_rows, step):
            rows = checkpoint.read_rows(self.stored, range(start, min(start + step, place.num_rows)))
            yield interleaved(rows, len(rows) // unit) if self.heads else rows


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (H·D, …) of which row i of a head and row i + D/2 become neighbours."""
    halves = rows.view(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def planned_tensors(source: Source, architecture: Architecture, dtype: str) -> list[PlannedTensor]:
    """Every tensor of the file in writing order; vectors are float32 whatever `dtype` is."""
    import gguf

    model, config = source.model, source.checkpoint.config
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    planned = []
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _frequency_divisors(config)
        planned.append(PlannedTensor("rope_freqs.weight", tuple(factors.shape), "f32", value=factors))
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, f"the gguf library has no name for {name}"
        shape = tuple(parameter.shape)
        turned = architecture.interleaved and own.split(".")[-2] in ("attn_q", "attn_k")
        planned.append(
            PlannedTensor(
                own,
                shape,
                _dtype_of(shape, dtype),
                source.checkpoint.stored_name(name, model.base_model_prefix),
                heads=shape[0] // head_size(config) if turned else 0,
            )
        )
    return planned


def head_size(config: Any) -> int:
    """D, the columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def stored_dtype(source: Source) -> str:
    """The key of `DTYPES` for what the embeddings are stored in."""
    [name] = [n for n, p in source.model.named_parameters() if p is source.model.get_input_embeddings().weight]
    stored = source.checkpoint.stored_name(name, source.model.base_model_prefix)
    return STORED_AS[source.checkpoint.tensors[stored].dtype]


def encoded(piece: Tensor, tensor: PlannedTensor) -> bytes | memoryview:
    """The bytes of some rows of a tensor.

    Raises:
        ConfigError: float16 has no room for a value.
    """
    if tensor.dtype == "q8_0":
        import gguf

        kind = gguf.GGMLQuantizationType(DTYPES["q8_0"].kind)
        data: bytes = gguf.quants.quantize(piece.float().numpy(), kind).tobytes()
        return data
    torch_dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[tensor.dtype]
    converted = piece.to(torch_dtype)
    if tensor.dtype == "f16" and not torch.isfinite(converted).all():
        raise ConfigError(
            f"Tensor {tensor.stored}: expected values that float16 has room for, up to 65504, got one of "
            f"{float(piece.abs().max()):g}. Choose --dtype bf16 or f32."
        )
    return tensor_bytes(converted.contiguous())


def _dtype_of(shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1:
        return "f32"
    # A block of q8_0 never crosses the end of a row.
    return "f16" if shape[-1] % DTYPES[dtype].block else dtype


def _frequency_divisors(config: Any) -> Tensor:
    """(D/2,) float32: what llama.cpp divides the angles by, so that they are those of transformers."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = head_size(config)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = torch.pow(config.rope_parameters["rope_theta"], -exponents)
    return plain / scaled
