"""Bad input of every kind: one typed error that says what to do, its exit code, and nothing left behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minisp import fast
from minisp.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    NumericalError,
    UnsupportedModelError,
)
from tests.damage import (
    INDEX,
    OPTIONS,
    SHARDS,
    Change,
    assert_refused,
    config,
    entry,
    file,
    only_pickles,
    poisoned,
    tensor,
)
from tests.tiny import MODEL_TYPES, save_checkpoint, tiny_model

EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
TOKENS = torch.arange(128).reshape(4, 32) % 64
DEEP = "[" * 100_000

NOT_JSON = r"{}: expected valid JSON, got .*The file is damaged"
NOT_AN_OBJECT = r"expected a JSON object, got list\. The file is damaged"
UNREADABLE = r"config\.json: expected what transformers can read, got: .*{}.*Correct it"
LAYER_COUNT = r"expected as many layers as are stored, at least one, got {}\. Correct it"
WIDTHS = r"expected minisp_widths to list 3 sizes from 1 to 48, got .*restore it"
SHAPE = r"expected floating-point values of shape \({}\).* got F32 \({}\)\. The config and the weights belong to"
NOT_FINITE = r"tensor {}: expected finite values, got 1 NaN or infinite of \d+\. .*repair"
TRUNCATED = r"expected a complete safetensors file, got .*truncated or damaged: download it again"
OUTSIDE = r"expected names of \.safetensors files inside the folder, got '{}'\. Do not trust this checkpoint"
DISAGREE = r"expected tensor {} in {}, found it {}\. The index and the shards disagree"
NO_MAP = r"expected weight_map from tensor to file name\. Fix"

DAMAGED: dict[str, tuple[Change, str]] = {
    "no config": (file("config.json", None), r"expected config\.json, found none"),
    "config not JSON": (file("config.json", "{"), NOT_JSON.format(r"config\.json")),
    "config not text": (file("config.json", b"\xff\xfe"), NOT_JSON.format(r"config\.json")),
    "config too deep": (file("config.json", DEEP), NOT_JSON.format(r"config\.json")),
    "config a list": (file("config.json", "[]"), NOT_AN_OBJECT),
    "config without a family": (config(model_type=...), r"expected a key model_type .*got None"),
    "config with a list of families": (config(model_type=["llama"]), r"expected a key model_type .*got \['llama'\]"),
    "config of wrong types": (config(intermediate_size="48"), UNREADABLE.format("got str")),
    "config contradicts itself": (config(num_attention_heads=3), UNREADABLE.format("not a multiple of")),
    "config overflows": (config(hidden_size=2**70), r"expected a buildable model, got: [^\n]*Correct it"),
    "config narrower": (config(intermediate_size=40), SHAPE.format("40, 16", "48, 16")),
    "config of more tokens": (config(vocab_size=65), SHAPE.format("65, 16", "64, 16")),
    "config of more layers": (config(num_hidden_layers=4), r"expected a tensor model\.layers\.3\..*incomplete"),
    "config of fewer layers": (config(num_hidden_layers=2), LAYER_COUNT.format(2)),
    "config of no layers": (config(num_hidden_layers=0), LAYER_COUNT.format(0)),
    "config of a billion layers": (config(num_hidden_layers=10**9), LAYER_COUNT.format(10**9)),
    "widths too few": (config(minisp_widths=[48, 48]), WIDTHS),
    "widths negative": (config(minisp_widths=[48, -8, 48]), WIDTHS),
    "widths huge": (config(minisp_widths=[48, 2**70, 48]), WIDTHS),
    "widths not whole": (config(minisp_widths=[48, 48.0, 48]), WIDTHS),
    "widths not a list": (config(minisp_widths="48"), WIDTHS),
    "widths of other weights": (config(minisp_widths=[48, 40, 48]), SHAPE.format("40, 16", "48, 16")),
    "tensor missing": (tensor(UP, None), DISAGREE.format(UP, ".*", "nowhere")),
    "tensor flat": (tensor(UP, torch.flatten), SHAPE.format("48, 16", "768,")),
    "tensor of integers": (tensor(UP, torch.Tensor.char), r"expected floating-point values.* got I8 "),
    "NaN in a layer": (tensor(UP, poisoned(float("nan"))), NOT_FINITE.format(UP)),
    "infinity in the embeddings": (tensor(EMBEDDING, poisoned(float("inf"))), NOT_FINITE.format(EMBEDDING)),
    "NaN beside the model": (tensor("x", poisoned(float("nan"))), NOT_FINITE.format("x")),
    "shard missing": (file(SHARDS[1], None), rf"expected the shard {SHARDS[1]} that the index names, found none"),
    "shard a byte short": (file(SHARDS[1], lambda old: old[:-1]), TRUNCATED),
    "shard cut in its header": (file(SHARDS[1], lambda old: old[:100]), TRUNCATED),
    "shard empty": (file(SHARDS[1], b""), TRUNCATED),
    "shard with an endless header": (file(SHARDS[1], b"\xff" * 7 + b"\x3f{}"), TRUNCATED),
    "index leads upwards": (entry(EMBEDDING, "../x.safetensors"), OUTSIDE.format(r"\.\./x\.safetensors")),
    "index leads to the root": (entry(EMBEDDING, "/etc/x.safetensors"), OUTSIDE.format(r"/etc/x\.safetensors")),
    "index leads to a config": (entry(EMBEDDING, "config.json"), OUTSIDE.format(r"config\.json")),
    "index names another shard": (entry(EMBEDDING, SHARDS[2]), DISAGREE.format(EMBEDDING, SHARDS[2], "in model.*")),
    "index names a phantom": (entry("phantom", SHARDS[2]), DISAGREE.format("phantom", SHARDS[2], "nowhere")),
    "index not JSON": (file(INDEX, "{'a'"), NOT_JSON.format(INDEX)),
    "index too deep": (file(INDEX, DEEP), NOT_JSON.format(INDEX)),
    "index a list": (file(INDEX, "[1]"), NOT_AN_OBJECT),
    "index without a map": (file(INDEX, "{}"), NO_MAP),
    "index with an empty map": (file(INDEX, '{"weight_map": {}}'), NO_MAP),
    "index with a list": (file(INDEX, '{"weight_map": [1]}'), NO_MAP),
    "index to numbers": (entry(EMBEDDING, 3), NO_MAP),
    "pickles only": (only_pickles, r"expected model\.safetensors.*pickled.*convert them to safetensors"),
}

FAMILY = r"expected one of cohere2, gemma, .*, starcoder2, got '{}'\. Pass a model of a known family"
QUANTISED = r"expected plain floating-point weights, got quantised ones \({}\)\. Dequantise"
ELEMENT = r"expected an element type among F64, F32, .*got {}\. Convert"

UNSUPPORTED: dict[str, tuple[Change, str]] = {
    "family without a row": (config(model_type="bloom"), FAMILY.format("bloom")),
    "family that nobody knows": (
        config(model_type="nova"),
        r"a model type that transformers .* knows, got 'nova'\. Update transformers",
    ),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), QUANTISED.format("gptq")),
    "quantised, oddly": (config(quantization_config="awq"), QUANTISED.format("awq")),
    "float8 weights": (tensor(UP, lambda old: old.to(torch.float8_e4m3fn)), ELEMENT.format("F8_E4M3")),
    "complex values beside the model": (tensor("x", lambda old: old.to(torch.complex64)), ELEMENT.format("C64")),
}

BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "keep nothing": ({"keep": 0}, r"keep: expected a number in \(0, 1\], got 0"),
    "keep too much": ({"keep": 1.5}, r"keep: expected a number in \(0, 1\], got 1\.5"),
    "keep not a number": ({"keep": float("nan")}, r"keep: expected a number in \(0, 1\], got nan"),
    "keep less than fits": (
        {"keep": 0.01, "alignment": 4},
        r"expected at most 69 of 6,912 parameters .*got at least 576.*Lower the alignment",
    ),
    "uniform, less than fits": (
        {"keep": 0.05, "widths": "uniform", "alignment": 4},
        r"expected at most 345 of 6,912 parameters .*got at least 576.*Lower",
    ),
    "alignment too wide": (
        {"alignment": 64},
        r"expected less than the largest layer width, 48, got 64\. Pass a smaller",
    ),
    "alignment zero": ({"alignment": 0}, r"alignment: expected a whole number, at least 1, or None, got 0"),
    "damping negative": ({"damping": -1.0}, r"damping: expected a finite number, at least 0, or 'auto', got -1"),
    "damping infinite": (
        {"damping": float("inf")},
        r"damping: expected a finite number, at least 0, or 'auto', got inf",
    ),
    "min_keep too large": ({"min_keep": 2.0}, r"min_keep: expected a number in \[0, 1\], got 2"),
    "no windows": ({"num_windows": 0}, r"num_windows: expected a whole number, at least 1, got 0"),
    "seed negative": ({"seed": -1}, r"seed: expected a whole number in \[0, 2\*\*63\), got -1"),
    "no such device": ({"device": "abacus"}, r"device: expected a torch device such as cpu.*got 'abacus'"),
    "device without numbers": ({"device": "meta"}, r"expected a device of this machine, got 'meta'.*or auto"),
    "GPU that is not there": ({"device": "cuda:99"}, r"expected a device of this machine, got 'cuda:99'.*or auto"),
}

BAD_TEXTS = {
    "empty": ("a.txt", b"", r"at least one window of 32 tokens from a\.txt, got no text at all\. Pass more text"),
    "white space": ("a.txt", b" \n\t \n", r"at least one window of 32 tokens .*got no text at all\. Pass more text"),
    "too short": ("a.txt", b"just a few words", r"at least one window of 32 tokens .*got 16 tokens\. Pass more text"),
    "not UTF-8": ("a.txt", b"\xe9" * 500, r"Expected UTF-8 text .*Convert it first"),
    "JSONL damaged": ("a.jsonl", b'{"text": ', r"Expected one JSON object per line, got .*line 1"),
    "JSONL too deep": ("a.jsonl", DEEP.encode(), r"Expected one JSON object per line, got .*line 1"),
    "JSONL of numbers": ("a.jsonl", b'{"text": 5}', r"Expected a string in field 'text' .*got int"),
    "JSONL of other fields": ("a.jsonl", b'{"title": "x"}', r"Expected field 'text' or 'content' .*'title'.*Rename"),
}

BAD_SOURCES = {
    "no documents": ([], r"got an empty list"),
    "documents without text": (["", " "], r"got no text at all"),
    "an empty mixture": ({}, r"got an empty one"),
    "a number": (5, r"Expected a path.* got int"),
    "a missing file": ("missing.txt", r"Expected a text file, got 'missing\.txt'.*Check the path"),
    "floats": (TOKENS.float(), r"Expected integer tokens, got a tensor of torch\.float32"),
    "tokens beyond the vocabulary": (TOKENS + 1, r"Expected tokens in \[0, 64\) .*got 64\. Use the tokenizer"),
    "tokens below zero": (TOKENS - 1, r"Expected tokens in \[0, 64\) .*got -1\. Use the tokenizer"),
    "no windows": (TOKENS[:0], r"at least one window of 32 tokens, got 0 tokens"),
    "windows of one token": (TOKENS[:, :1], r"at least 2 tokens .*got 1"),
    "windows beyond the positions": (TOKENS.reshape(1, 128), r"at most 64 tokens, the positions .*got 128"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama checkpoint of three shards, which no test changes."""
    return save_checkpoint(tmp_path_factory.mktemp("good") / "model", tiny_model("llama"), max_shard_size="20KB")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize(("change", "says"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_is_refused(change: Change, says: str, copy: Path, text: Path, there: Path) -> None:
    change(copy)
    assert_refused(copy, text, CheckpointError, says, there)


@pytest.mark.parametrize(("change", "says"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_model_is_refused(change: Change, says: str, copy: Path, text: Path, there: Path) -> None:
    change(copy)
    assert_refused(copy, text, UnsupportedModelError, says, there)


@pytest.mark.parametrize("content", [None, "{}"], ids=["missing", "damaged"])
def test_text_needs_a_tokenizer(content: str | None, copy: Path, text: Path, there: Path) -> None:
    file("tokenizer.json", content)(copy)
    assert_refused(copy, text, CalibrationError, r"tokenizer.*Pass", there)


def test_weights_that_overflow_are_a_numerical_failure(copy: Path, text: Path, there: Path) -> None:
    tensor(UP, lambda old: old * 1e30)(copy)
    assert_refused(
        copy, text, NumericalError, r"Layer \d, mlp: expected finite statistics, got \d+ of 48 units .*Check", there
    )


@pytest.mark.parametrize(("options", "says"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_an_option_out_of_range_is_refused(
    options: dict[str, Any], says: str, good: Path, text: Path, there: Path
) -> None:
    assert_refused(good, text, ConfigError, says, there, **options)
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        fast.plan(good, **OPTIONS | options)


@pytest.mark.parametrize(("window", "says"), [(65, r"at most 64 tokens.*got 65"), (1, r"at least 2 tokens .*got 1")])
def test_a_window_that_the_model_cannot_take_is_refused(
    window: int, says: str, good: Path, text: Path, there: Path
) -> None:
    assert_refused(good, text, CalibrationError, says, there, window=window)


@pytest.mark.parametrize(("name", "content", "says"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_text_is_refused(name: str, content: bytes, says: str, good: Path, there: Path) -> None:
    path = there.with_name(name)
    path.write_bytes(content)
    assert_refused(good, path, CalibrationError, says, there)


@pytest.mark.parametrize(("source", "says"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_bad_source_of_calibration_is_refused(source: Any, says: str, good: Path, there: Path) -> None:
    # Ready-made windows bring their own length.
    options = {**OPTIONS, "window": source.shape[1]} if isinstance(source, torch.Tensor) else OPTIONS
    with pytest.raises(CalibrationError, match=f"(?s){says}"):
        fast.minify(good, out=there / "out", calibration=source, **options)
    assert list(there.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kepe": 0.5}, r"Unknown option kepe: expected one of keep, target_size, .*Check the spelling"),
        ({"keep": "0.5"}, r"keep: expected a number in \(0, 1\], got '0\.5'"),
        ({"keep": None}, r"keep: expected a number in \(0, 1\], got None"),
        ({"keep": True}, r"keep: expected a number in \(0, 1\], got True"),
        ({"num_windows": 2.5}, r"num_windows: expected a whole number, at least 1, got 2\.5"),
        ({"batch": True}, r"batch: expected a whole number, at least 1, or None, got True"),
        ({"saliency": "magic"}, r"saliency: expected one of taylor, fisher, signed, got 'magic'"),
        ({"widths": ["uniform"]}, r"widths: expected one of per-layer, uniform, got \['uniform'\]"),
        ({"device": 3}, r"device: expected a torch device such as cpu or cuda:0, got 3"),
    ],
)
def test_an_option_of_another_name_or_type_is_refused(options: dict[str, Any], says: str, good: Path) -> None:
    for function in (fast.plan, fast.minify):
        with pytest.raises(ConfigError, match=f"(?s){says}"):
            function(good, **OPTIONS | options)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing/folder/model", r"expected a checkpoint folder, a \.gguf file or a hub id, got .*Check the path"),
        ("model/config.json", r"expected a checkpoint folder, a \.gguf file or a hub id, got .*Check the path"),
        ("missing.gguf", r"expected a GGUF file, found none at .*Check the path"),
        ("damaged.gguf", r"cannot read this GGUF file: .*a complete file"),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    name: str, says: str, copy: Path, text: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy.parent / "damaged.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    monkeypatch.setenv("MINISP_CACHE", str(there))
    assert_refused(copy.parent / name, text, CheckpointError, says, there)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_searched_for_nan(model_type: str, there: Path) -> None:
    model = tiny_model(model_type)
    next(p for n, p in model.named_parameters() if ".1." in n and p.dim() == 2).data[0, 0] = float("nan")
    folder = save_checkpoint(there.parent / "nan", model)
    with pytest.raises(CheckpointError, match="expected finite values, got 1 NaN or infinite"):
        fast.minify(folder, out=there / "out", calibration=TOKENS, **OPTIONS)
    assert list(there.iterdir()) == []


def test_a_module_that_is_no_language_model_is_refused() -> None:
    for module in (nn.Linear(2, 2), nn.Module(), tiny_model("llama").model):
        with pytest.raises(UnsupportedModelError, match="expected a transformers causal language model, got"):
            fast.minify(module, calibration=TOKENS, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"expected weights in memory, got .*meta device\. Load it first"):
        fast.minify(tiny_model("llama").to("meta"), calibration=TOKENS, **OPTIONS)


def test_a_module_with_nan_is_refused_and_left_as_it_was() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NumericalError, match=r"expected finite statistics, got .* Check the weights"):
        fast.minify(model, calibration=TOKENS, window=32, labels="text")
    with pytest.raises(NumericalError, match=r"Expected finite logits .* Check the weights"):
        fast.minify(model, calibration=TOKENS, window=32)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
