"""Tiny random language models of every family, and checkpoint folders of them, for tests that need a real model."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# One or more of every shape: with and without gate, biases, norms of heads, parts that the layer calls, Conv1D.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt2")
# What only the contract test of the families runs: fused gate and up, norms behind the MLP, parallel branches, soft
# caps, factors on embeddings, residuals and logits.
OTHER_TYPES = (
    "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_neox", "granite", "olmo2", "phi3", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip

LAYERS, HIDDEN, WIDTH, HEADS, POSITIONS, VOCABULARY = 3, 16, 48, 2, 64, 64

_SPECIAL = ("<unk>", "<s>", "</s>")
# One token per character: no text is a special case, and its number of tokens is its length.
_CHARACTERS = string.ascii_lowercase + string.digits + " \n.,;:!?()[]{}'\"-_+=*/<>"

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_SHAPED = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
# The ids that these families reserve lie beyond so small a vocabulary.
_PADDED = {**_LLAMA_SHAPED, "pad_token_id": 0}
_CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_SHAPED),
    **dict.fromkeys(("gemma", "olmo2", "smollm3", "stablelm", "starcoder2", "phi3"), _PADDED),
    "cohere2": {**_PADDED, "logit_scale": 0.3, "sliding_window": 8},
    "gemma2": {
        **_PADDED,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_PADDED, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "glm4": {**_PADDED, "attention_bias": True},
    "granite": {
        **_PADDED,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "gpt_neox": {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
    },
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "init_std": 0.3,
    },
    "gpt2": {
        "n_embd": HIDDEN,
        "n_inner": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": POSITIONS,
        "initializer_range": 0.3,
    },
}


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 causal language model in evaluation mode, the same for the same arguments.

    Biases and norms are random too, where transformers starts them at zero and one: a test would not see them missing.

    Args:
        model_type: one of `MODEL_TYPES` or `OTHER_TYPES`.
        seed: of the weights; torch's own generator is left as it was.
        **overrides: config values in the family's own names.
    """
    config = AutoConfig.for_model(model_type, **{**_COMMON, **_CONFIGS[model_type], **overrides})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def char_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of `VOCABULARY` tokens, one per character, which adds no special tokens."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    assert len(vocabulary) <= VOCABULARY
    # Byte pairs without a single merge leave the characters.
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=_SPECIAL[0]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=_SPECIAL[0], bos_token=_SPECIAL[1], eos_token=_SPECIAL[2]
    )


def save_checkpoint(folder: Path, model: Any, tokenizer: bool = True, *, max_shard_size: str = "5GB") -> Path:
    """Write a model as a safetensors folder, by default with `char_tokenizer`; returns the folder.

    Args:
        max_shard_size: such as "20KB", to get several shards and an index.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        char_tokenizer().save_pretrained(folder)
    return folder
