"""What a run may ask for: bytes to and from the scratch folder, passes through a layer, waits of the host."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

from minisp import fast
from minisp.config import MinifyConfig
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.phases.batches import make_batches
from minisp.phases.refit import refit_structures
from minisp.phases.run import Run
from minisp.phases.saliency import saliency_sweep
from minisp.phases.sizes import HELD
from minisp.plan import planner
from minisp.ranks import Ranks
from minisp.store import records as scratch_module
from minisp.store import tiers
from minisp.store.files import Piece
from minisp.store.records import Memory
from minisp.store.tiers import Room, Tiers
from tests.counting import Counted
from tests.tiny import LAYERS, VOCABULARY, WIDTH, save_checkpoint, tiny_model

WINDOWS = torch.arange(6 * 16).reshape(6, 16) * 37 % VOCABULARY
STATES = ("states", "gradient", "trials", "dense", "pruned")
OPTIONS: dict[str, Any] = {"calibration": WINDOWS, "alignment": 4, "keep": 0.6, "dtype": "float32", "batch": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_model("llama"))


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes to and from scratch folders, by kind of record."""
    found: Counter[str] = Counter()
    write, read = scratch_module.write_tensor, scratch_module.read_pieces

    def written(handle: IO[bytes], tensor: Tensor) -> memoryview:
        data = write(handle, tensor)
        found[Path(handle.name).name.split("_")[0]] += len(data)
        return data

    def read_back(path: Path, pieces: Sequence[Piece]) -> None:
        found[path.name.split("_")[0]] += sum(len(memory) for _, memory in pieces)
        read(path, pieces)

    monkeypatch.setattr(scratch_module, "write_tensor", written)
    monkeypatch.setattr(scratch_module, "read_pieces", read_back)
    return found


def without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of the test find no room in memory for what waits."""
    monkeypatch.setattr(planner, "make_rooms", lambda shape, layout, limit, host, on_disk: (layout, {}))


def run(source: Path, folder: Path, **options: Any) -> tuple[Any, int]:
    """A run's report, and the most bytes that were in its scratch folder."""
    scratch, most = folder / "scratch", 0

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in scratch.glob("*.data")))

    report = fast.minify(source, out=folder / "out", scratch=str(scratch), progress=progress, **{**OPTIONS, **options})
    return report, most


@pytest.mark.parametrize("segment", [1, 2, LAYERS])
def test_the_plan_knows_the_traffic_and_the_room_of_a_run(
    segment: int, source: Path, tmp_path: Path, moved: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_room(monkeypatch)
    report, most = run(source, tmp_path, segment=segment)
    plan = report.plan
    assert 0.4 * plan.scratch_bytes <= most <= plan.scratch_bytes
    found = {
        "states": moved["states"] + moved["gradient"],
        "trials": moved["trials"],
        "refit states": moved["dense"] + moved["pruned"],
    }
    for name, size in found.items():
        assert 0.6 * plan.traffic[name] <= size <= 1.05 * plan.traffic[name], name


@pytest.mark.parametrize("segment", [1, LAYERS])
def test_states_that_have_room_never_pass_the_folder(
    segment: int, source: Path, tmp_path: Path, moved: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report, most = run(source, tmp_path, segment=segment, host_memory="1000GB")
    assert [moved[kind] for kind in STATES] == [0] * len(STATES)
    plan = report.plan
    assert [plan.traffic[name] for name in ("states", "trials", "refit states")] == [0, 0, 0]
    assert plan.layout.peaks["refit sweep"][HELD] > 0 and most <= plan.scratch_bytes
    before = moved.copy()
    without_room(monkeypatch)
    run(source, tmp_path / "b", segment=segment)
    # The statistics pass the folder either way: written once, and read for the ranking, the trial and the refit.
    assert moved["statistics"] == 2 * before["statistics"] > 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "out" / "model.safetensors"
    ).read_bytes()


def test_saved_boundaries_fit_the_room_that_the_plan_asks_for(
    source: Path, tmp_path: Path, moved: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "SAVE_SECONDS", 0.0)
    report, most = run(source, tmp_path, segment=1, host_memory="1000GB")
    assert 0.3 * report.plan.scratch_bytes <= most <= report.plan.scratch_bytes
    # Written, never read.
    states = WINDOWS.numel() * 16 * 4
    assert moved["pruned"] == (LAYERS - 1) * states == moved["dense"]


@contextmanager
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """Tokens that `run_layer` takes through each layer."""
    tokens: Counter[int] = Counter()
    original = Stream.run_layer

    def counted(self: Stream, index: int, hidden: Tensor, calls: Any) -> Tensor:
        tokens[index] += hidden[..., 0].numel()
        return original(self, index, hidden, calls)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "run_layer", counted)
        yield tokens


def refitted(
    room: int, refit_on: str, monkeypatch: pytest.MonkeyPatch, *, dense: bool = False, **overrides: Any
) -> tuple[list[float], Counted]:
    """Passes per window through every layer of the refit sweep, and what else it asked for."""
    config = MinifyConfig(refit_on=refit_on, keep=0.5, window=16, num_windows=6)  # type: ignore[arg-type]
    model = tiny_model(overrides.pop("family", "llama"), **overrides)
    stream, memory = Stream.from_module(model), Memory()
    run = Run(memory, Tiers(memory, stream.device, Room(room)), Ranks(), lambda *_: None)
    batches = make_batches(WINDOWS, config, 2, Ranks())
    with frozen(model):
        saliency_sweep(stream, batches, [range(LAYERS)], run, gram=True, dense=dense)
        kept = [torch.arange(WIDTH // 2)] * LAYERS
        with passes(monkeypatch) as tokens, Counted() as counted:
            refit_structures(stream, batches.refit, kept, config, run)
    return [tokens[layer] / WINDOWS.numel() for layer in range(LAYERS)], counted


# On so few tokens, trying whether a layer adds up is two passes of a sixth of the windows each.
TRIED = 2 * 16 / WINDOWS.numel()


@pytest.mark.parametrize(("refit_on", "dense"), [("dense", 1), ("pruned", 0)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_where_there_is_room_a_window_passes_a_cut_layer_once(
    family: str, refit_on: str, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = refitted(10**9, refit_on, monkeypatch, family=family)
    assert found == pytest.approx([dense + 1 + TRIED] * LAYERS)


def test_where_the_sweep_kept_the_dense_states_a_window_passes_once_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = refitted(10**9, "dense", monkeypatch, dense=True)
    assert found == pytest.approx([1 + TRIED] * LAYERS)


def test_without_room_it_passes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = refitted(0, "dense", monkeypatch)
    # Nothing is wanted behind the last layer. The first micro-batch of a second passage tries again.
    assert found == pytest.approx([3 + 2 * TRIED] * (LAYERS - 1) + [2 + TRIED])


def test_a_layer_with_a_norm_behind_its_mlp_passes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = refitted(10**9, "dense", monkeypatch, family="opt", do_layer_norm_before=False)
    assert found[0] == pytest.approx(3 + 2 * TRIED)


def test_the_host_waits_a_fixed_number_of_times_per_pruned_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, counted = refitted(10**9, "dense", monkeypatch)
    # Per layer: the energies and checks of two solves, the drift's energy, and one for what a layer adds up to.
    assert counted.syncs <= 60 * LAYERS


@pytest.mark.parametrize("segment", [1, LAYERS])
def test_the_host_waits_once_a_layer_and_once_a_loss_in_the_sweep(segment: int) -> None:
    model = tiny_model("llama")
    segments = [range(i, min(i + segment, LAYERS)) for i in range(0, LAYERS, segment)]
    with frozen(model), Counted() as counted:
        batches = make_batches(WINDOWS, MinifyConfig(num_windows=6, window=16), 2, Ranks())
        saliency_sweep(Stream.from_module(model), batches, segments, Run.in_memory(), gram=True)
    losses, calls = len(batches.ids), len(batches.ids) * (1 + (segment == LAYERS))
    # Besides: transformers asks each call of the model once whether its windows are packed.
    # Each time that the engine's layers are put in, three probes are compared, on the CPU.
    probes = 3 * (2 * len(segments) - 1)
    # What the layers are called with is made for two texts and compared, once.
    compared = 10
    assert counted.syncs <= LAYERS + losses + 2 * calls + probes + compared, counted.launches


def test_saliency_on_fewer_windows_scores_these_and_collects_all(source: Path, tmp_path: Path) -> None:
    config = MinifyConfig(saliency_windows=2, num_windows=6, window=16)
    model = tiny_model("llama")
    stream = Stream.from_module(model)
    found = []
    with frozen(model):
        for windows, some in ((WINDOWS, config), (WINDOWS[[1, 4]], MinifyConfig(num_windows=2, window=16))):
            for segments in ([range(LAYERS)], [range(i, i + 1) for i in range(LAYERS)]):
                work = Run.in_memory()
                saliency_sweep(stream, make_batches(windows, some, 1, Ranks()), segments, work, gram=True)
                found.append([work.statistics(x, gram=True) for x in stream.structures])
        everything = Run.in_memory()
        whole = make_batches(WINDOWS, MinifyConfig(num_windows=6, window=16), 1, Ranks())
        saliency_sweep(stream, whole, [range(LAYERS)], everything, gram=True)
    for layer in range(LAYERS):
        few, few_segmented, alone, _ = (statistics[layer] for statistics in found)
        assert few.gram is not None and few_segmented.gram is not None
        assert (few.num_tokens, few.num_scored) == (WINDOWS.numel(), 32) and alone.num_scored == 32
        torch.testing.assert_close(few.score("fisher"), alone.score("fisher"))
        torch.testing.assert_close(few_segmented.score("fisher"), alone.score("fisher"))
        torch.testing.assert_close(few.gram, everything.statistics(stream.structures[layer], gram=True).gram)
        torch.testing.assert_close(few_segmented.gram, few.gram)


def test_saliency_on_fewer_windows_is_another_run(source: Path, tmp_path: Path) -> None:
    one, other = (MinifyConfig(saliency_windows=count).identity()["statistics"] for count in (None, 4))
    assert one != other
    report, _ = run(source, tmp_path, saliency_windows=2)
    full, _ = run(source, tmp_path / "full")
    assert 0.4 * full.plan.flops < report.plan.flops < 0.95 * full.plan.flops
