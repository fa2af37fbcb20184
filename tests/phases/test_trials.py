"""Trial cuts: what they measure, and the widths that follow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisp import fast
from minisp.config import MinifyConfig
from minisp.errors import ConfigError
from minisp.methods.selection import Candidate, allocate
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.phases import trials
from minisp.phases.batches import Batches
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep
from minisp.phases.trials import divergences, measure_ratios, ratios, trial_tokens
from minisp.store.checkpoint import Checkpoint
from minisp.text.windows import spread
from tests.tiny import LAYERS, VOCABULARY, WIDTH, save_checkpoint, tiny_model

CPU = torch.device("cpu")


def windows(count: int = 20, length: int = 32) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def states(seed: int, ids: Tensor) -> Tensor:
    return torch.randn(*ids.shape, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
def test_a_divergence_is_the_textbook_one(model_type: str, streamed: bool, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", tiny_model(model_type))
    stream = Stream.from_checkpoint(Checkpoint.open(folder), CPU, torch.float32, stream_vocabulary=streamed)
    whole = Stream.from_module(tiny_model(model_type))
    ids = windows(3, 8)
    dense, *trials = [states(seed, ids) for seed in range(3)]
    wanted = []
    with torch.no_grad():
        p, *others = [whole.logits(hidden, ids).double().log_softmax(-1) for hidden in (dense, *trials)]
        for q in others:
            wanted.append(float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")) / ids.numel())
        found = divergences(stream, dense, trials, ids)
        assert divergences(stream, dense, [dense], ids) == pytest.approx([0.0], abs=1e-6)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[0] > 0.01


def test_ratios_are_bounded_by_the_median() -> None:
    # Medians of 1, 2, 3, 1000 and of nothing removed: an accident is cut off, a layer that says nothing is average.
    assert ratios([1.0, 2.0, 3.0, 1000.0, 0.1], [1.0, 1.0, 1.0, 1.0, 0.0]) == pytest.approx([1, 2, 3, 16, 2])
    assert ratios([-1e-9, 2.0, 2.0], [1.0, 1.0, 1.0]) == pytest.approx([0.25, 2, 2])
    assert ratios([0.0, 0.0], [1.0, 1.0]) == [1.0, 1.0]


def test_trial_windows_are_spread_evenly() -> None:
    assert spread(10, 2) == [2, 7]
    assert spread(3, 5) == [0, 1, 2]
    assert spread(1, 4) == [0]


@pytest.mark.parametrize("refit", [{}, {"correct_drift": False}, {"refit_on": "pruned"}])
def test_measured_widths_are_the_same_on_disk_and_in_memory(refit: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "keep": 0.6, "dtype": "float32", "alignment": 4, "batch": 4, "allocation": "measured", "saliency": "taylor",
        **refit,
    }  # fmt: skip
    model = tiny_model("llama")
    source = save_checkpoint(tmp_path / "source", model)
    in_memory = fast.minify(model, calibration=windows(), **options)
    on_disk = fast.minify(source, out=tmp_path / "out", calibration=windows(), **options)
    assert [list(a) for a in in_memory.kept] == [list(a) for a in on_disk.kept]
    assert 0.5 * WIDTH * LAYERS < sum(len(kept) for kept in on_disk.kept) <= 0.6 * WIDTH * LAYERS
    by_score = fast.minify(source, out=tmp_path / "other", calibration=windows(), **{**options, "allocation": "score"})
    assert [len(kept) for kept in by_score.kept] != [len(kept) for kept in on_disk.kept]


@pytest.mark.parametrize(("count", "length"), [(20, 32), (3, 64), (1, 64)])
def test_no_more_tokens_are_tried_than_planned(count: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TRIAL_TOKENS", 48)
    monkeypatch.setattr(trials, "FEWEST_TRIAL_TOKENS", 40)
    model, texts = tiny_model("llama"), windows(count, length)
    stream, run = Stream.from_module(model), Run.in_memory()
    with frozen(model):
        saliency_sweep(stream, Batches.scoring(texts.split(1)), [range(LAYERS)], run, gram=True)
        scores = [run.statistics(x, gram=False).score("fisher") for x in stream.structures]
        embedded: list[Tensor] = []
        monkeypatch.setattr(stream, "embed", lambda ids, embed=stream.embed: (embedded.append(ids), embed(ids))[1])
        found = measure_ratios(stream, texts, scores, MinifyConfig(), run)
    assert len(found) == LAYERS and all(ratio > 0 for ratio in found)
    assert 32 <= embedded[0].numel() <= trial_tokens(texts.numel(), LAYERS) <= 48


def allocate_widths(scores: list[Tensor], keep: float) -> list[int]:
    candidates = [Candidate(score, 3, 32, str(place)) for place, score in enumerate(scores)]
    return allocate(candidates, keep, min_keep=0.1)


@pytest.mark.parametrize("keep", [0.03, 0.1, 0.13])
def test_a_small_share_finds_widths_under_the_default_bound(keep: float) -> None:
    scores = [torch.rand(1536, generator=torch.Generator().manual_seed(layer)) for layer in range(30)]
    widths = allocate_widths(scores, keep)
    assert sum(widths) <= keep * 30 * 1536
    assert min(widths) >= 32 and all(width % 32 == 0 for width in widths)


def test_bounds_are_rounded_up_where_there_is_room() -> None:
    scores = [torch.full((1536,), 1e-6), torch.ones(1536)]
    assert allocate_widths(scores, 0.6)[0] >= 160
    with pytest.raises(ConfigError, match="Lower the alignment"):
        allocate_widths(scores, 0.01)
