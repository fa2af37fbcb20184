"""Downstream tasks made from a text and a seed: their items, what scores them, and the statistics of the table."""

import itertools
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import char_tokenizer, save_checkpoint, tiny_model


def made_text() -> str:
    """Paragraphs of 80 words and a full stop after every tenth, each with twelve words of its own."""
    rng = random.Random(0)
    starts = ["bar", "den", "fol", "gim", "hus", "jas", "kel", "nor", "pim", "tur"]
    parts = (starts, "aeiou", ["lor", "men", "nax"], ["s", "es", "ing", "al", "er"])
    words = ["".join(letters) for letters in itertools.product(*parts)]
    paragraphs = []
    for _ in range(30):
        own = rng.sample(words, 12)
        sentences = [" ".join(rng.choices(own, k=10)) for _ in range(8)]
        paragraphs.append(f" {' . '.join(sentences)} . \n")
    return "".join(paragraphs)


TEXT = made_text()


@pytest.fixture
def tasks(script: Any) -> Any:
    return script("offline_tasks").make_tasks(TEXT, {"foreign.txt": TEXT[::-1]}, 24, 0)


def questions(tasks: Any) -> dict[str, Any]:
    return {task.name: task.items for task in tasks if task.name != "programs"}


def test_every_question_has_different_candidates_and_one_is_right(tasks: Any) -> None:
    for name, items in questions(tasks).items():
        assert len(items) >= 12, name
        for item in items:
            assert len(set(item.candidates)) == len(item.candidates) >= 2, name
            assert 0 <= item.answer < len(item.candidates)
            # Where the tokens of an answer begin must not depend on blanks before it.
            assert (item.prefix + item.question)[-1:].strip()
            assert all(candidate[0].isspace() for candidate in item.candidates)
        assert len({len(item.candidates) for item in items}) == 1, name
        # No place is right all the time.
        assert len({item.answer for item in items}) > len(items[0].candidates) / 2, name


def test_the_right_candidate_is_right(tasks: Any) -> None:
    found = questions(tasks)
    right = {name: [(i.prefix, i.question, i.candidates[i.answer]) for i in items] for name, items in found.items()}
    for name in right:
        if name.startswith(("addition", "subtraction")):
            assert all(eval(question.rstrip("=")) == int(answer) for _, question, answer in right[name])
        if name.startswith("continuation"):
            text = TEXT[::-1] if "neutral" in name else TEXT
            assert all(prefix + answer in text for prefix, _, answer in right[name])
    for _, question, answer in right["comparison"]:
        assert int(answer) == max(map(int, re.findall(r"\d+", question)))
    for prefix, _, answer in right["lookup"]:
        told, asked = prefix.split(" Remember: ")
        assert told.count(f"{asked[:1].upper()}{asked[1:]}{answer}.") == 1
    for prefix, _, answer in right["repetition"]:
        first, second = prefix.split("\n")
        assert first.startswith(second + answer)
    for item in found["last word"]:
        words = item.prefix.split()
        assert {candidate.strip() for candidate in item.candidates} <= set(words)
        assert f"{item.prefix}{item.candidates[item.answer]} ." in " ".join(TEXT.split())
    for _, question, answer in right["agreement"]:
        plural = question.split()[1].endswith("s")
        assert answer.split()[0] in (("are", "were", "have") if plural else ("is", "was", "has"))


def test_items_depend_on_the_seed_alone(script: Any, tasks: Any) -> None:
    make = script("offline_tasks").make_tasks
    assert make(TEXT, {"foreign.txt": TEXT[::-1]}, 24, 0) == tasks
    # A task's items are the same whatever other tasks there are.
    assert [task for task in tasks if "neutral" not in task.name] == make(TEXT, {}, 24, 0)
    for one, other in zip(tasks, make(TEXT, {"foreign.txt": TEXT[::-1]}, 24, 1), strict=True):
        assert one.name == other.name and one.items != other.items


def program(script: Any, wanted: str) -> Any:
    found = [p for p in script("offline_programs").programs(200, 0) if f'"""Return {wanted}."""' in p.prompt]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("wanted", "completion", "passes"),
    [
        ("x plus 3", "\n    return x + 3\n\n\ndef f(x):\n    return nonsense", True),
        ("x plus 3", "\n    x += 3\n    return x\nprint(x)", True),
        ("x plus 3", "\n    return x + 4", False),
        ("x plus 3", "\n    return x +", False),
        ("x plus 3", "", False),
        ("x plus 3", "\n    while True:\n        pass", False),
        ("x plus 3", "\n    import os\n    return x + 3", False),
        ("x plus 3", "\n    open('file', 'w')\n    return x + 3", False),
        ("x plus 3", "\n    y = [0] * 10**10\n    return x + 3", False),
        ("x plus 3", "\n    return f(x)", False),
        ("s backwards", "\n    return s[::-1]", True),
        ("s backwards", "\n    return ''.join(reversed(s))", True),
        ("the elements of items in sorted order", "\n    return sorted(items)", True),
        ("the elements of items in sorted order", "\n    return items", False),
    ],
)
def test_a_completed_program_is_run_and_checked(script: Any, wanted: str, completion: str, passes: bool) -> None:
    assert script("offline_programs").passes(program(script, wanted), completion, seconds=20) is passes


def test_a_machine_that_runs_nothing_is_told(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("offline_programs")
    module.check_runner()
    monkeypatch.setattr(module, "_RUNNER", "raise SystemExit(0)")
    with pytest.raises(SystemExit, match="got a failure"):
        module.check_runner()


def test_a_text_that_is_too_short_is_refused(script: Any) -> None:
    with pytest.raises(SystemExit, match=r"got none for \['continuation', 'last word'\]"):
        script("offline_tasks").make_tasks("too short", {}, 10, 0)


def test_a_program_that_sleeps_is_stopped(script: Any) -> None:
    slow = "\n    while True:\n        pass"
    assert not script("offline_programs").passes(program(script, "x plus 3"), slow, seconds=0.2)


def test_programs_are_different_and_their_checks_agree_with_their_solutions(script: Any) -> None:
    module = script("offline_programs")
    found = module.programs(60, 0)
    assert len({p.prompt for p in found}) == len(found) == 60
    assert found == module.programs(60, 0) and found != module.programs(60, 1)
    # What the examples show is not asked.
    assert not any(line in module.SHOTS for p in found for line in p.head.splitlines() if "Return" in line)


@pytest.mark.parametrize(
    ("completion", "body", "ended"),
    [
        ("\n    a\n      b\n\n    c", "\n    a\n      b", True),
        ("\n    a\nb", "\n    a", True),
        ("\n    a\n", "\n    a", False),
        ("\n    a\n   ", "\n    a", False),
        ("\n    a\n\n", "\n    a", True),
        ("\n", "\n", False),
        ("", "", False),
        (" on the same line", " on the same line", False),
    ],
)
def test_a_body_ends_at_the_first_line_that_is_empty_or_not_indented(
    script: Any, completion: str, body: str, ended: bool
) -> None:
    module = script("offline_programs")
    assert module.body(completion).rstrip(" \n") == body.rstrip(" \n")
    assert module.ended(completion) is ended


def test_likelihoods_are_those_of_one_row_at_a_time(script: Any) -> None:
    scoring, make = script("offline_scoring"), script("offline_tasks")
    model, tokenizer = tiny_model("llama"), char_tokenizer()
    asked = [("the shared beginning ", "of a", (" row", " longer row", "n it")), ("", "alone", (" a", " b"))]
    asked += [("the shared beginning ", "of another one", (" x",)), ("one of its own", "", (" yes", " no"))]
    items = [make.Question(prefix, question, candidates, 0) for prefix, question, candidates in asked]
    found = scoring.choose(model, tokenizer, items)
    for item, own in zip(items, found, strict=True):
        for candidate, score in zip(item.candidates, own, strict=True):
            ids = torch.tensor([tokenizer(item.prefix + item.question + candidate)["input_ids"]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert score == pytest.approx(float(log_p[-len(candidate) :].sum()), abs=1e-4)


def test_completions_are_those_of_one_prompt_at_a_time(script: Any) -> None:
    scoring, model, tokenizer = script("offline_scoring"), tiny_model("llama"), char_tokenizer()
    prompts = ["short", "a longer prompt", "one more"]
    together = scoring.write(model, tokenizer, prompts, lambda text: False)
    assert together == [scoring.write(model, tokenizer, [prompt], lambda text: False)[0] for prompt in prompts]
    assert all(len(text) == scoring.NEW_TOKENS for text in together)
    cut = scoring.write(model, tokenizer, prompts, lambda text: len(text) >= 5)
    assert cut == [text[:5] for text in together]


def test_intervals_and_tests_against_known_values(script: Any) -> None:
    module = script("downstream_offline")
    # Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263 and 0 of 20, by Wilson's score.
    assert module.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert module.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert module.mcnemar([True] * 9 + [False], [False] * 9 + [True]) == pytest.approx(2 * 11 / 2**10)
    assert module.mcnemar([True, False], [True, False]) == 1.0
    values = [-1.0] * 20 + [0.0] * 70 + [1.0] * 10
    mean, low, high = module.paired([values])
    assert mean == pytest.approx(-0.1)
    spread = (sum((v - mean) ** 2 for v in values) / 100) ** 0.5 / 10
    assert (low, high) == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=0.015)
    assert module.paired([values]) == (mean, low, high)
    # The mean of two tasks: half of each, however many items they have.
    assert module.paired([[1.0] * 10, [0.0] * 30]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_table_compares_item_by_item(script: Any, tasks: Any) -> None:
    module, make = script("downstream_offline"), script("offline_tasks")
    # Of four candidates each; chance gives 5 of 20.
    three = [make.Task(name, tasks[0].items[:20]) for name in "abc"]
    dense = {"a": [True] * 18 + [False] * 2, "b": [True] * 10 + [False] * 10, "c": [True] * 7 + [False] * 13}
    worse = {"a": [True] * 4 + [False] * 16, "b": [False] * 10 + [True] * 10, "c": [False] * 20}
    result = module.summary(three, {"dense": dense, "worse": worse, "same": dense})
    cell = result["tasks"]["a"]["models"]["worse"]
    assert cell["accuracy"] == 0.2 and cell["difference"] == pytest.approx(-0.7)
    assert cell["right"] == "1" * 4 + "0" * 16
    assert result["mean"]["worse"]["difference"] == pytest.approx(-0.35)
    rows = {row[0]: row[1:] for row in script("tables").downstream_rows(json.loads(json.dumps(result)))}
    assert rows["a"][:3] == ["20", "25%", "90.0 (70–97)"]
    assert re.fullmatch(r"20\.0, -70\.0 \(-\d\d\.0 to -\d\d\.0\) \*", rows["a"][3])
    # Ten won and ten lost are no difference.
    assert rows["b"][3].startswith("50.0, +0.0 (") and not rows["b"][3].endswith("*")
    assert rows["a"][4] == "90.0, +0.0 (+0.0 to +0.0)"
    # Where the dense model may be guessing, nothing can be lost.
    assert rows["c, at chance"][2] == "35.0 (18–57)"
    assert rows["mean of 2 tasks"][2].startswith("70.0 (") and rows["mean of 2 tasks"][3].startswith("35.0, -35.0 (")
    guesses = module.summary(three, {"worse": worse | {"b": worse["c"]}})
    assert guesses["mean"] == {} and len(script("tables").downstream_rows(guesses)) == 3


def test_models_are_named(script: Any, tmp_path: Path) -> None:
    named = script("downstream_offline").named
    folder = tmp_path / "model"
    folder.mkdir()
    assert named([f"dense={folder}", str(folder)]) == {"dense": folder, "model": folder}
    for wrong, says in ((["a=" + str(folder)] * 2, "got a twice"), ([str(tmp_path / "none")], "got .*none")):
        with pytest.raises(SystemExit, match=says):
            named(wrong)


def test_the_script_writes_its_result(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module, make, harness = script("downstream_offline"), script("offline_tasks"), script("harness")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    # Most tasks are too long for a model of so few positions.
    monkeypatch.setattr(
        module,
        "make_tasks",
        lambda *_: [make.Task("a", make.sums(5, random.Random(0), sign="+", largest=9))],
    )
    folders = [save_checkpoint(tmp_path / name, tiny_model("llama", seed=seed)) for seed, name in enumerate("xy")]
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["downstream_offline.py", *map(str, folders), "--text", str(tmp_path / "text.txt"), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    printed = json.loads(capsys.readouterr().out)
    (path,) = (tmp_path / "results").glob("downstream_offline_*.json")
    assert json.loads(path.read_text())["tasks"] == printed["tasks"]
    assert (
        list(printed["tasks"]["a"]["models"]) == list(printed["seconds"]) == ["x", "y"]
        and printed["tasks"]["a"]["items"] == 5
    )
