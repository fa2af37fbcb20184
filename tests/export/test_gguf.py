"""GGUF files, read back by the gguf library: tensors, sizes and tokenizer are those of the checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from minisp.errors import CheckpointError, ConfigError, UnsupportedModelError
from minisp.export import gguf as target
from minisp.export.gguf_tensors import DTYPES, interleaved
from minisp.export.targets import export
from minisp.store.checkpoint import Checkpoint
from tests.export.checkpoints import ROWS, WIDTHS, byte_tokenizer, piece_tokenizer, write_checkpoint
from tests.tiny import HEADS, HIDDEN, LAYERS, POSITIONS

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

# What GGUF calls the parameters of a layer.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def written(tmp_path: Path, model_type: str, widths: tuple[int, ...] = WIDTHS, **options: Any) -> tuple[Any, Any]:
    """A random model, and the reader of what became of it."""
    dtype = options.pop("dtype", None)
    tokenizer = options.pop("tokenizer", byte_tokenizer())
    model = write_checkpoint(tmp_path / "in", model_type, widths, tokenizer=tokenizer, **options)
    return model, gguf.GGUFReader(export(tmp_path / "in", "gguf", tmp_path / "out.gguf", dtype=dtype).out)


def value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()


def gguf_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if path in OUTSIDE:
        return f"{OUTSIDE[path]}.{leaf}"
    _, _, layer, rest = path.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{leaf}"


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleaved`, row by row."""
    size = len(rows) // heads
    order = [head * size + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(size // 2)]
    return rows[order]


@pytest.mark.parametrize(
    ("model_type", "widths", "architecture", "options"),
    [
        ("llama", (48, 48, 48), "llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", WIDTHS, "deci", {"tie_word_embeddings": True}),
        ("qwen2", (16, 16, 16), "qwen2", {}),
        ("qwen3", (16, 16, 16), "qwen3", {}),
    ],
)
def test_every_tensor_is_there_once_and_equal(
    model_type: str, widths: tuple[int, ...], architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, reader = written(tmp_path, model_type, widths, **options)
    assert value(reader, "general.architecture") == architecture
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    expected = {gguf_name(name): parameter for name, parameter in model.named_parameters()}
    assert set(found) == set(expected) and len(reader.tensors) == len(expected)
    for name, parameter in expected.items():
        tensor = found[name]
        if architecture in ("llama", "deci") and ("attn_q." in name or "attn_k." in name):
            tensor = halves(tensor, HEADS if "attn_q." in name else 1)
        assert torch.equal(tensor, parameter), name


def test_the_sizes_are_those_of_the_layers(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e4, "rope_type": "default"}
    _, reader = written(tmp_path, "llama", head_dim=16, rms_norm_eps=1e-3, rope_parameters=rope)
    expected = {
        "feed_forward_length": list(WIDTHS),
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "context_length": POSITIONS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": 5e4,
        "vocab_size": ROWS,
    }
    assert {key: value(reader, f"deci.{key}") for key in expected} == expected
    assert value(reader, "deci.attention.layer_norm_rms_epsilon") == pytest.approx(1e-3)
    assert value(reader, "general.file_type") == 0


def test_one_width_is_written_as_one_number(tmp_path: Path) -> None:
    _, reader = written(tmp_path, "llama", (32, 32, 32))
    assert value(reader, "llama.feed_forward_length") == 32


def test_beyond_a_sliding_window_llamacpp_would_differ_so_the_context_ends_there(tmp_path: Path) -> None:
    _, reader = written(tmp_path, "mistral", (32, 32, 32), sliding_window=24)
    assert value(reader, "llama.context_length") == 24


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_matrices_are_rounded_and_vectors_are_not(dtype: str, tmp_path: Path) -> None:
    # No row that a block of q8_0 does not divide.
    wide = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 96}
    model, reader = written(tmp_path, "llama", (32, 64, 96), dtype=dtype, **wide)
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    assert (kind, gguf.GGML_QUANT_SIZES[kind]) == (DTYPES[dtype].kind, (DTYPES[dtype].block, DTYPES[dtype].block_bytes))
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    assert value(reader, "general.file_type") == gguf.LlamaFileType[file_types[dtype]]
    down = model.model.layers[1].mlp.down_proj.weight.detach()
    for tensor in reader.tensors:
        is_vector = len(tensor.shape) == 1
        assert tensor.tensor_type == (gguf.GGMLQuantizationType.F32 if is_vector else kind), tensor.name
        if tensor.name == "blk.1.ffn_down.weight":
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            # Of a block's largest value q8_0 keeps half of a 127th, and rounds that scale to float16.
            step = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 254 + 2.0**-10}[dtype]
            assert np.abs(found - down.numpy()).max() <= step * down.abs().max()
            assert (dtype == "f32") == np.array_equal(found, down.numpy())


def test_rows_that_no_block_divides_stay_float16(tmp_path: Path) -> None:
    _, reader = written(tmp_path, "llama", (32, 48, 16), dtype="q8_0", hidden_size=32, intermediate_size=48)
    kinds = [t.tensor_type.name for t in reader.tensors if t.name.endswith("ffn_down.weight")]
    assert kinds == ["Q8_0", "F16", "F16"]


def test_the_stored_type_is_kept_where_none_is_asked_for(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "in", "llama", (48, 48, 48), tokenizer=byte_tokenizer())
    model.bfloat16().save_pretrained(tmp_path / "in")
    reader = gguf.GGUFReader(export(tmp_path / "in", "gguf", tmp_path / "out.gguf").out)
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
    bits = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16)
    assert torch.equal(bits, model.model.embed_tokens.weight)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path, there: Path) -> None:
    model = write_checkpoint(tmp_path / "in", "llama", (48, 48, 48), tokenizer=byte_tokenizer())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"up_proj\.weight: expected values .* up to 65504, got .*1?00000.*bf16"):
        export(tmp_path / "in", "gguf", there / "out.gguf", dtype="f16")
    assert list(there.iterdir()) == []


def test_reordering_is_done_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path / "a", "llama")[1]
    monkeypatch.setattr("minisp.export.gguf_tensors.PIECE_BYTES", 100)
    read_rows, largest = Checkpoint.read_rows, []

    def counted(checkpoint: Checkpoint, name: str, rows: Any) -> torch.Tensor:
        found = read_rows(checkpoint, name, rows)
        largest.append(found.nbytes)
        return found

    monkeypatch.setattr(Checkpoint, "read_rows", counted)
    pieces = written(tmp_path / "b", "llama")[1]
    # A head of q or k has 8 rows of 16 float32; no more than that is in memory at once.
    assert max(largest) == 8 * 16 * 4
    for one, other in zip(whole.tensors, pieces.tensors, strict=True):
        assert one.name == other.name and np.array_equal(one.data, other.data)
    rows = torch.arange(16).view(16, 1)
    assert interleaved(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_the_tokenizer_is_that_of_the_folder(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    _, reader = written(tmp_path, "llama", eos_token_id=[262, 5], bos_token_id=261, tokenizer=tokenizer)
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert tokens[: len(tokenizer)] == [tokenizer.convert_ids_to_tokens(number) for number in range(len(tokenizer))]
    assert tokens[-1] == f"[PAD{ROWS - 1}]" and len(tokens) == ROWS
    assert (kinds[0], kinds[tokens.index("<|end|>")], kinds[-1]) == (1, 3, 5)
    assert value(reader, "tokenizer.ggml.merges")[:3] == ["t h", "th e", "Ġ the"]
    assert (value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
    special = [value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")]
    assert special == [261, 262, 5]
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.chat_template") == tokenizer.chat_template


def test_a_tokenizer_of_pieces_has_its_merges_as_scores(tmp_path: Path) -> None:
    tokenizer = piece_tokenizer()
    _, reader = written(tmp_path, "mistral", tokenizer=tokenizer)
    names = ("tokens", "scores", "token_type")
    tokens, scores, kinds = (value(reader, f"tokenizer.ggml.{name}") for name in names)
    place = {token: number for number, token in enumerate(tokens)}
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert [scores[place[token]] for token in ("th", "the", "▁the", "12")] == [0.0, -1.0, -2.0, -3.0]
    assert [kinds[place[token]] for token in ("<unk>", "</s>", "<0x41>", "the")] == [2, 3, 6, 1]
    assert value(reader, "tokenizer.ggml.add_space_prefix") is True
    assert value(reader, "tokenizer.ggml.add_bos_token") is False


def test_tokenizers_that_llamacpp_would_not_follow_are_refused(tmp_path: Path, there: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    lower = byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    odd = byte_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]))
    for number, (tokenizer, says) in enumerate(
        [(words, "the kind WordLevel"), (lower, r"changes text first \(Lowercase\)"), (odd, "splits by .*Punctuation")]
    ):
        write_checkpoint(tmp_path / f"{number}", "llama", tokenizer=tokenizer)
        with pytest.raises(UnsupportedModelError, match=says):
            export(tmp_path / f"{number}", "gguf", there / "out.gguf")
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("damage", ["none", "broken", "too many tokens", "eos beyond", "hostile names"])
def test_a_tokenizer_that_does_not_fit_is_refused(damage: str, tmp_path: Path, there: Path) -> None:
    tokenizer = None if damage == "none" else byte_tokenizer()
    if damage == "too many tokens":
        assert tokenizer is not None
        tokenizer.add_tokens([f"<{number}>" for number in range(ROWS)])
    write_checkpoint(tmp_path / "in", "llama", tokenizer=tokenizer)
    settings = tmp_path / "in/generation_config.json"
    if damage == "broken":
        (tmp_path / "in/tokenizer.json").write_text("{")
    elif damage == "eos beyond":
        settings.write_text(json.dumps({"eos_token_id": ROWS}))
    elif damage == "hostile names":
        settings.write_text("[1")
    with pytest.raises(CheckpointError):
        export(tmp_path / "in", "gguf", there / "out.gguf")
    assert list(there.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_act": "gelu"}, "the activation gelu, where llama.cpp computes silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of type dynamic, where default, linear, llama3 can be expressed",
        ),
    ],
)
def test_what_llamacpp_would_compute_otherwise_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path, there: Path
) -> None:
    write_checkpoint(tmp_path / "in", "llama", tokenizer=byte_tokenizer(), **options)
    with pytest.raises(UnsupportedModelError, match=rf"{says}\. Export --to hf-per-layer for another server"):
        export(tmp_path / "in", "gguf", there / "out.gguf")
    assert list(there.iterdir()) == []


def test_without_the_library_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    write_checkpoint(tmp_path / "in", "llama", tokenizer=byte_tokenizer())
    monkeypatch.setattr(target.importlib, "import_module", missing)
    with pytest.raises(target.BackendError, match=r"pip install 'minisp\[export\]'"):
        export(tmp_path / "in", "gguf", tmp_path / "out.gguf")
