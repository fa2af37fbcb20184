"""Text from files, JSONL, documents, hub data sets and Python itself; the command line's way of naming it."""

import json
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minisp.errors import CalibrationError
from minisp.text.builtin import code_text, documentation_text
from minisp.text.corpora import (
    Corpus,
    load_text,
    load_texts,
    open_documents,
    open_file,
    open_hub,
    parse_source,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def whole(corpus: Corpus) -> str:
    text, exhausted = corpus.prefix(10**6)
    assert exhausted
    return text


# Reading


def test_a_corpus_reads_no_further_than_asked() -> None:
    corpus = Corpus("", iter(["x" * 100] * 50))
    assert corpus.prefix(250) == ("x" * 250, False)
    assert len(list(corpus.pieces)) == 47
    assert corpus.prefix(299) == ("x" * 299, False)
    assert corpus.prefix(300) == corpus.prefix(1000) == ("x" * 300, True)
    assert corpus.prefix(10) == ("x" * 10, False)


def test_a_large_file_is_read_in_pieces(tmp_path: Path) -> None:
    corpus = open_file(write(tmp_path / "large.txt", "x" * 500_000))
    assert corpus.prefix(10) == ("x" * 10, False)
    assert 300_000 < sum(map(len, corpus.pieces)) < 500_000
    assert corpus.label == "large.txt"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert load_text(tmp_path / "bom.txt") == "abc"


@pytest.mark.parametrize("key", ["text", "content"])
def test_jsonl_lines_are_documents_with_an_empty_line_between(tmp_path: Path, key: str) -> None:
    lines = [json.dumps({"id": 1, key: "one\u2028more"}, ensure_ascii=False), "", json.dumps({key: "two"})]
    file = write(tmp_path / "rows.jsonl", "\n".join(lines))
    assert load_text(file) == whole(open_file(str(file))) == "one\u2028more\n\ntwo"


def test_documents_are_pulled_one_by_one() -> None:
    documents = iter(["abc"] * 1000)
    assert open_documents(documents).prefix(12) == ("abc\n\nabc\n\nab", False)
    assert len(list(documents)) > 990


def test_documentation_halves_are_disjoint_and_together_the_whole() -> None:
    all_parts = documentation_text().split("\n\n")
    even, odd = documentation_text("even").split("\n\n"), documentation_text("odd").split("\n\n")
    assert Counter(even) + Counter(odd) == Counter(all_parts)
    assert min(len(even), len(odd)) > len(all_parts) / 4
    assert max(even, key=len) not in odd


def test_code_text_is_source_code_and_longer_requests_continue_shorter_ones() -> None:
    text = code_text(200_000)
    assert len(text) == 200_000
    assert text.startswith(code_text(5000))
    assert text.count("\ndef ") + text.count("\n    def ") > 50
    with pytest.raises(CalibrationError, match="characters of source code"):
        code_text(10**9)


# Refusals


@pytest.mark.parametrize("name", ["nowhere.txt", "", "nul\0byte", "The quick brown fox. " * 400])
def test_a_string_that_is_no_file_is_never_taken_for_text(name: str) -> None:
    with pytest.raises(CalibrationError, match="list of strings") as caught:
        open_file(name)
    assert len(str(caught.value)) < 300


def test_folders_empty_files_and_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    cases = {"folder": tmp_path, "empty": write(tmp_path / "empty.txt", " \n"), "UTF-8": tmp_path / "latin.txt"}
    for message, path in cases.items():
        with pytest.raises(CalibrationError, match=message):
            load_text(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    file = write(tmp_path / "secret.txt", "text")
    file.chmod(0)
    with pytest.raises(CalibrationError, match="permission"):
        load_text(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "title": "y"}', r"\['body', 'title'\]"),
        ('{"text": 3}', r"string in field 'text'.*int"),
        ('["text"]', r"JSON object.*list"),
        ("{text}", "one JSON object per line"),
    ],
)
def test_bad_jsonl_names_line_and_fault(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "bad.jsonl", '{"text": "fine"}\n' + line)
    with pytest.raises(CalibrationError, match=message) as caught:
        whole(open_file(file))
    assert "line 2" in str(caught.value)


# The command line's form


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wiki.txt", ("wiki.txt", 1.0)),
        ("wiki.txt:0.3", ("wiki.txt", 0.3)),
        ("dir/wiki.txt:2", ("dir/wiki.txt", 2.0)),
        ("wiki.txt:1e-1", ("wiki.txt", 0.1)),
        ("C:\\text\\wiki.txt", ("C:\\text\\wiki.txt", 1.0)),
        ("C:\\text\\wiki.txt:.5", ("C:\\text\\wiki.txt", 0.5)),
        ("hf:owner/name", ("hf:owner/name", 1.0)),
        ("hf:owner/name:0.25", ("hf:owner/name", 0.25)),
        ("hf:owner/name:config:train", ("hf:owner/name:config:train", 1.0)),
        ("hf:owner/name:1.0:train:0.5", ("hf:owner/name:1.0:train", 0.5)),
    ],
)
def test_sources_of_the_command_line(text: str, expected: tuple[str, float]) -> None:
    assert parse_source(text) == expected


def test_a_file_whose_name_ends_like_a_weight_is_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "run:3", "text")
    assert parse_source(str(file)) == (str(file), 1.0)
    assert parse_source(f"{file}:0.5") == (str(file), 0.5)


@pytest.mark.parametrize("text", ["", ":0.3", "hf:", "hf:0.3", "a.txt:0", "a.txt:-1", "a.txt:inf", "a.txt:nan"])
def test_malformed_sources_of_the_command_line(text: str) -> None:
    with pytest.raises(CalibrationError, match="Expected"):
        parse_source(text)


# Hub data sets


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[Any]:
    """Stands in for `datasets`; gives the rows and keeps the calls."""
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("name", "args", "split"),
    [
        ("hf:o/n", ("o/n", None), "train"),
        ("hf:o/n:test", ("o/n", None), "test"),
        ("hf:o/n:c", ("o/n", "c"), "train"),
        ("hf:o/n:c:s", ("o/n", "c"), "s"),
    ],
)
def test_a_hub_data_set_is_streamed(
    monkeypatch: pytest.MonkeyPatch, name: str, args: tuple[str, str | None], split: str
) -> None:
    calls = fake_datasets(monkeypatch, ({"text": "abcd"} for _ in iter(int, 1)))
    corpus = open_hub(name)
    assert corpus.prefix(7) == ("abcd\n\na", False)
    assert calls == [(args, {"split": split, "streaming": True})]
    assert corpus.label == name


def test_hub_failures_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("the network went away")

    fake_datasets(monkeypatch, broken())
    with pytest.raises(CalibrationError, match=r"row 1 of hf:o/n.*network went away"):
        open_hub("hf:o/n").prefix(8)
    fake_datasets(monkeypatch, [{"body": "a"}])
    with pytest.raises(CalibrationError, match=r"hf:o/n row 0.*\['body'\]"):
        open_hub("hf:o/n").prefix(8)
    fake_datasets(monkeypatch, FileNotFoundError("no such data set"))
    with pytest.raises(CalibrationError, match="FileNotFoundError: no such data set"):
        open_hub("hf:o/n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        open_hub("hf:o/n")
    with pytest.raises(CalibrationError, match="hf:NAME"):
        open_hub("hf:o/n::test")


def test_texts_of_files_and_folders_each_once_by_names_that_differ(tmp_path: Path) -> None:
    for name in ("a/wiki/b.txt", "a/wiki/a.JSONL", "b/wiki/b.txt", "b/code", "b/other.txt", "b/skip.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("JSONL") else name)
    (tmp_path / "a" / "wiki" / "folder.txt").mkdir()
    paths = [tmp_path / "a/wiki", tmp_path / "b/wiki", tmp_path / "b/code", tmp_path / "a/../a/wiki/b.txt"]
    found = load_texts([*paths, tmp_path / "b"], taken=["code", "documentation"])
    assert list(found.items()) == [
        ("a.JSONL", "a/wiki/a.JSONL"),
        ("a/wiki/b.txt", "a/wiki/b.txt"),
        ("b/wiki/b.txt", "b/wiki/b.txt"),
        ("b/code", "b/code"),
        ("other.txt", "b/other.txt"),
    ]
    with pytest.raises(CalibrationError, match=r"\.txt or \.jsonl files in the folder .*empty, found none"):
        (tmp_path / "empty").mkdir()
        load_texts([tmp_path / "b/other.txt", tmp_path / "empty"])
