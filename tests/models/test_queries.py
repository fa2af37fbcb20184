"""Query heads as a structure: equally many of every key/value group go; keys, values and the cache stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.errors import CheckpointError, ConfigError, UnsupportedModelError
from minisp.export.targets import export
from minisp.models.edits import cut_
from minisp.models.families import decoder_layers, family_of
from minisp.models.skeleton import load_model, skeleton
from minisp.models.structures import Structure, structures_of
from minisp.store.checkpoint import Checkpoint
from minisp.store.writer import write_json
from tests.heads import ALL, HEAD, IDS, OPTIONS, grouped, logits, out_columns
from tests.tiny import HIDDEN, LAYERS, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:144 calibration tokens are few"),
]

CPU = torch.device("cpu")
# Families whose keys have several queries.
GROUPED = tuple(name for name in ALL if name not in ("opt", "gpt2", "gpt_neox"))
KEYS = 2


def queried(model_type: str) -> Any:
    """A tiny model of two groups of three query heads, or four or two where they have to divide the hidden size."""
    heads = {"stablelm": 4, "llama": 8, "gemma2": 8, "gemma3_text": 8}.get(model_type, 6)
    return grouped(model_type, num_attention_heads=heads)


def queries_of(model: Any) -> list[Structure]:
    return structures_of(model, family_of(model.config), ("queries",))


@pytest.mark.parametrize("model_type", GROUPED)
def test_a_unit_is_a_query_head_and_keys_and_values_stay(model_type: str) -> None:
    model, masked, dense = (queried(model_type).double() for _ in range(3))
    for structure in queries_of(model):
        heads = structure.num_units
        assert (structure.groups, structure.columns, structure.head_dim) == (KEYS, HEAD, HEAD)
        layer = decoder_layers(model, family_of(model.config))[structure.layer]
        before = {name: parameter.shape for name, parameter in layer.named_parameters()}
        # Another head of each group.
        gone = [structure.layer % (heads // KEYS), heads // KEYS + (structure.layer + 1) % (heads // KEYS)]
        kept = torch.tensor([head for head in range(heads) if head not in gone])
        cut_(layer, structure, kept)
        lost = sum(before[name].numel() - parameter.numel() for name, parameter in layer.named_parameters())
        assert lost == KEYS * structure.parameters
        out_columns(masked, structure)[structure.columns_of(torch.tensor(gone))] = 0
    assert float((logits(model) - logits(dense)).abs().max()) > 1e-3
    # A norm over all heads sees those that are zeroed, and not those that are gone.
    if model_type != "olmo2":
        torch.testing.assert_close(logits(model), logits(masked))
    cached = model.generate(IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=False))


@pytest.mark.parametrize("model_type", GROUPED)
def test_a_run_end_to_end(model_type: str, tmp_path: Path) -> None:
    model = queried(model_type)
    source, out = save_checkpoint(tmp_path / "source", model), tmp_path / "out"
    report = fast.minify(source, out=out, segment=1, structures=("queries",), **OPTIONS)
    assert any(layer.kept < layer.width for layer in report.layers)
    for layer, kept in zip(report.layers, report.kept, strict=True):
        of_group = kept // (layer.width // KEYS)
        assert torch.bincount(of_group, minlength=KEYS).tolist() == [layer.kept // KEYS] * KEYS
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=report.needs_code).eval()
    in_memory = fast.minify(model, structures=("queries",), **OPTIONS)
    assert [kept.tolist() for kept in in_memory.kept] == [kept.tolist() for kept in report.kept]
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters
    assert torch.equal(logits(loaded), logits(load_model(Checkpoint.open(out), CPU, torch.float32)))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-3)
    written = loaded.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(written, loaded.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, use_cache=False))
    cache = loaded(IDS[:1, :8], use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers} == {KEYS}


def test_uniform_sizes_load_in_the_stock_class_where_its_config_takes_them(tmp_path: Path) -> None:
    for model_type in ("llama", "phi3", "qwen3"):
        source = save_checkpoint(tmp_path / model_type, queried(model_type))
        options = {**OPTIONS, "keep": 0.8, "widths": "uniform", "structures": ("queries",)}
        report = fast.minify(source, out=tmp_path / f"{model_type}-out", **options)
        sizes = {layer.kept for layer in report.layers if layer.structure == "queries"}
        (heads,) = sizes
        assert heads < queries_of(queried(model_type))[0].num_units
        # Llama's config wants heads that divide the hidden size.
        assert report.needs_code == (model_type == "llama" and HIDDEN % heads > 0)
        loaded = AutoModelForCausalLM.from_pretrained(report.out, trust_remote_code=report.needs_code).eval()
        own = load_model(Checkpoint.open(report.out), CPU, torch.float32)  # type: ignore[arg-type]
        if not report.needs_code:
            assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (heads, KEYS)
        assert torch.equal(logits(loaded), logits(own))


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_result_can_be_cut_again_by_the_other_kind(model_type: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", queried(model_type))
    options = {**OPTIONS, "keep": 0.75, "min_keep": 0.0}
    for first, second in (("queries", "attention"), ("attention", "queries")):
        once = fast.minify(source, out=tmp_path / first, structures=("mlp", first), **options)
        twice = fast.minify(once.out, out=tmp_path / f"{first}-{second}", structures=(second,), **options)
        loaded = AutoModelForCausalLM.from_pretrained(twice.out, trust_remote_code=twice.needs_code).eval()
        own = load_model(Checkpoint.open(twice.out), CPU, torch.float32)  # type: ignore[arg-type]
        assert torch.equal(logits(loaded), logits(own)) and logits(own).isfinite().all()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_dead_heads_go_first_wherever_they_are_in_their_groups(model_type: str) -> None:
    model, before = queried(model_type), queried(model_type)
    of_group = queries_of(model)[0].num_units // KEYS
    dead = torch.tensor([1, 2 * of_group - 1])
    for subject in (model, before):
        for structure in queries_of(subject):
            out_columns(subject, structure)[structure.columns_of(dead)] = 0
    options = {**OPTIONS, "structures": ("queries",), "keep": 1 - 1 / of_group, "correct_drift": False}
    report = fast.minify(model, **options)
    alive = [head for head in range(2 * of_group) if head not in dead.tolist()]
    assert [kept.tolist() for kept in report.kept] == [alive] * LAYERS
    torch.testing.assert_close(logits(model), logits(before), rtol=0, atol=1e-4)


def test_keeping_everything_changes_no_bit(tmp_path: Path) -> None:
    for model_type in ("qwen3", "phi3"):
        source = save_checkpoint(tmp_path / model_type, queried(model_type))
        out = tmp_path / f"{model_type}-out"
        fast.minify(source, out=out, **{**OPTIONS, "keep": 1.0, "structures": ("mlp", "queries")})
        before, after = Checkpoint.open(source), Checkpoint.open(out)
        old, new = dict(before.read(before.tensors)), dict(after.read(after.tensors))
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_the_budget_counts_rows_and_columns_of_queries_alone() -> None:
    structure = queries_of(queried("llama"))[0]
    assert structure.parameters == 2 * HEAD * HIDDEN and str(structure) == "Layer 0, queries"


def test_a_query_that_has_its_own_key_is_refused() -> None:
    for model_type in ("gpt2", "gpt_neox", "opt"):
        with pytest.raises(
            UnsupportedModelError, match="expected several query heads for a key head, got one for each"
        ):
            fast.minify(grouped(model_type), structures=("queries",), **OPTIONS)
    with pytest.raises(ConfigError, match="one of attention and queries"):
        fast.minify(queried("llama"), structures=("attention", "queries"), **OPTIONS)


def test_exports_take_what_they_can_express(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", queried("llama"))
    report = fast.minify(source, out=tmp_path / "out", structures=("queries",), **OPTIONS)
    again = export(tmp_path / "out", "hf-per-layer", tmp_path / "again")
    own = load_model(Checkpoint.open(tmp_path / "out"), CPU, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(again.out, trust_remote_code=report.needs_code).eval()
    assert torch.equal(logits(loaded), logits(own))
    for target in ("hf", "padded", "gguf", "nemotron-nas"):
        with pytest.raises(UnsupportedModelError, match="as many heads in every layer"):
            export(tmp_path / "out", target, tmp_path / target)


@pytest.mark.parametrize("sizes", [[4] * (LAYERS - 1), [3] + [4] * (LAYERS - 1), [10] * LAYERS, [0] * LAYERS, "4"])
def test_sizes_that_are_no_whole_groups_are_refused(sizes: Any, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", queried("llama"))
    checkpoint = Checkpoint.open(source)
    write_json(source / "config.json", {**checkpoint.raw_config, "minisp_query_heads": sizes})
    with pytest.raises(CheckpointError, match="minisp_query_heads to list 3 sizes from 2 to 8, multiples of 2"):
        skeleton(Checkpoint.open(source))
