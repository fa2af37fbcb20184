"""The engine on tiny random models of every family: statistics against plain autograd, and whole runs end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.config import MinifyConfig
from minisp.errors import ConfigError
from minisp.methods.statistics import Statistics
from minisp.models.families import FAMILIES, decoder_layers, family_of, known_model_types
from minisp.models.skeleton import frozen, load_model
from minisp.models.stream import Stream
from minisp.phases.batches import Batches
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep
from minisp.report.report import report_table
from minisp.store.checkpoint import Checkpoint
from tests.tiny import (
    HIDDEN,
    LAYERS,
    MODEL_TYPES,
    OTHER_TYPES,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    save_checkpoint,
    tiny_model,
)

CPU = torch.device("cpu")
WINDOW = 16
REFITS: tuple[dict[str, Any], ...] = ({}, {"correct_drift": False}, {"refit_on": "pruned"})


def silent(phase: str, done: int, total: int) -> None:
    assert 0 < done <= total


def windows(count: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (count, WINDOW), generator=torch.Generator().manual_seed(seed))


def autograd_statistics(model: Any, ids: Tensor) -> list[Statistics]:
    """The same sums from hooks on `down` and a backward through the whole model, one window at a time."""
    family = family_of(model.config)
    records = [Statistics.empty(WIDTH, gram=True) for _ in range(LAYERS)]
    hooks = []
    for record, layer in zip(records, decoder_layers(model, family), strict=True):

        def capture(_: Any, args: tuple[Tensor], record: Statistics = record) -> None:
            x = args[0].reshape(-1, WIDTH)

            def receive(grad: Tensor) -> None:
                product = (x * grad.reshape(-1, WIDTH)).detach()
                record.saliency += torch.stack([product.abs().sum(0), product.square().sum(0), product.sum(0)])
                record.num_tokens += len(product)
                record.gram += x.detach().T @ x.detach()

            args[0].register_hook(receive)

        hooks.append(layer.get_submodule(family.mlp.down).register_forward_pre_hook(capture))
    for window in ids:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return records


def sweep(stream: Stream, ids: Tensor, batch: int, segment: int) -> dict[int, Statistics]:
    segments = [range(i, min(i + segment, LAYERS)) for i in range(0, LAYERS, segment)]
    with frozen(stream.model):
        run = Run.in_memory(silent)
        saliency_sweep(stream, Batches.scoring(ids.split(batch)), segments, run, gram=True)
    return {x.layer: run.statistics(x, gram=True) for x in stream.structures}


def test_every_row_of_data_is_tested() -> None:
    assert sorted(MODEL_TYPES + OTHER_TYPES) == known_model_types()
    assert len({name for family in FAMILIES for name in family.model_types}) == len(known_model_types())


@pytest.mark.parametrize(("batch", "segment"), [(1, LAYERS), (2, 1), (5, 2)])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_statistics_are_those_of_autograd(model_type: str, batch: int, segment: int, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    ids = windows()
    stream = Stream.from_checkpoint(Checkpoint.open(save_checkpoint(tmp_path, model)), CPU, torch.float32)
    found = sweep(stream, ids, batch, segment)
    for layer, expected in enumerate(autograd_statistics(model, ids)):
        assert found[layer].num_tokens == expected.num_tokens == ids.numel()
        torch.testing.assert_close(found[layer].saliency, expected.saliency, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[layer].gram, expected.gram, rtol=1e-4, atol=1e-4)


def test_only_held_layers_have_weights(tmp_path: Path) -> None:
    stream = Stream.from_checkpoint(Checkpoint.open(save_checkpoint(tmp_path, tiny_model("llama"))), CPU, torch.float32)

    def materialised() -> list[int]:
        return [i for i, layer in enumerate(stream.layers) if not any(p.is_meta for p in layer.parameters())]

    assert materialised() == []
    found = [(segment, materialised()) for segment in stream.visit([range(2), range(2, 3), range(2)])]
    assert found == [(range(2), [0, 1]), (range(2, 3), [2]), (range(2), [0, 1])]
    assert materialised() == []


def test_the_sweep_leaves_a_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    decoder_layers(model, family_of(model.config))[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    sweep(Stream.from_module(model), windows(), 2, 2)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


@pytest.mark.parametrize("refit", REFITS)
@pytest.mark.parametrize("widths", ["per-layer", "uniform"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_run_end_to_end(model_type: str, widths: str, refit: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(model_type)
    source, out = save_checkpoint(tmp_path / "source", model), tmp_path / "out"
    options = {"keep": 0.7, "widths": widths, "dtype": "float32", "alignment": 4, "batch": 2, **refit}
    ids = windows(40)
    report = fast.minify(source, out=out, calibration=ids, **options)
    # Within the budget, and the report tells what is on disk.
    assert sum(len(kept) for kept in report.kept) <= 0.7 * WIDTH * LAYERS
    assert all(len(kept) % 4 == 0 for kept in report.kept)
    assert (len({len(kept) for kept in report.kept}) == 1) or widths == "per-layer"
    assert not list(tmp_path.glob("*partial*")) and not list(tmp_path.glob(".*"))
    # Stock transformers loads it: the same logits as the model that was cut in memory, and as our own reader's.
    in_memory = fast.minify(model, calibration=ids, **options)
    per_layer = len({len(kept) for kept in report.kept}) > 1
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=per_layer).eval()
    assert (type(loaded).__name__ == "MinispForCausalLM") == per_layer
    own = load_model(Checkpoint.open(out), CPU, torch.float32)
    with torch.no_grad():
        logits = loaded(ids[:2]).logits
        assert torch.equal(logits, own(ids[:2]).logits)
        torch.testing.assert_close(logits, model(ids[:2]).logits, rtol=0, atol=2e-4)
    assert [list(a) for a in report.kept] == [list(a) for a in in_memory.kept]
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) >= report.bytes > 0
    # Refitting is better than slicing, where something was cut.
    assert all(layer.residual <= layer.residual_sliced for layer in report.layers)
    assert any(layer.residual < 0.95 * layer.residual_sliced for layer in report.layers)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_keeping_everything_changes_no_bit(model_type: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model(model_type), max_shard_size="20KB")
    fast.minify(source, keep=1.0, out=tmp_path / "out", calibration=windows(), dtype="float32")
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    old, new = dict(before.read(before.tensors)), dict(after.read(after.tensors))
    assert old.keys() == new.keys()
    for name in old:
        assert old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]), name


def test_two_runs_with_one_seed_write_the_same_bytes(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"))
    for name in ("a", "b"):
        fast.minify(source, keep=0.6, out=tmp_path / name, num_windows=6, window=WINDOW, alignment=4, seed=3)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert "minisp.json" in files and "modeling_minisp.py" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_another_seed_writes_other_text(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"))
    prints = {
        fast.minify(source, out=tmp_path / str(seed), num_windows=6, window=WINDOW, seed=seed).calibration_fingerprint
        for seed in (0, 1)
    }
    assert len(prints) == 2


def test_a_result_can_be_minified_again(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"))
    first = fast.minify(source, keep=0.8, out=tmp_path / "a", calibration=windows(), alignment=4)
    second = fast.minify(tmp_path / "a", keep=0.8, out=tmp_path / "b", calibration=windows(), alignment=4)
    assert second.plan.units == {"mlp": tuple(len(kept) for kept in first.kept)}
    assert sum(len(kept) for kept in second.kept) <= 0.8 * sum(second.plan.units["mlp"])
    load_model(Checkpoint.open(tmp_path / "b"), CPU, torch.float32)(windows(1))


def test_a_result_in_memory_can_be_minified_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 0.8, "calibration": windows(), "alignment": 4}
    fast.minify(save_checkpoint(tmp_path / "source", tiny_model("llama")), out=tmp_path / "a", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    fast.minify(model, out=tmp_path / "b", **options)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", trust_remote_code=True)
    assert torch.equal(again(windows(1)).logits, model(windows(1)).logits)


@pytest.mark.parametrize("refit_on", ["pruned", "dense"])
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"reconstruct": False}])
def test_no_second_sweep_runs_where_nothing_is_refitted(
    refit_on: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"))
    monkeypatch.setattr("minisp.phases.refit._refit_sweep", None)
    report = fast.minify(source, out=tmp_path / "a", calibration=windows(), refit_on=refit_on, alignment=4, **options)
    assert "refit sweep" not in report.plan.layout.peaks and not report.plan.traffic["refit states"]
    assert all(layer.residual == layer.residual_sliced for layer in report.layers)
    load_model(Checkpoint.open(tmp_path / "a"), CPU, torch.float32)(windows(1))


def test_windows_that_contradict_the_option_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"Option window: expected {WINDOW}, .* got {WINDOW // 2}"):
        fast.minify(tiny_model("llama"), calibration=windows(), window=WINDOW // 2)


def test_layers_without_any_output_are_reported(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    report = fast.minify(model, out=tmp_path / "a", calibration=windows(), alignment=4)
    assert {layer.residual_sliced for layer in report.layers} == {0.0}
    assert report_table(report).row_count


def test_sharded_sources_give_the_same_result(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    one = save_checkpoint(tmp_path / "one", model)
    many = save_checkpoint(tmp_path / "many", model, max_shard_size="8KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    for source in (one, many):
        fast.minify(source, keep=0.5, out=tmp_path / f"{source.name}-out", calibration=windows(), alignment=4)
    read = [dict((c := Checkpoint.open(tmp_path / f"{n}-out")).read(c.tensors)) for n in ("one", "many")]
    assert read[0].keys() == read[1].keys()
    assert all(torch.equal(read[0][name], read[1][name]) for name in read[0])


def test_untouched_weights_keep_their_stored_bits(tmp_path: Path) -> None:
    """Computing in bfloat16 must not round what is only copied or sliced from a float32 checkpoint."""
    model = tiny_model("llama")
    source = save_checkpoint(tmp_path / "source", model)
    report = fast.minify(source, keep=0.6, out=tmp_path / "out", calibration=windows(), dtype="bfloat16", alignment=4)
    values = dict((c := Checkpoint.open(tmp_path / "out")).read(c.tensors))
    for index, layer in enumerate(decoder_layers(model, family_of(model.config))):
        prefix = f"model.layers.{index}."
        assert torch.equal(values[f"{prefix}self_attn.q_proj.weight"], layer.self_attn.q_proj.weight)
        assert torch.equal(values[f"{prefix}mlp.up_proj.weight"], layer.mlp.up_proj.weight[report.kept[index]])


def test_permuting_units_permutes_what_is_kept() -> None:
    ids = windows()
    model = tiny_model("llama")
    order = torch.randperm(WIDTH)
    shuffled = tiny_model("llama")
    for layer in decoder_layers(shuffled, family_of(shuffled.config)):
        layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data[order]
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data[order]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order]
    kept = fast.minify(model, keep=0.5, calibration=ids, alignment=4).kept
    permuted = fast.minify(shuffled, keep=0.5, calibration=ids, alignment=4).kept
    for a, b in zip(kept, permuted, strict=True):
        assert sorted(order[b].tolist()) == a.tolist()


def test_plan_agrees_with_the_run(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("gpt2"))
    options = {"keep": 0.6, "alignment": 4, "widths": "uniform", "num_windows": 5, "window": WINDOW, "generic": 0.0}
    plan = fast.plan(source, **options)
    report = fast.minify(source, out=tmp_path / "out", calibration=windows(), **options)
    assert plan == report.plan
    assert report.parameters == plan.parameters_after
    assert plan.parameters == sum(p.numel() for p in tiny_model("gpt2").parameters())
    assert plan.num_tokens == 5 * WINDOW <= 5 * POSITIONS
    assert plan.config == MinifyConfig(**options)
    assert HIDDEN < WIDTH
