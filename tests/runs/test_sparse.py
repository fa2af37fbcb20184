"""Zeros in linear maps, end to end: pattern and share proven on what was written, the same bytes however it ran."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.errors import ConfigError, OutputError
from minisp.methods.sparse import sparsity_facts
from minisp.models.families import decoder_layers, family_of
from minisp.models.maps import linear_maps
from minisp.models.structures import weight_view
from tests.tiny import LAYERS, MODEL_TYPES, OTHER_TYPES, save_checkpoint, tiny_model
from tests.toys import windows

FEW = "ignore:.* calibration tokens are few:UserWarning"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(FEW)]
IDS = windows(6, 16)
OPTIONS: dict[str, Any] = {"calibration": IDS, "dtype": "float32", "batch": 2}
SURGEON: dict[str, Any] = {**OPTIONS, "method": "surgeon", "shots": 2}
PATTERNS = [("2:4", 0.5), ("4:8", 0.5), ("unstructured", 0.6), ("rows-columns", 0.8)]


def weights_of(model: Any) -> dict[str, Tensor]:
    """Name of a linear map → its weight (R, C)."""
    family = family_of(model.config)
    layers = decoder_layers(model, family)
    return {
        f"{x.layer}.{x.path}": weight_view(layers[x.layer].get_submodule(x.path)).detach()
        for x in linear_maps(model, family)
    }


def zeros_share(model: Any) -> float:
    weights = weights_of(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# Every pattern on one family of each shape, and one pattern on each of the others.
EVERY = [(name, *pattern) for name in ("llama", "gpt2", "opt") for pattern in PATTERNS]
EVERY += [(name, *PATTERNS[i % 4]) for i, name in enumerate((*MODEL_TYPES[1:4], *OTHER_TYPES))]


@pytest.mark.parametrize(("model_type", "pattern", "keep"), EVERY)
def test_every_family_gets_the_pattern_and_a_stock_checkpoint(
    model_type: str, pattern: str, keep: float, tmp_path: Path
) -> None:
    dense = tiny_model(model_type)
    source = save_checkpoint(tmp_path / "dense", dense)
    report = fast.minify(source, out=tmp_path / "out", pattern=pattern, keep=keep, **SURGEON)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not report.needs_code and not list((tmp_path / "out").glob("*.py"))
    facts = [sparsity_facts(weight, pattern) for weight in weights_of(model).values()]  # type: ignore[arg-type]
    assert all(found.holds for found in facts)
    # A row or column goes whole, so a little more may go.
    assert 1 - keep <= zeros_share(model) < 1 - keep + (0.02 if pattern == "rows-columns" else 0.005)
    assert [x.zeros for x in report.maps] == [found.zeros for found in facts]
    if pattern == "rows-columns":
        assert any(found.zero_rows for found in facts) and any(found.zero_columns for found in facts)
    # The rest of the model is as it was.
    embedding = model.get_input_embeddings().weight
    torch.testing.assert_close(embedding, dense.get_input_embeddings().weight, rtol=0, atol=0)
    in_memory = fast.minify(dense, pattern=pattern, keep=keep, **SURGEON).model
    assert in_memory is not None
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, in_memory(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize(("pattern", "keep"), [("2:4", 0.5), ("unstructured", 0.5)])
def test_the_methods_to_compare_with(method: str, pattern: str, keep: float) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    fast.minify(model, method=method, pattern=pattern, keep=keep, **OPTIONS)
    assert zeros_share(model) == pytest.approx(1 - keep, abs=0.003)
    for (name, old), new in zip(weights_of(dense).items(), weights_of(model).values(), strict=True):
        assert sparsity_facts(new, pattern).holds  # type: ignore[arg-type]
        same = torch.equal(new[new != 0], old[new != 0])
        # Wanda and magnitude change nothing that stays; SparseGPT does.
        assert same == (method != "sparsegpt"), name
        if method == "magnitude" and pattern == "unstructured":
            assert float(old[new == 0].abs().max()) <= float(old[new != 0].abs().min())


def test_the_surgeon_loses_less_of_its_own_loss_than_masks_alone() -> None:
    """On the calibration tokens of a random model, at half of the weights: against magnitude and Wanda."""

    def loss(model: Any) -> float:
        with torch.no_grad():
            logits = model(IDS).logits
            before = tiny_model("llama")(IDS).logits
        return float(torch.nn.functional.kl_div(logits.log_softmax(-1), before.softmax(-1), reduction="sum"))

    found = {}
    for method in ("surgeon", "wanda", "magnitude"):
        model = tiny_model("llama")
        fast.minify(model, method=method, pattern="unstructured", keep=0.5, **OPTIONS)
        found[method] = loss(model)
    assert found["surgeon"] < 0.7 * min(found["wanda"], found["magnitude"])


def run(source: Path, out: Path, **options: Any) -> bytes:
    fast.minify(source, out=out, **{**SURGEON, "pattern": "unstructured", "keep": 0.6, **options})
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_model("qwen2"))


@pytest.mark.parametrize("pattern", ["unstructured", "rows-columns", "2:4"])
def test_a_run_that_was_stopped_anywhere_ends_with_the_same_bytes(pattern: str, source: Path, tmp_path: Path) -> None:
    options = {"pattern": pattern, "keep": 0.5 if pattern == "2:4" else 0.6, "segment": 1}
    steps: list[tuple[str, int]] = []

    def note(phase: str, done: int, total: int) -> None:
        steps.append((phase, done))

    expected = run(source, tmp_path / "whole", progress=note, **options)
    assert {phase.split(",")[0] for phase, _ in steps} >= {"forward", "curvature", "update"}
    for place in range(1, len(steps), 19):
        out, told = tmp_path / str(place), 0

        def interrupt(phase: str, done: int, total: int, place: int = place) -> None:
            nonlocal told
            told += 1
            if told == place:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(source, out, progress=interrupt, **options)
        assert not out.exists()
        again = run(source, out, resume=True, **{**options, "segment": 1 + place % LAYERS})
        assert again == expected, steps[place - 1]
        assert not (tmp_path / f".{place}.scratch").exists()


def test_other_options_refuse_what_an_earlier_run_left(source: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase.startswith("update"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", progress=interrupt)
    for option in ({"keep": 0.7}, {"shots": 3}, {"gradient_damping": 0.2}, {"damping": 0.1}):
        with pytest.raises(OutputError, match=next(iter(option))):
            run(source, tmp_path / "out", resume=True, **option)


def test_the_stored_type_stays(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "dense", tiny_model("llama").bfloat16())
    run(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_2_4_is_what_torch_s_semi_structured_layout_takes(tmp_path: Path) -> None:
    """The conversion that `to_sparse_semi_structured` makes on a GPU, on the CPU: nothing is lost both ways."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    model = tiny_model("llama", **shape)
    fast.minify(model, pattern="2:4", keep=0.5, **SURGEON)
    for weight in weights_of(model).values():
        half = weight.bfloat16()
        packed, indices = sparse_semi_structured_from_dense_cutlass(half)
        assert packed.numel() == half.numel() // 2
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, indices), half)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "wanda"}, "pattern"),
        ({"pattern": "2:4"}, "pattern"),
        ({"method": "surgeon", "pattern": "2:4", "keep": 0.8}, "keep"),
        ({"method": "surgeon", "pattern": "unstructured", "keep": 1.0}, "keep"),
        ({"shots": 2}, "shots"),
        ({"method": "surgeon", "saliency_windows": 2}, "method"),
        ({"method": "surgeon", "damping": "auto"}, "method"),
        ({"method": "surgeon", "gradient_damping": 0}, "gradient_damping"),
        ({"method": "newton"}, "method"),
        ({"method": "surgeon", "pattern": "3:4"}, "pattern"),
    ],
)
def test_options_that_exclude_each_other_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"Option {named}: expected .*, got .*"):
        fast.minify(tiny_model("llama"), calibration=IDS, **options)


def test_groups_that_do_not_fill_the_rows_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"54 inputs of Layer 0, mlp\.down_proj"):
        fast.plan(tiny_model("llama", intermediate_size=54), method="surgeon", pattern="4:8", keep=0.5, window=16)
