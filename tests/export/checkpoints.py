"""Tiny checkpoints whose layers have chosen widths, as a run would write them, and a tokenizer of bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from minisp.export.modeling import FILE_NAME, modeling_source, sized_config
from minisp.export.tensors import module_entries, module_tensors
from minisp.models.edits import apply_, edits_of
from minisp.models.families import decoder_layers, family_of
from minisp.models.skeleton import size_keys
from minisp.models.structures import structures_of
from minisp.store.writer import write_json, write_tensors
from tests.tiny import tiny_model

WIDTHS = (32, 48, 16)
# More than any tokenizer here has tokens.
ROWS = 400


def byte_tokenizer(split: pre_tokenizers.PreTokenizer | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges and two special tokens, as GPT-2's; `split` is done before merging."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("12", "3")]
    tokens = [*letters, *("".join(pair) for pair in merges), "<|begin|>", "<|end|>"]
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template="{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}",
    )


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of pieces in which ▁ stands for a space and unknown characters become bytes, as Llama 2's."""
    letters = [chr(code) for code in range(33, 127)]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("1", "2"), ("12", "3"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *letters, "▁", "œ", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def split_by(expression: str) -> pre_tokenizers.PreTokenizer:
    """Splitting by a regular expression, as newer tokenizers do."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), bytes_only])


def write_checkpoint(
    folder: Path, model_type: str, widths: Sequence[int] = WIDTHS, *, tokenizer: Any = None, **overrides: Any
) -> Any:
    """Write a random model whose layers have these MLP widths, the first units of wider ones; returns the model."""
    sizes = {"vocab_size": ROWS} | overrides
    model = tiny_model(model_type, **sizes)
    family = family_of(model.config)
    layers = decoder_layers(model, family)
    structures = structures_of(model, family)
    for structure, width in zip(structures, widths, strict=True):
        apply_(layers[structure.layer], edits_of(structure, torch.arange(width)))
    folder.mkdir(parents=True)
    keys = size_keys(family, model.config, structures, widths)
    tensors = module_tensors(model)
    write_tensors(folder, module_entries(tensors), tensors)
    config, needs_code = sized_config(model, model.config.to_dict(), keys, {"mlp"})
    write_json(folder / "config.json", config)
    if needs_code:
        (folder / FILE_NAME).write_text(modeling_source(model, family), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model
