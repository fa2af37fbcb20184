"""GGUF files in llama.cpp's smaller types, by llama.cpp's own quantiser: the one in the library that xllamacpp brings.

xllamacpp has no call for it in Python, but its library exports `ggml_quantize_chunk`. Which type a matrix gets follows
llama-quantize: a type whose blocks do not divide a row gives way to a larger one.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from server_environments import folder_of

# Scheme → the type of matrices, and that of the embeddings, which are the head too where both are tied. Before its
# fallback, each is what llama-quantize takes for Q8_0, for Q4_K_S, and with --pure for Q4_0.
SCHEMES = {
    "q8_0": (Kind.Q8_0, Kind.Q8_0),
    "q4_0": (Kind.Q4_0, Kind.Q4_0),
    "q4_k": (Kind.Q4_K, Kind.Q6_K),
}
# What takes the place of a type of 256 neighbours where a row is no multiple of it.
FALLBACKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}
EMBEDDINGS = ("token_embd.weight", "output.weight", "model.embed_tokens.weight", "lm_head.weight")


def kind_of(name: str, shape: tuple[int, ...], scheme: str) -> Kind:
    """The type of a tensor, by its name in a GGUF file or in transformers; `shape` has the rows first."""
    if len(shape) == 1:
        return Kind.F32
    kind = SCHEMES[scheme][name in EMBEDDINGS]
    return FALLBACKS[kind] if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


@cache
def _quantiser() -> Callable[..., int]:
    [path] = folder_of("xllamacpp").glob("lib/python3*/site-packages/xllamacpp/*.so")
    function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    # Type, values, room for the result, first element, rows, elements per row, weights of their importance.
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function  # type: ignore[no-any-return]


def quantised(values: NDArray[np.float32], kind: Kind) -> NDArray[np.uint8]:
    """The bytes (n, …) of rows (n, k) float32."""
    values = np.ascontiguousarray(values, np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    written = _quantiser()(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    assert written == out.nbytes
    return out


def write_quantised(source: Path, out: Path, scheme: str) -> None:
    """Copy a GGUF file of float32, float16 or bfloat16 with its matrices quantised."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = kind_of(tensor.name, values.shape, scheme)
        data: NDArray[Any] = values if kind == Kind.F32 else quantised(values, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
