"""The contract of a family's row: what the engine does through it is what the model's own code does.

A new row needs nothing here but its model type, in `tests.tiny`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.methods.statistics import Statistics
from minisp.models.families import decoder_layers, family_of
from minisp.models.layers import fast_layers
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen, load_model
from minisp.models.stream import Stream
from minisp.models.structures import structures_of
from minisp.models.watch import watch
from minisp.phases.batches import Batches
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep
from minisp.store.checkpoint import Checkpoint
from tests.tiny import LAYERS, MODEL_TYPES, OTHER_TYPES, VOCABULARY, WIDTH, save_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IDS = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"keep": 0.7, "alignment": 4, "batch": 2, "dtype": "float32", "calibration": IDS}
ALL = MODEL_TYPES + OTHER_TYPES


def close(found: Tensor | None, wanted: Tensor | None) -> bool:
    """Equal to float32 rounding of sums in another order, which tiny models of large weights amplify."""
    assert found is not None and wanted is not None
    return float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def consumers(model: Any) -> list[nn.Module]:
    family = family_of(model.config)
    layers = decoder_layers(model, family)
    return [layers[x.layer].get_submodule(x.consumer) for x in structures_of(model, family)]


def autograd_statistics(model: Any, ids: Tensor) -> list[Statistics]:
    """The sums of every consumer's input, by hooks on the stock model in float64."""
    model = model.double()
    found = [
        Statistics(0, torch.zeros(3, WIDTH, dtype=torch.float64), torch.zeros(WIDTH, WIDTH)) for _ in range(LAYERS)
    ]
    seen: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    hooks = [module.register_forward_pre_hook(keep) for module in consumers(model)]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    for record, x in zip(found, seen, strict=True):
        assert x.grad is not None
        flat, p = x.detach().flatten(0, 1), (x.detach() * x.grad).flatten(0, 1)
        record.saliency = torch.stack([p.abs().sum(0), p.square().sum(0), p.sum(0)])
        record.gram = (flat.T @ flat).float()
    return found


@pytest.mark.parametrize("model_type", OTHER_TYPES)
def test_statistics_are_those_of_the_stock_model(model_type: str, tmp_path: Path) -> None:
    wanted = autograd_statistics(tiny_model(model_type), IDS)
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, tiny_model(model_type)))
    for segments, streams in (([range(LAYERS)], False), ([range(i, i + 1) for i in range(LAYERS)], True)):
        stream, run = Stream.from_checkpoint(checkpoint, CPU, torch.float32, stream_vocabulary=streams), Run.in_memory()
        with frozen(stream.model):
            saliency_sweep(stream, Batches.scoring(IDS.split(2)), segments, run, gram=True)
        for structure, expected in zip(stream.structures, wanted, strict=True):
            found = run.statistics(structure, gram=True)
            assert close(found.saliency, expected.saliency) and close(found.gram, expected.gram)


@pytest.mark.parametrize("model_type", ALL)
def test_both_ways_of_watching_an_mlp_give_the_same_sums(model_type: str) -> None:
    model = tiny_model(model_type)
    stream, found = Stream.from_module(model), []
    for fused in (True, False):
        records = [Statistics.empty(WIDTH, gram=True) for _ in stream.structures]
        with frozen(model), fast_layers(model):
            hidden = stream.embed(IDS).requires_grad_()
            leaving = hidden
            for structure, record in zip(stream.structures, records, strict=True):
                layer = stream.layers[structure.layer]
                with watch(layer, structure, model.config, record, fused=fused):
                    leaving = stream.run_layer(structure.layer, leaving, stream.calls(IDS))
            _, gradient = stream.loss_gradient(leaving.detach(), IDS, Objective())
            # The backward tells the watchers, whether or not their block has ended.
            (entering,) = torch.autograd.grad(leaving, hidden, gradient)
        found.append((records, entering))
    (fast_ones, fast_gradient), (generic, gradient) = found
    assert close(fast_gradient, gradient)
    for a, b in zip(fast_ones, generic, strict=True):
        assert a.num_scored == b.num_scored == IDS.numel()
        assert close(a.saliency, b.saliency) and close(a.finalize_("a").gram, b.finalize_("b").gram)


@pytest.mark.filterwarnings("ignore:144 calibration tokens are few")
@pytest.mark.parametrize("refit", [{}, {"refit_on": "pruned"}, {"widths": "uniform"}])
@pytest.mark.parametrize("model_type", OTHER_TYPES)
def test_a_run_end_to_end(model_type: str, refit: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(model_type)
    source, out = save_checkpoint(tmp_path / "source", model), tmp_path / "out"
    report = fast.minify(source, out=out, segment=1, **OPTIONS, **refit)
    uniform = "widths" in refit
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=not uniform).eval()
    assert type(loaded).__name__ == (type(model).__name__ if uniform else "MinispForCausalLM")
    own = load_model(Checkpoint.open(out), CPU, torch.float32)
    in_memory = fast.minify(model, **OPTIONS, **refit)
    assert [kept.tolist() for kept in in_memory.kept] == [kept.tolist() for kept in report.kept]
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters
    with torch.no_grad():
        logits = loaded(IDS[:2], use_cache=False).logits
        assert torch.equal(logits, own(IDS[:2], use_cache=False).logits)
        torch.testing.assert_close(logits, model(IDS[:2], use_cache=False).logits, rtol=0, atol=5e-4)
        # One token after the other, through the cache.
        written = loaded.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, use_cache=True)
        again = loaded.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(written, again)
    assert all(layer.residual <= layer.residual_sliced for layer in report.layers)


@pytest.mark.filterwarnings("ignore:144 calibration tokens are few")
@pytest.mark.parametrize("model_type", OTHER_TYPES)
def test_keeping_everything_changes_no_bit(model_type: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model(model_type))
    fast.minify(source, out=tmp_path / "out", **{**OPTIONS, "keep": 1.0})
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    old, new = dict(before.read(before.tensors)), dict(after.read(after.tensors))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.filterwarnings("ignore:144 calibration tokens are few")
@pytest.mark.parametrize("model_type", ALL)
def test_a_dead_unit_goes_first_and_is_free(model_type: str) -> None:
    model, before, dead = tiny_model(model_type), tiny_model(model_type), [5, 11, 12, 40]
    for subject in (model, before):
        for module in consumers(subject):
            # GPT-2 stores the columns as rows.
            columns = module.weight.data if module.weight.shape[0] == WIDTH else module.weight.data.T
            columns[dead] = 0
    report = fast.minify(model, **{**OPTIONS, "keep": 1 - 4 / WIDTH, "correct_drift": False})
    assert [sorted(set(range(WIDTH)) - set(kept.tolist())) for kept in report.kept] == [dead] * LAYERS
    with torch.no_grad():
        after, wanted = (subject(IDS, use_cache=False).logits for subject in (model, before))
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:144 calibration tokens are few")
def test_an_activation_that_the_engine_has_no_derivative_of_goes_the_generic_way(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_act="mish")
    report = fast.minify(save_checkpoint(tmp_path / "source", model), out=tmp_path / "out", **OPTIONS)
    assert sum(len(kept) for kept in report.kept) <= 0.7 * LAYERS * WIDTH
    wanted = autograd_statistics(tiny_model("llama", hidden_act="mish"), IDS)
    stream, run = Stream.from_module(model), Run.in_memory()
    with frozen(model):
        saliency_sweep(stream, Batches.scoring(IDS.split(2)), [range(LAYERS)], run, gram=True)
    for structure, expected in zip(stream.structures, wanted, strict=True):
        torch.testing.assert_close(
            run.statistics(structure, gram=False).saliency, expected.saliency, rtol=2e-4, atol=1e-6
        )
