"""The targets that are folders: transformers loads from them what computes as the source does, or they are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.config import MinifyConfig
from minisp.errors import CheckpointError, ConfigError, MinispError, OutputError, UnsupportedModelError
from minisp.export.modeling import FILE_NAME
from minisp.export.targets import TARGETS, check_planned, export
from minisp.models.skeleton import KEYS
from minisp.store.writer import MANIFEST_NAME
from tests.export.checkpoints import ROWS, WIDTHS, byte_tokenizer, write_checkpoint
from tests.tiny import save_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(ROWS, (2, 24), generator=torch.Generator().manual_seed(0))
    found: Tensor = model.double()(input_ids=ids).logits
    return found


def loaded(folder: Path, *, trust: bool = False) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()


def same(found: Tensor, expected: Tensor) -> bool:
    # In float64 all that differs is the order of sums.
    return bool((found - expected).abs().max() <= 1e-12 * expected.abs().max())


# Every way in which a family stores an MLP: gate and up apart, fused, biases, transposed weights, a layer's own parts.
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "starcoder2", "gpt_neox", "opt", "gpt2"])
def test_padding_gives_the_stock_class_the_same_function(model_type: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "in", model_type)
    result = export(tmp_path / "in", "padded", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert KEYS["mlp"] not in config and "auto_map" not in config and not (tmp_path / "out" / FILE_NAME).exists()
    stock = loaded(tmp_path / "out")
    assert type(stock).__module__.startswith("transformers.models.")
    assert same(logits(stock), logits(model))
    assert result.widths == WIDTHS


def test_a_padded_folder_is_uniform_and_goes_on_to_other_targets(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "in", "qwen3", tokenizer=byte_tokenizer())
    export(tmp_path / "in", "padded", tmp_path / "padded")
    assert export(tmp_path / "padded", "hf", tmp_path / "out").widths == (48, 48, 48)
    assert same(logits(loaded(tmp_path / "out")), logits(model))
    export(tmp_path / "padded", "gguf", tmp_path / "out.gguf")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_layers_of_their_own_widths_keep_them(model_type: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "in", model_type)
    export(tmp_path / "in", "hf-per-layer", tmp_path / "out")
    assert same(logits(loaded(tmp_path / "out", trust=True)), logits(model))


def test_one_width_is_written_for_the_stock_class_without_what_the_source_said_of_code(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "in", "llama", (32, 32, 32), tokenizer=byte_tokenizer())
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (tmp_path / "in/evil.py").write_text("raise SystemExit")
    export(tmp_path / "in", "hf", tmp_path / "out")
    assert same(logits(loaded(tmp_path / "out")), logits(model))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", MANIFEST_NAME} <= files and "evil.py" not in files
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_exporting_twice_writes_the_same_bytes_and_their_digests(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "llama")
    for name in ("a", "b"):
        export(tmp_path / "in", "padded", tmp_path / name)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]
    assert set(json.loads(contents[0][MANIFEST_NAME])["sha256"]) == set(contents[0]) - {MANIFEST_NAME}


def test_the_layout_of_nemotron_nas_lists_every_layer_and_loads_in_transformers(tmp_path: Path) -> None:
    widths = (256, 512, 256)
    model = write_checkpoint(tmp_path / "in", "llama", widths, intermediate_size=512)
    export(tmp_path / "in", "nemotron-nas", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "nemotron-nas" and config["architectures"] == ["DeciLMForCausalLM"]
    found = loaded(tmp_path / "out", trust=True)
    assert same(logits(found), logits(model))
    # What readers of the layout do with it.
    for block, width in zip(found.config.block_configs, widths, strict=True):
        read = int(2 * block.ffn.ffn_mult * config["hidden_size"] / 3)
        assert -(-read // 256) * 256 == width and block.ffn.no_op is False
        assert config["num_attention_heads"] // block.attention.n_heads_in_group == config["num_key_value_heads"]


@pytest.mark.parametrize(
    ("target", "model_type", "widths", "says"),
    [
        ("hf", "llama", WIDTHS, r"expected layers of one width.*from 16 to 48\. Use hf-per-layer .*padded .*gguf"),
        ("hf-per-layer", "llama", (16, 16, 16), r"expected layers of different widths, got 16 in all of them\. Use hf"),
        ("nemotron-nas", "qwen3", WIDTHS, r"expected a llama model .*, got qwen3\. Use hf-per-layer"),
        (
            "nemotron-nas",
            "llama",
            WIDTHS,
            r"multiples of 256, got 16, 32, 48\. Minify with --alignment 256, or use hf-p",
        ),
        ("gguf", "qwen3", WIDTHS, r"got qwen3 with widths from 16 to 48\. .*--widths uniform, or export --to padded"),
        ("gguf", "gpt2", (16, 16, 16), r"expected one of llama, mistral, qwen2, qwen3, got gpt2\. Export --to hf"),
    ],
)
def test_what_a_target_cannot_express_is_refused_with_one_that_can(
    target: str, model_type: str, widths: tuple[int, ...], says: str, tmp_path: Path, there: Path
) -> None:
    write_checkpoint(tmp_path / "in", model_type, widths)
    with pytest.raises(UnsupportedModelError, match=says):
        export(tmp_path / "in", target, there / "out")
    assert list(there.iterdir()) == []


def test_unknown_targets_and_types_are_refused(tmp_path: Path, there: Path) -> None:
    write_checkpoint(tmp_path / "in", "llama")
    with pytest.raises(ConfigError, match="expected one of hf, hf-per-layer, padded, gguf, nemotron-nas, got 'onnx'"):
        export(tmp_path / "in", "onnx", there / "out")
    with pytest.raises(ConfigError, match="Option dtype: expected none for the target padded"):
        export(tmp_path / "in", "padded", there / "out", dtype="f16")
    with pytest.raises(ConfigError, match="expected one of f32, f16, bf16, q8_0, got 'q4_k'"):
        export(tmp_path / "in", "gguf", there / "out", dtype="q4_k")
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("target", ["padded", "gguf"])
@pytest.mark.parametrize("damage", ["nan", "truncated", "no config", "shard outside", "no folder", "disk full"])
def test_a_failed_export_leaves_nothing(
    target: str, damage: str, tmp_path: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    write_checkpoint(folder, "llama", tokenizer=byte_tokenizer())
    error: type[MinispError] = CheckpointError
    data = (folder / "model.safetensors").read_bytes()
    if damage == "nan":
        (folder / "model.safetensors").write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    elif damage == "truncated":
        (folder / "model.safetensors").write_bytes(data[:-100])
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "shard outside":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/x.safetensors"}}')
    elif damage == "no folder":
        folder = tmp_path / "none"
    else:
        error = OutputError
        monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(error):
        export(folder, target, there / "out")
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_stands_at_the_output_path_is_left_alone(target: str, tmp_path: Path, there: Path) -> None:
    widths = (16, 16, 16) if target == "hf" else (256, 512, 256)
    write_checkpoint(tmp_path / "in", "llama", widths, tokenizer=byte_tokenizer(), intermediate_size=512)
    (there / "out").write_text("data")
    with pytest.raises(OutputError, match=r"expected a new .*, got a file"):
        export(tmp_path / "in", target, there / "out")
    assert [path.read_text() for path in there.iterdir()] == ["data"]


def test_uneven_heads_are_for_the_modelling_file_alone(tmp_path: Path) -> None:
    ids = torch.randint(60, (6, 24), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    options: dict[str, Any] = {"structures": ("attention",), "keep": 0.7, "dtype": "float32", "calibration": ids}
    fast.minify(save_checkpoint(tmp_path / "in", model), out=tmp_path / "cut", **options)
    for target in ("hf", "padded", "gguf", "nemotron-nas"):
        with pytest.raises(UnsupportedModelError, match=f"Target {target}: expected as many heads .* Use hf-per-layer"):
            export(tmp_path / "cut", target, tmp_path / target)
    export(tmp_path / "cut", "hf-per-layer", tmp_path / "out")
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True) for name in ("cut", "out")
    )
    assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize(
    ("target", "model_type", "options", "says"),
    [
        ("hf", "llama", {}, r"got widths from 1 to 48\. Use hf-per-layer"),
        ("hf", "llama", {"widths": "uniform"}, None),
        ("hf", "llama", {"keep": 1.0}, None),
        ("hf-per-layer", "llama", {}, None),
        ("hf-per-layer", "llama", {"widths": "uniform"}, r"got 24 in all of them\. Use hf"),
        ("padded", "qwen3", {}, None),
        ("nemotron-nas", "llama", {}, r"multiples of 256, got 1, 48\. Minify with --alignment 256"),
        ("gguf", "llama", {}, None),
        ("gguf", "qwen3", {}, r"got qwen3 with widths from 1 to 48"),
        ("gguf", "qwen3", {"widths": "uniform"}, None),
        ("gguf", "gpt2", {"widths": "uniform"}, "expected one of llama"),
        ("hf", "llama", {"structures": ("attention",)}, r"expected as many heads .* Use hf-per-layer"),
        ("hf", "llama", {"structures": ("attention",), "widths": "uniform"}, None),
        ("hf-per-layer", "llama", {"structures": ("attention",)}, None),
        ("hf", "gpt2", {"structures": ("attention",), "widths": "uniform"}, r"expected as many heads"),
    ],
)
def test_a_plan_that_a_target_cannot_express_is_refused_before_the_run(
    target: str, model_type: str, options: dict[str, Any], says: str | None, tmp_path: Path
) -> None:
    sizes = {"num_key_value_heads": 2} if model_type == "llama" else {}
    write_checkpoint(tmp_path / "in", model_type, (48, 48, 48), tokenizer=byte_tokenizer(), **sizes)
    config = MinifyConfig(**{"keep": 0.5, **options})
    if says is None:
        check_planned(tmp_path / "in", target, config)
    else:
        with pytest.raises(UnsupportedModelError, match=says):
            check_planned(tmp_path / "in", target, config)


def test_multiples_of_256_are_planned_for_nemotron_nas(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "llama", (768,) * 3, intermediate_size=768)
    check_planned(tmp_path / "in", "nemotron-nas", MinifyConfig(alignment=128, tp=2))
    with pytest.raises(UnsupportedModelError, match="got 128"):
        check_planned(tmp_path / "in", "nemotron-nas", MinifyConfig(alignment=128))


def test_no_tokenizer_is_refused_for_gguf_before_the_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "llama", (48,) * 3)
    with pytest.raises(CheckpointError, match="expected a tokenizer"):
        check_planned(tmp_path / "in", "gguf", MinifyConfig())
