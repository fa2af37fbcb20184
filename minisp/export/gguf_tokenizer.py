"""The tokenizer as GGUF metadata: tokens, merges, special tokens, and llama.cpp's name of how text is split.

llama.cpp has its own splitting code, chosen by a name in the file (`tokenizer.ggml.pre`), so a tokenizer can be
expressed only where that code splits as the tokenizer does. The names here are found from its rules, as transformers
has loaded it, not from what the model is called: for some families transformers has rules that override the file's.
"""

import json
from collections.abc import Iterator
from typing import Any

from minisp.errors import CalibrationError, CheckpointError, UnsupportedModelError
from minisp.store.checkpoint import Checkpoint
from minisp.store.hub import load_tokenizer

# Kinds of tokens, as GGUF numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# What stands for a space in tokenizers of pieces, and llama.cpp's name of how they split text: not at all.
SPACE, PIECES = "▁", "default"

# How tokenizers split text before merging → llama.cpp's name of it. The expressions differ in how many digits stay
# together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS % "{1,3}",): "llama-bpe",
    (_WORDS % "",): "qwen2",
}


def add_tokenizer(writer: Any, checkpoint: Checkpoint, *, rows: int) -> None:
    """Add a checkpoint's tokenizer to a GGUF writer.

    Args:
        rows: of the embedding, for llama.cpp wants a token for each.

    Raises:
        CheckpointError: there is no tokenizer, or it does not fit the model.
        UnsupportedModelError: llama.cpp does not know its kind.
    """
    tokenizer, values = _read(checkpoint)
    model = values["model"]
    prefix = _space_prefix(values)
    if model.get("type") != "BPE" or not (_is_byte_level(values) or (prefix is not None and model["byte_fallback"])):
        raise _unsupported(checkpoint, f"one of the kind {model.get('type')} made neither of bytes nor of pieces")
    name = _split_name(checkpoint, values) if prefix is None else PIECES
    tokens, kinds = _tokens(checkpoint, values, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_tokenizer_pre(name)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if prefix is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(prefix)
    for special, number in _special_tokens(checkpoint, tokenizer):
        if not 0 <= number < rows:
            raise CheckpointError(
                f"{checkpoint.folder}: expected the {special} token below {rows}, the number of embeddings, got "
                f"{number}. Correct the config or the tokenizer."
            )
        getattr(writer, f"add_{special}_token_id")(number)
    writer.add_add_bos_token(_adds_first(tokenizer))
    writer.add_add_eos_token(_adds_last(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _read(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and what its tokenizer.json says or would say."""
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
    except CalibrationError as error:
        raise CheckpointError(f"{error} A GGUF file holds the tokenizer too: repair it.") from error
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a tokenizer, which a GGUF file holds too, found none. Put tokenizer.json "
            "beside the weights."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported(checkpoint, f"a {type(tokenizer).__name__}, which has no tokenizer.json")
    return tokenizer, json.loads(backend.to_str())


def _space_prefix(values: dict[str, Any]) -> bool | None:
    """Whether text gets a leading space, where spaces become ▁ and nothing else is done before merging; else None."""
    before = list(_parts(values["normalizer"], "normalizers"))
    splits = list(_parts(values["pre_tokenizer"], "pretokenizers"))
    if len(splits) == 1 and not before and splits[0]["type"] == "Metaspace" and splits[0]["replacement"] == SPACE:
        return None if splits[0].get("split") else splits[0]["prepend_scheme"] != "never"
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = [{"type": "Prepend", "prepend": SPACE}] if len(before) == 2 else []
    return len(before) == 2 if not splits and before == [*first, replaces] else None


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """llama.cpp merges the pair whose product scores highest: minus the place of the first merge that makes it."""
    place: dict[str, int] = {}
    for number, merge in enumerate(merges):
        place.setdefault("".join(merge), number)
    return [-float(place.get(token, len(merges))) for token in tokens]


def _is_byte_level(values: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(values["pre_tokenizer"], "pretokenizers"))


def _split_name(checkpoint: Checkpoint, values: dict[str, Any]) -> str:
    """llama.cpp's name of how text is split."""
    if normal := [part["type"] for part in _parts(values["normalizer"], "normalizers") if part["type"] != "NFC"]:
        raise _unsupported(checkpoint, f"one that changes text first ({', '.join(normal)})")
    described = []
    for part in _parts(values["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            described.append(str(part["pattern"].get("Regex")))
        elif part["type"] == "Digits" and part["individual_digits"]:
            described.append("Digits")
        elif part["type"] != "ByteLevel" or part["add_prefix_space"]:
            described.append(str(part))
        elif part["use_regex"]:
            described.append("ByteLevel")
    if tuple(described) not in SPLITS:
        raise _unsupported(checkpoint, f"one that splits by {' and '.join(described) or 'nothing'}")
    return SPLITS[tuple(described)]


def _parts(value: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """The parts of a step of tokenizer.json, which may be missing, one, or a sequence."""
    if value is None:
        return
    if value["type"] == "Sequence":
        for part in value[key]:
            yield from _parts(part, key)
    else:
        yield value


def _tokens(checkpoint: Checkpoint, values: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The token of every embedding, and its kind; embeddings without one get a name that no text contains."""
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    found = {number: (token, NORMAL) for token, number in values["model"]["vocab"].items()}
    for added in values["added_tokens"]:
        found[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(found, default=0) >= rows:
        raise CheckpointError(
            f"{checkpoint.folder}: expected tokens below {rows}, the number of embeddings, got {max(found)}. The "
            "tokenizer belongs to another model."
        )
    model = values["model"]
    if model["byte_fallback"] and not _is_byte_level(values):
        bytes_of = {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {model["unk_token"]: UNKNOWN}
        found = {number: (token, bytes_of.get(token, kind)) for number, (token, kind) in found.items()}
    for number, (token, kind) in found.items():
        tokens[number], kinds[number] = token, kind
    return tokens, kinds


def _special_tokens(checkpoint: Checkpoint, tokenizer: Any) -> Iterator[tuple[str, int]]:
    """(GGUF's name, number): those that transformers generates with, and where a config names none, the tokenizer's."""
    generation = _generation_settings(checkpoint)
    for special in ("bos", "eos", "unk", "pad"):
        key = f"{special}_token_id"
        found = [generation.get(key), getattr(checkpoint.config, key, None), getattr(tokenizer, key, None)]
        number = next((value for value in found if value is not None), None)
        if isinstance(number, list) and number:
            if special == "eos" and len(number) > 1:
                yield "eot", number[1]
            number = number[0]
        if type(number) is int:
            yield special, number


def _generation_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / "generation_config.json"
    try:
        values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected valid JSON, got {error}. The file is damaged.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}. The file is damaged.")
    return values


def _adds_first(tokenizer: Any) -> bool:
    return bool(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])


def _adds_last(tokenizer: Any) -> bool:
    return bool(tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id])


def _unsupported(checkpoint: Checkpoint, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{checkpoint.folder}: expected a tokenizer of bytes that llama.cpp has a name for "
        f"({', '.join(SPLITS.values())}), or one of pieces with {SPACE} for a space, got {found}. "
        "Convert the folder with llama.cpp's own converter, or export to hf or padded for another server."
    )
