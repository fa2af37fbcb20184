"""Speed in turns: the protocol that is stated, and the rule by which a ratio is a difference or noise."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minisp.errors import CalibrationError, ConfigError
from minisp.evaluate import measure, speed, tables
from minisp.evaluate.speed import MIN_TURNS, Generation, interval_place, paired_ratio, throughput
from tests.tiny import POSITIONS, save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@contextmanager
def held(model: nn.Module) -> Iterator[nn.Module]:
    yield model


@cache
def small_model(seed: int) -> Any:
    return tiny_model("llama", seed=seed)


class Clock:
    """Stands in for the time module: it moves only when a model works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Machine:
    """Fakes what `throughput` times: each model takes its own seconds, times what the machine does at that moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Sequence[float], noise: Any):
        self.clock, self.turns, self.names = Clock(), 0, []
        self.models = [small_model(place) for place in range(len(seconds))]
        self.seconds = {id(model): value for model, value in zip(self.models, seconds, strict=True)}
        self.noise = noise
        monkeypatch.setattr(speed, "time", self.clock)
        monkeypatch.setattr(speed, "time_generation", self.generate)

    def generate(self, model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
        self.names.append(next(place for place, own in enumerate(self.models) if own is model))
        prefill, decode = (self.seconds[id(model)] * self.noise(self.clock.now) for _ in range(2))
        self.clock.now += prefill + decode
        return prefill, decode

    def run(self, **options: Any) -> Any:
        return throughput([partial(held, model) for model in self.models], **options)


def test_the_interval_misses_the_median_in_at_most_one_of_twenty() -> None:
    for count in range(1, 80):
        place = interval_place(count)
        missed = [2 * sum(comb(count, i) for i in range(k)) / 2**count for k in (place, place + 1)]
        assert missed[0] <= 0.05 < missed[1]
    assert [interval_place(count) for count in (5, 6, 7, 9, 20)] == [0, 1, 1, 2, 6]
    assert interval_place(MIN_TURNS) > 0
    # 2¹⁰²⁴ is no float.
    assert 900 < interval_place(2000) < 1000


def test_the_ratio_is_that_of_neighbours_not_of_medians() -> None:
    # The machine slows down tenfold; the second model is a tenth faster all along.
    first = [float(2**turn) for turn in range(9)]
    found = paired_ratio(first, [seconds / 1.1 for seconds in first])
    assert found.median == pytest.approx(1.1) and (found.low, found.high) == pytest.approx((1.1, 1.1))
    assert found.pairs == 9 and not found.within_noise


@pytest.mark.parametrize(
    ("ratios", "interval", "noise"),
    [
        # Of seven, least and largest are the interval; of nine, the second and the last but one.
        ([1.1, 1.2, 1.05, 1.3, 1.02, 1.1, 1.15], (1.02, 1.3), False),
        ([1.1, 1.2, 1.05, 1.3, 0.99, 1.1, 1.15], (0.99, 1.3), True),
        ([1.1, 1.2, 1.05, 1.3, 0.5, 1.1, 1.15, 1.1, 1.1], (1.05, 1.2), False),
        ([0.9, 0.8, 0.95, 0.7, 0.98, 0.9, 0.85], (0.7, 0.98), False),
        ([1.0] * 9, (1.0, 1.0), True),
        ([1.1] * 5, (1.1, 1.1), True),
    ],
)
def test_noise_is_what_has_one_inside(ratios: list[float], interval: tuple[float, float], noise: bool) -> None:
    found = paired_ratio(ratios, [1.0] * len(ratios))
    assert (found.low, found.high) == pytest.approx(interval)
    assert found.within_noise is noise


def test_a_real_difference_of_a_tenth_is_found_on_a_noisy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    # A load that comes and goes over tens of seconds, up to twice the time, and 5 % from turn to turn.
    machine = Machine(
        monkeypatch, [0.55, 0.5], lambda now: (2 if int(now / 9) % 2 else 1) * chance.lognormvariate(0, 0.05)
    )
    _, (ratios,) = machine.run(budget=30.0)
    for ratio in ratios.values():
        assert ratio.low < 1.1 < ratio.high and not ratio.within_noise


def test_equal_models_are_within_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    called_different = 0
    for seed in range(60):
        chance = random.Random(seed)
        machine = Machine(monkeypatch, [0.5, 0.5], lambda now, chance=chance: chance.lognormvariate(0, 0.1))
        _, (ratios,) = machine.run(budget=20.0)
        called_different += not ratios["decode"].within_noise
    # 3 of sixty on average at most; 9 and more would come once in 400 such tests.
    assert called_different < 9


def test_models_take_turns_and_the_order_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, [1.0, 1.0], lambda now: 1.0)
    speeds, _ = machine.run(budget=1.0)
    # A warm-up of each first.
    assert machine.names == [0, 1, *[0, 1, 1, 0] * (MIN_TURNS // 2), *[0, 1] * (MIN_TURNS % 2)]
    assert {own.turns for own in speeds} == {MIN_TURNS}


def test_turns_go_on_until_the_time_is_up_and_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    machine = Machine(monkeypatch, [0.5, 0.5], lambda now: 1.0)
    speeds, _ = machine.run(budget=20.0, on_progress=lambda done, total: seen.append((done, total)))
    assert speeds[0].turns == 10
    assert seen == [*((done, 10) for done in range(1, 11)), (10, 10)]


def test_a_slow_start_costs_nothing_and_speeds_are_medians(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(9.0, 9.0), *[(0.5, 4.0), (0.25, 1.0), (2.0, 2.0)] * 3])
    monkeypatch.setattr(speed, "time_generation", lambda *_: next(times))
    monkeypatch.setattr(speed, "MIN_TURNS", 9)
    (found,), ratios = throughput([partial(held, llama)], Generation(10, 6, 4), budget=0.0)
    assert ratios == []
    assert (found.prefill_tokens_per_second, found.decode_tokens_per_second) == (80, 12)
    assert (found.prefill_range, found.decode_range) == ((20, 160), (6, 24))


def test_the_protocol_that_is_stated_is_run(llama: Any) -> None:
    calls: list[tuple[tuple[int, ...], int]] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        calls.append((tuple(kwargs["input_ids"].shape), past.get_seq_length() if past is not None else 0))

    with llama.register_forward_pre_hook(record, with_kwargs=True):
        (found,), _ = throughput([partial(held, llama)], Generation(10, 6, 3), budget=0.0)
    generation = [((3, 10), 0), *(((3, 1), 10 + step) for step in range(6))]
    assert calls == generation[:5] + MIN_TURNS * generation
    assert (found.prompt_tokens, found.new_tokens, found.batch, found.turns) == (10, 6, 3, MIN_TURNS)
    assert (found.device, found.dtype) == ("cpu", "float32")


@pytest.mark.parametrize(
    ("asked", "got"), [((512, 64), (32, 32)), ((512, 8), (56, 8)), ((20, 60), (20, 32)), ((20, 20), (20, 20))]
)
def test_generations_stay_within_the_positions(llama: Any, asked: tuple[int, int], got: tuple[int, int]) -> None:
    assert POSITIONS == 64
    clipped = Generation(*asked).within(llama)
    assert (clipped.prompt_tokens, clipped.new_tokens) == got


def test_what_one_model_has_no_positions_for_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, [1.0, 1.0], lambda now: 1.0)
    machine.models[0] = tiny_model("llama", max_position_embeddings=32)
    machine.seconds[id(machine.models[0])] = 1.0
    speeds, _ = machine.run(budget=0.0)
    assert [(own.prompt_tokens, own.new_tokens) for own in speeds] == 2 * [(16, 16)]


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Generation(**{name: 0})


# Two checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    parent = tmp_path_factory.mktemp("pair")
    sizes = {"wide": 48, "narrow": 24}
    wide, narrow = (
        save_checkpoint(parent / name, tiny_model("llama", intermediate_size=size)) for name, size in sizes.items()
    )
    return wide, narrow


@pytest.mark.parametrize("together", [True, False])
def test_two_models_are_measured_side_by_side_and_it_is_said_how(
    together: bool, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = measure.load_any
    monkeypatch.setattr(measure, "load_any", lambda folder, *rest: loads.append(folder) or load(folder, *rest))
    if not together:
        monkeypatch.setattr(measure.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    monkeypatch.setattr(measure, "throughput", partial(throughput, generation=Generation(8, 2), budget=0.0))
    tokens = {"prose": torch.arange(200) % 64}
    seen: list[str] = []
    (found,) = measure.compare(
        folders, tokens, measure.Protocol(window=32), progress=lambda phase, done, total: seen.append(phase)
    )
    alone = [measure.measure(folder, tokens, measure.Protocol(window=32), speed=False) for folder in folders]
    assert [own.perplexity["prose"].value for own in (found.first, found.second)] == [
        own.perplexity["prose"].value for own in alone
    ]
    assert found.first.parameters > found.second.parameters
    assert found.together is together
    assert "speed, in turns" in seen
    (turns,) = {own.throughput.turns for own in (found.first, found.second) if own.throughput}
    assert {ratio.pairs for ratio in found.ratios.values()} == {turns}
    # Once each, or for the quality, the warm-up and every turn; and once each for the two measured alone.
    assert len(loads) == 2 + 2 * (1 if together else 2 + turns)
    words = " ".join(tables.comparison_lines(found))
    assert ("both in memory" in words) is together and ("loaded anew" in words) is not together


def test_the_table_calls_noise_noise(folders: tuple[Path, Path]) -> None:
    words = [tables.ratio_words(paired_ratio([ratio] * 9, [1.0] * 9)) for ratio in (1.12, 1.0)]
    assert words == ["×1.12 (1.12–1.12)", "×1.00 (1.00–1.00)\nwithin noise"]


def test_models_of_two_tokenizers_are_not_compared(folders: tuple[Path, Path]) -> None:
    first = {"a.txt": torch.tensor([1, 2, 3])}
    measure.check_same_tokens(folders, first, {"a.txt": torch.tensor([1, 2, 3])})
    for other in ([1, 2], [1, 2, 4]):
        with pytest.raises(
            CalibrationError, match=r"Text a\.txt: expected two models with one tokenizer, got 3 tokens"
        ):
            measure.check_same_tokens(folders, first, {"a.txt": torch.tensor(other)})
