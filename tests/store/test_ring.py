"""The ring of pinned chunks, on a CPU: copies that come late, chunks that are used again too early, failures."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisp.errors import CheckpointError
from minisp.models import loader as loader_module
from minisp.models.loader import Loader
from minisp.store.checkpoint import Checkpoint
from minisp.store.ring import CHUNK_BYTES, NUM_CHUNKS, Ring, ring_bytes
from tests.tiny import LAYERS, save_checkpoint, tiny_model

CPU = torch.device("cpu")
CHUNK = 256


def allocate(size: int) -> Tensor:
    return torch.full((size,), 255, dtype=torch.uint8)


class LateCopies:
    """Copies into `target` that take place only when they are waited for: the latest that a GPU could be."""

    def __init__(self, size: int):
        self.target = allocate(size)
        self.under_way: list[Tensor] = []
        self.most = 0

    def copy(self, start: int, memory: Tensor) -> Any:
        copies = self
        copies.under_way.append(memory)
        copies.most = max(copies.most, len(copies.under_way))

        class Event:
            def synchronize(self) -> None:
                copies.target[start : start + len(memory)] = memory
                copies.under_way = [other for other in copies.under_way if other.data_ptr() != memory.data_ptr()]

        return Event()


def reading(source: Tensor, copies: LateCopies) -> Callable[[int, Tensor], None]:
    def read(start: int, memory: Tensor) -> None:
        assert all(memory.data_ptr() != other.data_ptr() for other in copies.under_way), "a copy out of it is under way"
        memory.copy_(source[start : start + len(memory)])

    return read


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 10 * CHUNK + 17])
def test_everything_arrives_however_late_the_copies_are(size: int, num_chunks: int) -> None:
    source = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    ring = Ring(allocate, num_chunks, CHUNK)
    # Once more, from another place in the turn of the chunks.
    for _ in range(2):
        copies = LateCopies(size)
        checked: list[tuple[int, int]] = []

        def check(start: int, memory: Tensor, checked: list[tuple[int, int]] = checked) -> None:
            checked.append((start, len(memory)))

        ring.carry(size, reading(source, copies), check, copies.copy)
        assert torch.equal(copies.target, source)
        assert copies.under_way == []
        assert checked == [(start, min(CHUNK, size - start)) for start in range(0, size, CHUNK)]
        assert copies.most <= num_chunks


def test_a_chunk_that_is_used_too_early_is_found_by_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisp.store.ring._Chunk.settle", lambda chunk: None)
    copies = LateCopies(8 * CHUNK)
    with pytest.raises(AssertionError, match="under way"):
        Ring(allocate, 3, CHUNK).carry(8 * CHUNK, reading(allocate(8 * CHUNK), copies), lambda *_: None, copies.copy)


def test_reading_checking_and_copying_overlap() -> None:
    """A check does not end before the next chunk is read; the first copy does not end before the check after it."""
    read, checked = ([threading.Event() for _ in range(4)] for _ in range(2))

    class Event:
        def __init__(self, place: int):
            self.place = place

        def synchronize(self) -> None:
            assert checked[min(self.place + 1, 3)].wait(20)

    def check(start: int, _: Tensor) -> None:
        place = start // CHUNK
        assert read[min(place + 1, 3)].wait(20)
        checked[place].set()

    Ring(allocate, 3, CHUNK).carry(
        4 * CHUNK, lambda start, _: read[start // CHUNK].set(), check, lambda start, _: Event(start // CHUNK)
    )


@pytest.mark.parametrize("step", ["read", "check", "copy"])
def test_after_a_failure_nothing_is_under_way_and_the_ring_can_be_used(step: str) -> None:
    source = torch.arange(6 * CHUNK).to(torch.uint8)
    ring, copies, busy = Ring(allocate, 3, CHUNK), LateCopies(6 * CHUNK), threading.Event()
    read = reading(source, copies)

    def failing(name: str) -> None:
        if name == step:
            raise CheckpointError("no luck")

    def slow_read(start: int, memory: Tensor) -> None:
        busy.set()
        if start == 3 * CHUNK:
            failing("read")
        time.sleep(0.01)
        read(start, memory)
        busy.clear()

    def check(start: int, memory: Tensor) -> None:
        if start == 2 * CHUNK:
            failing("check")

    def copy(start: int, memory: Tensor) -> Any:
        if start == 2 * CHUNK:
            failing("copy")
        return copies.copy(start, memory)

    with pytest.raises(CheckpointError, match="no luck"):
        ring.carry(len(source), slow_read, check, copy)
    assert copies.under_way == []
    assert step == "read" or not busy.is_set()
    ring.carry(len(source), read, lambda *_: None, copies.copy)
    assert torch.equal(copies.target, source)


def test_page_locked_memory_is_bounded_and_no_more_than_is_needed() -> None:
    sizes: list[int] = []

    def counted(size: int) -> Tensor:
        sizes.append(size)
        return allocate(size)

    ring, copies = Ring(counted, 3, CHUNK), LateCopies(50 * CHUNK)
    assert sizes == []
    for size, chunks in ((CHUNK, 1), (2 * CHUNK, 2), (50 * CHUNK, 3), (CHUNK, 3)):
        ring.carry(size, lambda *_: None, lambda *_: None, copies.copy)
        assert sizes == chunks * [CHUNK]
    assert [ring_bytes(size) for size in (0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 80 * 10**9)] == [
        chunks * CHUNK_BYTES for chunks in (0, 1, 1, 2, NUM_CHUNKS)
    ]


# The loader, as a GPU has it.


@pytest.fixture
def ringed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Checkpoint, int], Loader]:
    """ringed(checkpoint, num_slots): a loader whose slots are filled through a ring, by copies that are late."""

    class LateSlot(loader_module._Slot):
        def copy(self, start: int, memory: Tensor) -> Any:
            copies = LateCopies(0)
            copies.target = self.buffer
            return copies.copy(start, memory)

    def make(checkpoint: Checkpoint, num_slots: int) -> Loader:
        monkeypatch.setattr(loader_module, "_Slot", LateSlot)
        loader = Loader(checkpoint, CPU, num_slots)
        loader._ring = Ring(allocate, 3, CHUNK)
        return loader

    return make


@pytest.mark.parametrize("num_slots", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_larger_than_a_chunk_come_whole(
    num_slots: int, dtype: torch.dtype, tmp_path: Path, ringed: Callable[[Checkpoint, int], Loader]
) -> None:
    model = tiny_model("qwen2").to(dtype)
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, model, max_shard_size="8KB"))
    assert len({place.file for place in checkpoint.tensors.values()}) > 1
    names = [[name for name in checkpoint.tensors if f".{layer}." in name] for layer in range(LAYERS)]
    assert any(checkpoint.tensors[name].num_bytes > 2 * CHUNK for name in names[0])
    loader = ringed(checkpoint, num_slots)
    # A second time they are not checked, but read all the same.
    for group in [*names, *names]:
        tensors = loader.start(group).result()
        assert sorted(tensors) == sorted(group)
        assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in group)


@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_is_named_whichever_part_it_is_in(
    place: int, tmp_path: Path, ringed: Callable[[Checkpoint, int], Loader]
) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.view(-1)[place] = float("nan")
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, model))
    loader = ringed(checkpoint, 2)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: expected finite values"):
            loader.start(list(checkpoint.tensors)).result()


def test_a_shard_that_shrinks_is_a_typed_error_through_the_ring_too(
    tmp_path: Path, ringed: Callable[[Checkpoint, int], Loader]
) -> None:
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, tiny_model("llama")))
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match=r"cannot be read \(the file ends too early\)"):
        ringed(checkpoint, 1).start(list(checkpoint.tensors)).result()
