"""Running in little memory: layouts that fit a limit, embeddings and head left on disk, reads ahead of their use."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minisp import fast
from minisp.config import Labels, MinifyConfig
from minisp.errors import CheckpointError, ConfigError
from minisp.models.loader import Loader
from minisp.models.objective import Objective
from minisp.models.skeleton import frozen
from minisp.models.stream import Stream
from minisp.models.structures import Structure
from minisp.phases.batches import Batches
from minisp.phases.refit import dense_bytes
from minisp.phases.run import Phase, Run
from minisp.phases.saliency import saliency_sweep
from minisp.phases.sizes import Sizes
from minisp.plan.layout import choose_layout
from minisp.plan.rooms import make_rooms, writes_behind
from minisp.store.checkpoint import Checkpoint
from minisp.store.files import WriteBehind
from minisp.units import parse_size
from tests.tiny import LAYERS, MODEL_TYPES, VOCABULARY, save_checkpoint, tiny_model

CPU = torch.device("cpu")
WINDOWS = torch.arange(5 * 16).reshape(5, 16) * 37 % VOCABULARY

# Llama 3B: 28 layers of 101M parameters, 128256 tokens, bfloat16.
LARGE = Sizes(
    num_layers=28, hidden=3072, vocabulary=128256, layer=100_667_392, inside=28 * 100_667_392,
    structures=tuple(Structure(layer, "mlp", 8192, 1, (), "down", 3 * 3072) for layer in range(28)),
    vocabulary_weights=394_002_432, outside=3072, tokenizer=0, config=MinifyConfig(num_windows=8), ranks=1,
    batch_tokens=512, item=2, stored_item=2, autograd=61_552, kept=8064, logits=48 * 2**20, loaded=False, streams=True,
    writes=True,
)  # fmt: skip


def test_a_layout_fits_its_limit_and_more_memory_is_never_slower() -> None:
    layouts = [choose_layout(LARGE, int(gb * 1e9), None, "Limit") for gb in (1.6, 2.2, 3, 6, 20)]
    for gb, layout in zip((1.6, 2.2, 3, 6, 20), layouts, strict=True):
        assert layout.peak <= gb * 1e9
        assert set(layout.peaks) >= {"saliency sweep", "refit", "writing"}
        assert ("head" in layout.peaks) == layout.stream_vocabulary
    assert [layout.segment for layout in layouts[2:]] == sorted(layout.segment for layout in layouts[2:])
    assert (layouts[0].stream_vocabulary, layouts[0].segment) == (True, 1)
    assert (layouts[-1].stream_vocabulary, layouts[-1].segment) == (False, 28)


def test_the_peak_depends_neither_on_layers_nor_on_tokens() -> None:
    deeper = tuple(Structure(layer, "mlp", 8192, 1, (), "down", 3 * 3072) for layer in range(4 * 28))
    for larger in (
        replace(LARGE, num_layers=4 * 28, structures=deeper),
        replace(LARGE, config=MinifyConfig(num_windows=800)),
    ):
        assert choose_layout(larger, int(1.6e9), 1, "Limit").peak == choose_layout(LARGE, int(1.6e9), 1, "Limit").peak


@pytest.mark.parametrize("host", [0, 10**9, 10**11])
def test_what_waits_in_memory_keeps_every_phase_within_its_limits(host: int) -> None:
    for gb in (1.6, 2.2, 3, 6, 20):
        limit = int(gb * 1e9)
        layout, rooms = make_rooms(LARGE, choose_layout(LARGE, limit, None, "Limit"), limit, host, on_disk=False)
        assert layout.peak <= limit
        if layout.dense == "memory":
            # What the sweep leaves on the device stays there.
            stays = min(rooms[Phase.SWEEP].device, dense_bytes(LARGE))
            for phase, room in rooms.items():
                assert stays + sum(layout.peaks[phase].values()) - room.device <= limit
        behind = writes_behind(LARGE, layout, rooms, host)
        assert 2 * behind + max(room.host for room in rooms.values()) <= host


def test_jobs_behind_hold_no_more_than_their_room() -> None:
    free = threading.Event()
    with WriteBehind() as behind:
        behind.room = 100
        for _ in range(3):
            behind.submit(free.wait, size=30)
        threading.Timer(0.05, free.set).start()
        behind.submit(list, size=10)
        assert free.is_set()
        behind.settle()


def test_what_never_fits_is_refused_with_what_it_would_take() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_layout(LARGE, 10**9, None, "Option host_memory")
    found = re.search(r"Option host_memory: expected at least ([\d.]+) GB, got 1\.000 GB\. With", str(caught.value))
    assert found is not None
    assert choose_layout(LARGE, int(float(found[1]) * 1e9 + 1e7), None, "Option host_memory")


def test_sizes() -> None:
    assert [parse_size(text) for text in ("2GB", "2gb", "1.5GiB", "512MiB", 7)] == [
        2 * 10**9, 2 * 10**9, 3 * 2**29, 2**29, 7,
    ]  # fmt: skip
    for wrong in ("much", "-1GB", "0GB", "GB", "2"):
        with pytest.raises(ConfigError, match="Option host_memory: expected a size above 0 in KB"):
            fast.plan("nowhere", host_memory=wrong)


def statistics(stream: Stream, segment: int, objective: Objective) -> list[tuple[Tensor, Tensor]]:
    run = Run.in_memory()
    segments = [range(i, min(i + segment, LAYERS)) for i in range(0, LAYERS, segment)]
    with frozen(stream.model):
        saliency_sweep(stream, Batches.scoring(WINDOWS.split(2)), segments, run, objective=objective, gram=True)
    found = [run.statistics(x, gram=True) for x in stream.structures]
    assert all(record.gram is not None for record in found)
    return [(record.saliency, record.gram) for record in found if record.gram is not None]


@pytest.mark.parametrize("labels", ["text", "sampled", "both"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_streamed_vocabulary_gives_the_same_statistics(
    model_type: str, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of 5 rows of the vocabulary, two micro-batches for the head at once.
    monkeypatch.setattr("minisp.models.vocabulary.BLOCK_BYTES", 4 * 60 * 5)
    monkeypatch.setattr("minisp.phases.boundaries.HEAD_TOKENS", 64)
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, tiny_model(model_type)))
    resident = Stream.from_checkpoint(checkpoint, CPU, torch.float32)
    objective = Objective(labels, 7)
    held = statistics(resident, LAYERS, objective)
    stream = Stream.from_checkpoint(checkpoint, CPU, torch.float32, num_slots=2, stream_vocabulary=True)
    assert stream.model.get_input_embeddings().weight.is_meta
    for (saliency, gram), (expected, expected_gram) in zip(statistics(stream, 1, objective), held, strict=True):
        torch.testing.assert_close(saliency, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gram, expected_gram, rtol=1e-5, atol=1e-5)
    ids = WINDOWS[:3]
    hidden = torch.randn(3, 16, stream.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    loss, gradient = stream.loss_gradient(hidden, ids, objective)
    with frozen(stream.model):
        expected_loss, expected = resident.loss_gradient(hidden, ids, objective)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_the_loader_gives_what_is_stored(num_slots: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, model, max_shard_size="8KB"))
    loader = Loader(checkpoint, CPU, num_slots)
    names = [[name for name in checkpoint.tensors if f".{layer}." in name] for layer in range(LAYERS)]
    reading = [loader.start(group) for group in names[:num_slots]]
    for place, group in enumerate(names):
        tensors = reading[place].result()
        assert sorted(tensors) == sorted(group)
        assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in group)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
        if place + num_slots < LAYERS:
            reading.append(loader.start(names[place + num_slots]))


def test_a_shard_that_shrinks_meanwhile_is_a_typed_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, tiny_model("llama")))
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cannot be read \(the file ends too early\)"):
        Loader(checkpoint, CPU, 1).start(list(checkpoint.tensors)).result()
    with pytest.raises(CheckpointError, match="cannot be read"):
        dict(checkpoint.read(checkpoint.tensors))
