"""Calibration windows: every kind of source, mixtures, the default, and every refusal."""

import warnings
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minisp.errors import CalibrationError
from minisp.phases.calibrate import narrowness
from minisp.text.builtin import CODE_HELD_OUT, code_text, documentation_text
from minisp.text.calibration import (
    Calibration,
    apportion,
    interleave,
    load_calibration,
)

BOS = 0
VOCAB = 128


class Letters:
    """One token per character, after one BOS."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS, *ids(text)]}


@pytest.fixture
def letters() -> Letters:
    return Letters()


def ids(text: str) -> list[int]:
    return [ord(c) % VOCAB for c in text]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def source_of(calibration: Calibration, letter: str) -> list[bool]:
    return [bool((row == ord(letter)).any()) for row in calibration.windows]


# One source


def test_a_text_file_is_cut_into_consecutive_windows(tmp_path: Path, letters: Letters) -> None:
    text = "the quick brown fox jumps over it"
    loaded = load_calibration(write(tmp_path / "wiki.txt", text), letters, num_windows=3, window=10)
    assert loaded.windows.dtype == torch.int64
    assert loaded.windows.flatten().tolist() == [BOS, *ids(text)][:30]
    assert loaded.description == ("3 windows of 10 tokens from wiki.txt",)
    assert loaded.windows.numel() == 30


def test_documents_are_joined_and_a_generator_is_read_no_further_than_needed(letters: Letters) -> None:
    pulled = 0

    def documents() -> Iterator[str]:
        nonlocal pulled
        while True:
            pulled += 1
            yield "abcde"

    loaded = load_calibration(documents(), letters, num_windows=2, window=8)
    text = [BOS, *ids("abcde\n\n" * 200)]
    assert all(row in [text[start : start + 8] for start in range(0, 1000, 8)] for row in loaded.windows.tolist())
    assert 3 <= pulled < 200
    as_list = load_calibration(["abcde"] * 200, letters, num_windows=2, window=8)
    assert torch.equal(as_list.windows, loaded.windows)


def test_flat_tokens_are_cut_and_rows_are_taken_as_they_are(letters: Letters) -> None:
    flat = torch.arange(25, dtype=torch.int32)
    with pytest.warns(UserWarning, match="holds 3 windows"):
        loaded = load_calibration(flat, None, num_windows=8, window=8, vocab_size=25)
    assert loaded.windows.dtype == torch.int64
    assert torch.equal(loaded.windows, torch.arange(24).view(3, 8))
    assert "not the 8 asked for" in loaded.description[1]
    rows = load_calibration(torch.arange(24).view(3, 8), None, num_windows=2, window=512)
    assert torch.equal(rows.windows, torch.arange(16).view(2, 8))
    flat.zero_()
    assert torch.equal(loaded.windows, torch.arange(24).view(3, 8))


def test_the_fingerprint_tells_tokens_and_shape_apart() -> None:
    tokens = torch.arange(24)

    def fingerprint(windows: Tensor) -> str:
        return Calibration(windows, ()).fingerprint

    strided = torch.stack([tokens, tokens], dim=1)[:, 0].view(3, 8)
    assert fingerprint(tokens.view(3, 8)) == fingerprint(strided)
    assert fingerprint(tokens.view(3, 8)) == fingerprint(tokens.clone().view(3, 8))
    assert fingerprint(tokens.view(3, 8)) != fingerprint(tokens.view(4, 6))
    assert fingerprint(tokens.view(3, 8)) != fingerprint((tokens + (tokens == 7)).view(3, 8))
    assert len(fingerprint(tokens.view(3, 8))) == 64


# Mixtures


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(1, 500))
def test_shares_add_up_and_stay_within_one_of_their_due(weights: list[float], total: int) -> None:
    counts = apportion(weights, total)
    assert sum(counts) == total
    due = [Fraction(w) * total / sum(map(Fraction, weights)) for w in weights]
    assert all(abs(count - share) < 1 for count, share in zip(counts, due, strict=True))


def test_shares_go_by_largest_remainder_and_ties_to_the_earlier() -> None:
    assert apportion([0.47, 0.16, 0.37], 10) == [5, 1, 4]
    assert apportion([1, 1, 1], 8) == [3, 3, 2]
    assert apportion([0.1, 0.1, 0.1], 4) == [2, 1, 1]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_every_prefix_of_a_mixture_is_mixed(sizes: list[int]) -> None:
    groups = [torch.stack([torch.tensor([g, k]) for k in range(size)]) for g, size in enumerate(sizes)]
    mixed = interleave(groups)
    assert len(mixed) == sum(sizes)
    for g, size in enumerate(sizes):
        assert mixed[mixed[:, 0] == g][:, 1].tolist() == list(range(size))
        for length in range(1, len(mixed) + 1):
            drawn = int((mixed[:length, 0] == g).sum())
            assert abs(drawn - size * length / len(mixed)) <= len(sizes) / 2 + 0.5


def test_a_weighted_mixture_shares_and_interleaves(tmp_path: Path, letters: Letters) -> None:
    a, b = write(tmp_path / "a.txt", "a" * 500), write(tmp_path / "b.txt", "b" * 500)
    mixture = {str(a): 3.0, b: 1}
    loaded = load_calibration(mixture, letters, num_windows=8, window=10)
    assert loaded.description == ("6 windows of 10 tokens from a.txt", "2 windows of 10 tokens from b.txt")
    of_b = source_of(loaded, "b")
    assert Counter(of_b[:4]) == Counter(of_b[4:]) == Counter({False: 3, True: 1})
    again = load_calibration(list(mixture.items()), letters, num_windows=8, window=10)
    assert again.fingerprint == loaded.fingerprint


def test_documents_and_tokens_may_be_parts_of_a_mixture(letters: Letters) -> None:
    mixture = [(["a" * 50], 1), (torch.full((50,), ord("b")), 1), (torch.full((4, 10), ord("c")), 2)]
    loaded = load_calibration(mixture, letters, num_windows=8, window=10)
    assert [sum(source_of(loaded, letter)) for letter in "abc"] == [2, 2, 4]


def test_a_list_of_files_is_a_mixture_in_equal_shares(tmp_path: Path, letters: Letters) -> None:
    files = [str(write(tmp_path / f"{letter}.txt", letter * 500)) for letter in "abc"]
    loaded = load_calibration(files, letters, num_windows=7, window=10)
    assert [sum(source_of(loaded, letter)) for letter in "abc"] == [3, 2, 2]


def test_a_part_too_light_for_one_window_is_announced(letters: Letters) -> None:
    loaded = load_calibration([(["a" * 500], 1.0), (["b" * 500], 0.01)], letters, num_windows=4, window=10)
    assert not any(source_of(loaded, "b"))
    assert "weight is too small" in loaded.description[1]


def test_a_part_that_runs_short_is_announced_and_does_not_stop_the_others(letters: Letters) -> None:
    with pytest.warns(UserWarning, match="holds 1 window of 10 tokens, not the 4 asked for"):
        loaded = load_calibration([(["a" * 500], 1), (["b" * 15], 1)], letters, num_windows=8, window=10)
    assert len(loaded.windows) == 5


# Generic text


def pages(num_windows: int, window: int) -> Tensor:
    """What a model that writes ones writes."""
    return torch.ones(num_windows, window, dtype=torch.int64)


def test_without_a_source_all_text_is_generic(letters: Letters) -> None:
    loaded = load_calibration(None, letters, num_windows=8, window=16, writer=pages)
    documentation = load_calibration([documentation_text("even")], letters, num_windows=2, window=16)
    rows = loaded.windows.tolist()
    assert rows.count([1] * 16) == 4
    assert all(row in rows for row in documentation.windows.tolist())
    assert [sentence.split(" from ")[0] for sentence in loaded.description] == [
        "4 windows of 16 tokens",
        "2 windows of 16 tokens",
        "2 windows of 16 tokens",
    ]


def test_generic_text_makes_do_with_what_there_is(letters: Letters) -> None:
    alone = load_calibration(None, letters, num_windows=4, window=16)
    assert alone.description == (
        "2 windows of 16 tokens from the documentation that comes with Python (generic)",
        "2 windows of 16 tokens from the source code that comes with Python (generic)",
    )
    written = load_calibration(None, None, num_windows=3, window=16, writer=pages)
    assert written.windows.tolist() == [[1] * 16] * 3
    with pytest.raises(CalibrationError, match="a tokenizer for the default calibration text"):
        load_calibration(None, None, num_windows=3, window=16)


@pytest.mark.parametrize("source", [["q" * 999], {"TEXT": 1.0}, [("TEXT", 2.0), ("TEXT", 1.0)]])
def test_a_share_of_the_windows_is_generic(tmp_path: Path, letters: Letters, source: Any) -> None:
    text = str(write(tmp_path / "text.txt", "q" * 999))
    if isinstance(source, dict):
        source = {text: 1.0}
    elif isinstance(source[0], tuple):
        source = [(text, weight) for _, weight in source]
    loaded = load_calibration(source, letters, num_windows=20, window=10, writer=pages, generic=0.2)
    own = [row for row in loaded.windows.tolist() if row.count(ord("q")) >= 9]
    assert len(loaded.windows) == 20
    assert len(own) == 16
    assert loaded.windows.tolist().count([1] * 10) == 2
    assert [sentence for sentence in loaded.description if sentence.endswith("(generic)")] == [
        "2 windows of 10 tokens from text that the model wrote itself (generic)",
        "1 window of 10 tokens from the documentation that comes with Python (generic)",
        "1 window of 10 tokens from the source code that comes with Python (generic)",
    ]


@pytest.mark.parametrize("source", ["builtin:code", {"builtin:code": 1.0}, [("builtin:code", 1.0)], ["builtin:code"]])
def test_a_source_that_names_what_is_built_in_is_taken_as_it_is(letters: Letters, source: Any) -> None:
    loaded = load_calibration(source, letters, num_windows=4, window=16, writer=pages, generic=0.5)
    assert loaded.description == ("4 windows of 16 tokens from the source code that comes with Python",)


def test_generic_text_that_runs_short_is_reported_and_no_reason_to_warn(letters: Letters) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_calibration(
            ["q" * 9999], letters, num_windows=40, window=10, writer=lambda n, m: pages(3, m), generic=0.5
        )
    assert "text that the model wrote itself (generic) holds 3 windows of 10 tokens, not the 10 asked for" in (
        loaded.description
    )
    assert len(loaded.windows) == 33


# Refusals


def test_too_little_text_names_its_source(tmp_path: Path, letters: Letters) -> None:
    short, empty = write(tmp_path / "short.txt", "abc"), write(tmp_path / "empty.txt", "\n")
    with pytest.raises(CalibrationError, match=r"512 tokens from short.txt, got 4 tokens"):
        load_calibration(short, letters)
    with pytest.raises(CalibrationError, match=r"from empty.txt, got no text at all"):
        load_calibration([(short, 1.0), (empty, 1.0)], letters, window=2, num_windows=2)
    with pytest.raises(CalibrationError, match="list of strings"):
        load_calibration("a text, not a path", letters)


def test_a_list_of_files_and_something_else_is_ambiguous(tmp_path: Path, letters: Letters) -> None:
    file = str(write(tmp_path / "a.txt", "a" * 100))
    with pytest.raises(CalibrationError, match=r"nowhere.txt.*no existing file"):
        load_calibration([file, "nowhere.txt"], letters)
    with pytest.raises(CalibrationError, match="pair"):
        load_calibration([(file, 1.0), file], letters)


@pytest.mark.parametrize("source", [[], {}, 3, b"bytes", [1, 2, 3], ["text", 3]])
def test_sources_of_no_known_kind(letters: Letters, source: Any) -> None:
    with pytest.raises(CalibrationError, match="Expected"):
        load_calibration(source, letters)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), True, None])
def test_weights_are_finite_and_positive(letters: Letters, weight: Any) -> None:
    with pytest.raises(CalibrationError, match="finite weight above 0"):
        load_calibration([(["a" * 100], 1.0), (["b" * 100], weight)], letters)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.rand(600), "integer"),
        (torch.ones(600, dtype=torch.bool), "integer"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"\(2, 3, 4\)"),
        (torch.arange(600), r"\[0, 128\).*511"),
        (torch.zeros(600, dtype=torch.int64) - 1, "got -1"),
        (torch.zeros(5, dtype=torch.int64), "got 5 tokens"),
        (torch.zeros(0, 8, dtype=torch.int64), "got 0 tokens"),
    ],
)
def test_tokens_that_do_not_fit(tokens: Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tokens, None, vocab_size=VOCAB, num_windows=1)


def test_a_tokenizer_of_another_model(letters: Letters) -> None:
    with pytest.raises(CalibrationError, match="tokenizer that belongs to the model"):
        load_calibration(["zzzz" * 100], letters, num_windows=1, window=8, vocab_size=100)


def test_rows_of_another_length_in_a_mixture(letters: Letters) -> None:
    with pytest.raises(CalibrationError, match=r"\(N, 16\).*\(4, 10\)"):
        load_calibration({torch.zeros(4, 10, dtype=torch.int64): 1.0}, letters, window=16)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    for source in (None, ["text"], write(tmp_path / "a.txt", "text")):
        with pytest.raises(CalibrationError, match=r"tokenizer.*integer tensor"):
            load_calibration(source, None)


def test_windows_the_model_cannot_take(letters: Letters) -> None:
    with pytest.raises(CalibrationError, match=r"at most 64 tokens.*got 65"):
        load_calibration(["a" * 1000], letters, window=65, max_positions=64)
    with pytest.raises(CalibrationError, match=r"at most 64 tokens.*got 80"):
        load_calibration(torch.zeros(2, 80, dtype=torch.int64), None, max_positions=64)
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        load_calibration(["a" * 1000], letters, window=1)
    with pytest.raises(CalibrationError, match="at least 1 calibration window"):
        load_calibration(["a" * 1000], letters, num_windows=0)


def test_narrow_calibration_is_said_to_be() -> None:
    said = partial(narrowness, vocab_size=50_000)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(1000, (8, 64), generator=generator)
    assert said(wide, width=256) == []
    assert said(torch.randint(1000, (1, 512), generator=generator), width=256) == []
    few = said(wide, width=257)
    assert len(few) == 1 and "512 calibration tokens are few for layers of 257 units" in few[0] and "514" in few[0]
    narrow = said(torch.randint(20, (8, 64), generator=generator), width=8)
    assert len(narrow) == 1 and "20 different tokens, used as unevenly as 20 even ones" in narrow[0]
    repeated = said(wide[:2].repeat(4, 1), width=8)
    assert repeated[-1].startswith("Of 8 calibration windows only 2 are different")


def test_few_different_tokens_are_nothing_special_in_a_small_vocabulary() -> None:
    assert narrowness(torch.randint(60, (8, 64)), width=8, vocab_size=256) == []


def test_builtin_sources_leave_out_what_evaluation_uses(letters: Letters) -> None:
    drawn = load_calibration({"builtin:documentation": 0.5, "builtin:code": 0.5}, letters, num_windows=4, window=16)
    assert drawn.description[0] == "2 windows of 16 tokens from the documentation that comes with Python"
    assert drawn.description[1] == "2 windows of 16 tokens from the source code that comes with Python"
    evaluated = "".join(map(chr, ids(code_text(CODE_HELD_OUT))))
    calibrated = "".join(map(chr, ids(code_text(CODE_HELD_OUT + 4000)[CODE_HELD_OUT:])))
    for row in drawn.windows[1::2].tolist():
        passage = "".join(map(chr, row))
        assert passage in calibrated and passage not in evaluated
    with pytest.raises(CalibrationError, match="builtin:model, got 'builtin:jokes'"):
        load_calibration("builtin:jokes", letters, num_windows=1, window=16)


def test_the_model_writes_only_where_it_can(letters: Letters) -> None:
    written = load_calibration("builtin:model", letters, num_windows=3, window=8, writer=lambda n, m: torch.ones(n, m))
    assert written.description == ("3 windows of 8 tokens from text that the model wrote itself",)
    with pytest.raises(CalibrationError, match="a model that fits in memory whole"):
        load_calibration({"builtin:model": 1.0}, letters, num_windows=3, window=8)
