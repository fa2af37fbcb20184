"""Where states wait: in memory as far as there is room, saved every few minutes, computed again if they are lost."""

from pathlib import Path

import pytest
import torch

from minisp.store import tiers
from minisp.store.records import Folder, Memory
from minisp.store.tiers import Room, Tiers
from tests.runs.test_resume import interrupted, run, weights
from tests.tiny import save_checkpoint, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_model("llama"))


def keep(own: Tiers, name: str, count: int) -> None:
    with own.writing(name, sizes=[40] * count, number=count) as append:
        for key in range(count):
            append(str(key), torch.full((10,), float(key)))


def on_disk(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def test_a_record_is_in_memory_where_it_fits_whole_and_else_in_the_folder(tmp_path: Path) -> None:
    own = Tiers(Folder(tmp_path), CPU, Room(device=100))
    keep(own, "dense_0001", 2)
    keep(own, "pruned_0001", 1)
    assert on_disk(tmp_path) == ["pruned_0001"]
    for name, count in (("dense_0001", 2), ("pruned_0001", 1)):
        assert own.has(name) and own.keys(name) == [str(key) for key in range(count)]
        assert own.facts(name) == {"number": count}
        assert own.read(name, str(count - 1), ahead=True).tolist() == [count - 1.0] * 10
    assert not own.reserve(21) and own.reserve(20)
    assert not own.reserve(1)
    own.give_back(20)
    assert not own.reserve(10, beside=11) and own.reserve(10, beside=10)
    own.give_back(10)
    own.drop("dense_0001")
    keep(own, "dense_0002", 2)
    assert on_disk(tmp_path) == ["pruned_0001"] and not own.has("dense_0001")
    own.store.close()  # type: ignore[union-attr]


def test_what_a_phase_has_left_in_one_tier_keeps_nothing_out_of_another(tmp_path: Path) -> None:
    own = Tiers(Folder(tmp_path), CPU, Room(device=50, host=64))
    keep(own, "dense_0001", 1)
    # 40 bytes are pinned as 64.
    keep(own, "dense_0002", 1)
    keep(own, "dense_0003", 1)
    assert on_disk(tmp_path) == ["dense_0003"]
    own.room = Room(device=80)
    keep(own, "pruned_0001", 1)
    assert on_disk(tmp_path) == ["dense_0003"] and own.read("dense_0002", "0").tolist() == [0.0] * 10


def test_a_record_that_fails_takes_no_room() -> None:
    own = Tiers(Memory(), CPU, Room(device=80))
    with pytest.raises(RuntimeError), own.writing("dense_0001", sizes=[80]):
        raise RuntimeError
    assert own.reserve(80) and not own.has("dense_0001")


def test_without_a_folder_nothing_is_saved() -> None:
    store = Memory()
    own = Tiers(store, CPU, Room(device=80))
    keep(own, "gradient_0001", 2)
    own.save("gradient_0001")
    assert own.has("gradient_0001") and not store.has("gradient_0001")


def test_a_saved_boundary_stays_until_a_newer_one_is_saved(tmp_path: Path) -> None:
    own = Tiers(Folder(tmp_path), CPU, Room(device=1000))
    keep(own, "pruned_0001", 1)
    own.save("pruned_0001", "dense_0001")
    keep(own, "pruned_0002", 1)
    own.drop("pruned_0001")
    # Done with, and still there for a run that is killed now.
    assert not own.has("pruned_0001") and on_disk(tmp_path) == ["pruned_0001"]
    later = Tiers(Folder(tmp_path), CPU, Room(device=1000))
    assert later.has("pruned_0001") and not later.has("pruned_0002")
    own.save("pruned_0002")
    assert on_disk(tmp_path) == ["pruned_0001", "pruned_0002"]
    own.forget("pruned_0002")
    assert on_disk(tmp_path) == ["pruned_0002"] and own.has("pruned_0002")
    own.drop("pruned_0002")
    own.forget()
    assert on_disk(tmp_path) == []


@pytest.mark.parametrize("seconds", [0.0, 180.0])
@pytest.mark.parametrize("at", ["forward", "saliency, layers 1", "trial cuts", "refit sweep, layer 1"])
def test_states_that_were_in_memory_are_computed_anew_to_the_same_bits(
    at: str, seconds: float, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "SAVE_SECONDS", seconds)
    run(source, tmp_path / "whole", keep=0.6)
    options = {"keep": 0.6, "host_memory": "1000GB"}
    interrupted(source, tmp_path / "out", at, **options)
    kinds = {path.name.split("_")[0] for path in (tmp_path / ".out.scratch").glob("*_*.json")}
    assert bool(kinds & {"states", "gradient", "trials", "dense", "pruned"}) == (seconds == 0 and at != "forward")
    run(source, tmp_path / "out", resume=True, **options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
