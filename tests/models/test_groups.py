"""Attention groups as a structure: what one is in every family, what cutting it does, and whole runs with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.errors import ConfigError, UnsupportedModelError
from minisp.methods.statistics import Statistics
from minisp.models.edits import cut_
from minisp.models.families import decoder_layers, family_of
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen, load_model
from minisp.models.stream import Stream
from minisp.models.structures import Structure, structures_of
from minisp.models.watch import watch
from minisp.store.checkpoint import Checkpoint
from tests.heads import ALL, HEAD, IDS, MULTI_HEAD, OPTIONS, grouped, logits, out_columns
from tests.tiny import HIDDEN, LAYERS, WIDTH, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:144 calibration tokens are few"),
]

CPU = torch.device("cpu")
BOTH = ("mlp", "attention")


def groups_of(model: Any) -> list[Structure]:
    return structures_of(model, family_of(model.config), ("attention",))


@pytest.mark.parametrize("model_type", ALL)
def test_a_group_is_a_key_a_value_and_the_queries_that_read_them(model_type: str) -> None:
    model = grouped(model_type)
    units = 4 if model_type in ("opt", "gpt2", "gpt_neox") else 2
    for structure in groups_of(model):
        layer = decoder_layers(model, family_of(model.config))[structure.layer]
        assert (structure.num_units, structure.columns, structure.head_dim) == (units, 4 // units * HEAD, HEAD)
        covered: dict[str, list[int]] = {}
        for part in structure.slices:
            places = part.places(torch.arange(units)).tolist()
            covered.setdefault(part.parameter, []).extend(places)
        for name, places in covered.items():
            axis = next(part.axis for part in structure.slices if part.parameter == name)
            assert sorted(places) == list(range(layer.get_parameter(name).shape[axis])), name
        total = sum(layer.get_parameter(name).numel() for name in covered)
        assert structure.parameters * units == total
        # All parameters of the attention are cut but norms of single heads and the bias of its output.
        attention = layer.get_submodule(structure.consumer.rpartition(".")[0])
        left = {name for name, _ in attention.named_parameters(structure.consumer.rpartition(".")[0])} - set(covered)
        assert all("norm" in name or name == f"{structure.consumer}.bias" for name in left), left


@pytest.mark.parametrize("model_type", ALL)
def test_a_cut_model_computes_what_zero_columns_compute(model_type: str) -> None:
    # Norms over all heads see those that are zeroed, and not those that are gone.
    exact = model_type != "olmo2"
    model, masked, dense = (grouped(model_type).double() for _ in range(3))
    for structure in groups_of(model):
        units = structure.num_units
        kept = torch.tensor([unit for unit in range(units) if unit != structure.layer % units])
        cut_(decoder_layers(model, family_of(model.config))[structure.layer], structure, kept)
        gone = sorted(set(range(structure.width)) - set(structure.columns_of(kept).tolist()))
        out_columns(masked, structure)[gone] = 0
    assert float((logits(model) - logits(dense)).abs().max()) > 1e-3
    if exact:
        torch.testing.assert_close(logits(model), logits(masked))
    cached = model.generate(IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=False))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "gemma2"])
def test_saliency_is_the_derivative_of_the_loss_by_a_factor_on_the_group(model_type: str) -> None:
    model = grouped(model_type).double()
    stream = Stream.from_module(model, ("attention",))
    records = [Statistics.empty(x.num_units, x.columns, gram=False) for x in stream.structures]
    ids = IDS[:2]
    with frozen(model):
        hidden = stream.embed(ids).requires_grad_()
        leaving = hidden
        for structure, record in zip(stream.structures, records, strict=True):
            with watch(stream.layers[structure.layer], structure, model.config, record):
                leaving = stream.run_layer(structure.layer, leaving, stream.calls(ids))
        _, gradient = stream.loss_gradient(leaving.detach(), ids, Objective())
        torch.autograd.grad(leaving, hidden, gradient)

    def loss(structure: Structure, unit: int, factor: float) -> float:
        columns = out_columns(model, structure)
        places = structure.columns_of(torch.tensor([unit]))
        before = columns[places].clone()
        columns[places] *= factor
        found = torch.nn.functional.cross_entropy(
            logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        columns[places] = before
        return float(found)

    for structure, record in zip(stream.structures, records, strict=True):
        for unit in range(structure.num_units):
            # Norms pass through float32: a smaller step would see their rounding.
            slope = (loss(structure, unit, 1.01) - loss(structure, unit, 0.99)) / 0.02
            assert float(record.saliency[2, unit]) == pytest.approx(slope, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("structures", [("attention",), BOTH])
@pytest.mark.parametrize("model_type", ALL)
def test_a_run_end_to_end(model_type: str, structures: tuple[str, ...], tmp_path: Path) -> None:
    model = grouped(model_type)
    source, out = save_checkpoint(tmp_path / "source", model), tmp_path / "out"
    report = fast.minify(source, out=out, segment=1, structures=structures, **OPTIONS)
    cuttable = sum(x.num_units * x.parameters for x in report.plan.structures)
    lost = report.plan.parameters - report.parameters
    assert 0.4 * cuttable <= lost <= cuttable
    assert all(layer.kept >= 1 for layer in report.layers) and any(layer.kept < layer.width for layer in report.layers)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=report.needs_code).eval()
    in_memory = fast.minify(model, structures=structures, **OPTIONS)
    assert [kept.tolist() for kept in in_memory.kept] == [kept.tolist() for kept in report.kept]
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters
    own = load_model(Checkpoint.open(out), CPU, torch.float32)
    assert torch.equal(logits(loaded), logits(own))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-3)
    written = loaded.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(written, loaded.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, use_cache=False))
    # A result is a source like any other.
    again = fast.minify(out, out=tmp_path / "again", structures=("mlp",), **{**OPTIONS, "keep": 0.9})
    assert logits(load_model(Checkpoint.open(again.out), CPU, torch.float32)).isfinite().all()  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ALL)
def test_uniform_sizes_need_no_code_where_the_stock_class_takes_them(model_type: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", grouped(model_type))
    options = {**OPTIONS, "keep": 0.4, "widths": "uniform", "structures": BOTH}
    report = fast.minify(source, out=tmp_path / "out", **options)
    sizes = {name: {x.kept for x in report.layers if x.structure == name} for name in BOTH}
    assert all(len(found) == 1 for found in sizes.values())
    cut = any(x.kept < x.width for x in report.layers if x.structure == "attention")
    assert report.needs_code == (model_type in MULTI_HEAD and cut)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=report.needs_code).eval()
    assert torch.equal(logits(loaded), logits(load_model(Checkpoint.open(tmp_path / "out"), CPU, torch.float32)))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "opt"])
def test_a_dead_group_goes_first_and_of_equal_ones_one_goes(model_type: str) -> None:
    model, before = grouped(model_type), grouped(model_type)
    for subject in (model, before):
        for structure in groups_of(subject):
            out_columns(subject, structure)[structure.columns_of(torch.tensor([1]))] = 0
    units = groups_of(model)[0].num_units
    options = {**OPTIONS, "structures": ("attention",), "keep": 1 - 1 / units, "correct_drift": False}
    report = fast.minify(model, **options)
    assert [kept.tolist() for kept in report.kept] == [[unit for unit in range(units) if unit != 1]] * LAYERS
    torch.testing.assert_close(logits(model), logits(before), rtol=0, atol=1e-4)
    # Twins in one layer: the refit gives the other one what the first one did.
    twins, before = grouped(model_type), grouped(model_type)
    for subject in (twins, before):
        structure = groups_of(subject)[1]
        layer = decoder_layers(subject, family_of(subject.config))[1]
        for part in structure.slices:
            view = layer.get_parameter(part.parameter).data.movedim(part.axis, 0)
            view[part.places(torch.tensor([1]))] = view[part.places(torch.tensor([0]))]
        out_columns(subject, structure)[structure.columns_of(torch.tensor([0, 1]))] *= 1e-3
    share = 1 - 1 / (units * LAYERS)
    report = fast.minify(twins, **{**options, "keep": share, "damping": 1e-9})
    assert [len(kept) for kept in report.kept] == [units, units - 1, units]
    assert len({0, 1} & set(report.kept[1].tolist())) == 1
    torch.testing.assert_close(logits(twins), logits(before), rtol=0, atol=2e-4)


def test_keeping_everything_changes_no_bit(tmp_path: Path) -> None:
    for model_type in ("qwen3", "phi3", "gpt2"):
        source = save_checkpoint(tmp_path / model_type, grouped(model_type))
        out = tmp_path / f"{model_type}-out"
        fast.minify(source, out=out, **{**OPTIONS, "keep": 1.0, "structures": BOTH})
        before, after = Checkpoint.open(source), Checkpoint.open(out)
        old, new = dict(before.read(before.tensors)), dict(after.read(after.tensors))
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_the_budget_is_one_of_parameters() -> None:
    model = grouped("llama")
    structures = structures_of(model, family_of(model.config), BOTH)
    assert [str(x) for x in structures[:2]] == ["Layer 0, attention", "Layer 0, mlp"]
    # Of a group: 2 · 4 queries, 4 keys, 4 values, 8 columns; of a unit: two rows and a column.
    assert [x.parameters for x in structures[:2]] == [(8 + 4 + 4 + 8) * HIDDEN, 3 * HIDDEN]
    report = fast.minify(model, **{**OPTIONS, "structures": BOTH, "min_keep": 0.0})
    total = LAYERS * (2 * 24 + 3 * WIDTH) * HIDDEN
    kept = sum(len(k) * x.parameters for k, x in zip(report.kept, structures, strict=True))
    assert 0.55 * total <= kept <= 0.6 * total


def test_heads_with_norms_of_their_own_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="a norm for every head"):
        fast.minify(grouped("stablelm", qk_layernorm=True), structures=("attention",), **OPTIONS)
    fast.minify(grouped("stablelm", qk_layernorm=True), **OPTIONS)


def test_heads_with_norms_of_their_own_are_no_obstacle_to_widths_per_layer(tmp_path: Path) -> None:
    model = grouped("stablelm", qk_layernorm=True)
    source = save_checkpoint(tmp_path / "dense", model)
    assert fast.minify(source, out=tmp_path / "out", **OPTIONS).needs_code
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    fast.minify(model, **OPTIONS)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("names", [(), ("mlp", "mlp"), ("heads",), "mlp"])
def test_structures_are_a_tuple_of_known_names(names: Any) -> None:
    with pytest.raises(ConfigError, match="Option structures: expected a tuple of one or more of mlp, attention"):
        fast.minify(grouped("llama"), structures=names, **OPTIONS)
