"""A Llama-shaped checkpoint of a stated size with random weights: a multi-billion model without a download.

    python benchmarks/synthetic.py OUT --params 3B [--layers N] [--seed 0]

Shards are written one tensor at a time, a large one in pieces: 70 billion parameters need little memory. Weights
are normal with standard deviation 0.02, norms are one. The tokenizer has one token per byte: any text can calibrate.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from minisp.store.writer import Entry, check_output, output_folder, write_json, write_tensors

# Shapes of SmolLM2-135M and of published Llama models:
# hidden size, MLP width, layers, heads, key-value heads, vocabulary, tied embeddings.
SHAPES = {
    "tiny": (64, 192, 4, 4, 2, 512, True),
    "135M": (576, 1536, 30, 9, 3, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "70B": (8192, 28672, 80, 64, 8, 128256, False),
}
PIECE_ELEMENTS = 2**24


def llama_config(size: str, layers: int | None = None) -> LlamaConfig:
    """The transformers config of a size in `SHAPES`, with another number of layers where one is given."""
    hidden, width, num_layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers or num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def entries(config: LlamaConfig) -> list[Entry]:
    """Every tensor, in the order of the layers."""
    d, m, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (config.num_attention_heads * config.head_dim, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, config.num_attention_heads * config.head_dim),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (m, d),
        "mlp.up_proj": (m, d),
        "mlp.down_proj": (d, m),
    }
    found = [("model.embed_tokens.weight", (config.vocab_size, d))]
    for layer in range(config.num_hidden_layers):
        found += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    found.append(("model.norm.weight", (d,)))
    if not config.tie_word_embeddings:
        found.append(("lm_head.weight", (config.vocab_size, d)))
    return [Entry(name, shape, "BF16") for name, shape in found]


def pieces(tensors: list[Entry], seed: int) -> Iterator[tuple[str, Tensor]]:
    """The values, in pieces of whole rows."""
    generator = torch.Generator().manual_seed(seed)
    for entry in tensors:
        if len(entry.shape) == 1:
            yield entry.name, torch.ones(entry.shape, dtype=torch.bfloat16)
            continue
        rows, columns = entry.shape
        for count in torch.arange(rows).split(max(1, PIECE_ELEMENTS // columns)):
            # Drawn in float32, for which torch has vector code.
            piece = torch.empty(len(count), columns).normal_(0, 0.02, generator=generator)
            yield entry.name, piece.to(torch.bfloat16)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_synthetic(out: Path, size: str, layers: int | None = None, seed: int = 0) -> None:
    """Write the checkpoint to a new folder."""
    config = llama_config(size, layers)
    table = entries(config)
    with output_folder(check_output(out, sum(entry.num_bytes for entry in table))) as folder:
        write_tensors(folder, table, pieces(table, seed))
        write_json(folder / "config.json", config.to_dict())
        byte_tokenizer().save_pretrained(folder)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description="A Llama-shaped checkpoint with random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--params", choices=SHAPES, default="3B")
    parser.add_argument("--layers", type=int, default=None, help="another number of layers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_synthetic(args.out, args.params, args.layers, args.seed)
    print(args.out)


if __name__ == "__main__":
    main()
