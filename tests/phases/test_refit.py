"""The refit sweep: correcting on the pruned model what has drifted away from the dense one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minisp import fast
from minisp.config import MinifyConfig
from minisp.methods.reconstruction import Fit, correct
from minisp.ops.ridge import ridge_fit
from minisp.phases.batches import FEW_TOKENS, correction_count, make_batches, refit_windows
from minisp.ranks import Ranks
from tests.tiny import VOCABULARY, save_checkpoint, tiny_model


def windows(count: int = 40, length: int = 32) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def test_a_fit_is_the_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    e = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    gram, mu = x.T @ x, 0.3 * float((x.T @ x).diagonal().mean())
    # Damping as more rows of data: an oracle that knows no normal equations.
    rows = torch.cat([x, mu**0.5 * torch.eye(6, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([e, e.new_zeros(6, 4)])).solution.T
    torch.testing.assert_close(ridge_fit(gram, e.T @ x, 0.3), wanted)


def test_a_correction_explains_the_share_that_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=generator)
    e = x @ torch.randn(5, 3, generator=generator) + torch.randn(80, 3, generator=generator)
    down = torch.randn(3, 5, generator=generator)
    before = down.clone()
    after, fit = correct(before, Fit(0.5, 0.6), x.T @ x, e.T @ x, float(e.square().sum()), 0.2)
    left = e - x @ (after - down).T
    share = 1 - float(left.square().sum() / e.square().sum())
    assert 0.3 < share < 1
    assert fit.drift_explained == pytest.approx(share, abs=1e-5)
    assert torch.equal(before, down)


def test_no_drift_needs_no_correction() -> None:
    before, fit = torch.ones(2, 3), Fit()
    after, same = correct(before, fit, torch.eye(3), torch.zeros(2, 3), 0.0, 1.0)
    assert after is before and same is fit


def test_more_text_never_means_that_less_is_corrected_on() -> None:
    counts = [correction_count(count, 512) for count in range(1, 300)]
    assert counts == sorted(counts)
    assert counts[15] == 16 == FEW_TOKENS // 512 and counts[31] == 16 and counts[290] == 146
    # Long windows: every process has one.
    assert correction_count(4, FEW_TOKENS, ranks=4) == 4 and correction_count(4, FEW_TOKENS) == 2


def test_what_is_corrected_on_depends_neither_on_processes_nor_on_micro_batches() -> None:
    found = [refit_windows(40, 512, MinifyConfig(), ranks) for ranks in (1, 2, 4)]
    assert found[0] == found[1] == found[2] == list(range(1, 40, 2))
    assert refit_windows(40, 512, MinifyConfig(refit_on="pruned")) == list(range(40))
    assert refit_windows(40, 512, MinifyConfig(correct_drift=False)) == []


def test_micro_batches_are_the_same_whatever_the_refit() -> None:
    # What an unfinished sweep has left is numbered by them, and `reuse` takes it.
    long = torch.arange(40 * 512).reshape(40, 512)
    options: list[dict[str, Any]] = [{}, {"refit_on": "pruned"}, {"correct_drift": False}, {"keep": 1.0}]
    configs = [MinifyConfig(**chosen) for chosen in options]
    found = [make_batches(long, config, 3, Ranks(1, 2)) for config in configs]
    for batches in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batches.ids, found[0].ids, strict=True))
    assert [batches.num_refit for batches in found] == [4, 8, 0, 0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_a_corrected_model_stays_closer_to_the_dense_one(model_type: str, tmp_path: Path) -> None:
    ids, dense = windows(), tiny_model(model_type)
    options: dict[str, Any] = {"keep": 0.6, "dtype": "float32", "alignment": 4, "batch": 4, "correction_damping": 0.01}
    distance = {}
    with torch.no_grad():
        wanted = dense(ids).logits
        for corrects in (False, True):
            model = tiny_model(model_type)
            report = fast.minify(model, calibration=ids, correct_drift=corrects, **options)
            distance[corrects] = float((model(ids).logits - wanted).square().mean())
            assert any(layer.drift_explained > 0 for layer in report.layers) == corrects
    assert distance[True] < 0.985 * distance[False]
    source, out = save_checkpoint(tmp_path / "source", dense), tmp_path / "out"
    written = fast.minify(source, out=out, calibration=ids, correct_drift=True, **options)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids[:2]).logits, model(ids[:2]).logits, rtol=0, atol=2e-4)
    assert [layer.kept for layer in written.layers] == [layer.kept for layer in report.layers]


def test_without_refitting_nothing_is_corrected() -> None:
    results = []
    for corrects in (False, True):
        model = tiny_model("llama")
        fast.minify(model, calibration=windows(), keep=0.6, correct_drift=corrects, reconstruct=False, alignment=4)
        results.append(dict(model.named_parameters()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_every_process_has_windows() -> None:
    long = torch.arange(4 * 8).reshape(4, 8)
    config = MinifyConfig(num_windows=4, window=8, saliency_windows=2)
    found = [make_batches(long, config, 1, Ranks(rank, 4)) for rank in range(4)]
    assert [sum(map(len, batches.ids)) for batches in found] == [1, 1, 1, 1]
    assert sorted(int(part[0, 0]) for batches in found for part in batches.ids) == [0, 8, 16, 24]
