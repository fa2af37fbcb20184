"""The GPU suite as far as it goes without a GPU: its driver, and a rehearsal of every part on a CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def test_every_call_keeps_to_its_time(script: Any) -> None:
    suite, parts, runs = (script(name) for name in ("gpu_suite", "gpu_parts", "gpu_end_to_end"))
    # What comes before and after the parts has to find time in nine minutes too.
    assert suite.BUDGET + 40 <= 9 * 60
    assert all(sum(limits.values()) <= suite.BUDGET for limits in suite.CALLS.values())
    assert set(suite.PARTS) == {"build", "correctness", *parts.FUNCTIONS, *runs.PARTS}
    assert set(suite.FROM_DISK) == set(runs.FROM_DISK)
    order = list(suite.PARTS)
    assert order[:2] == ["build", "correctness"]
    assert max(order.index("ridge"), order.index("cross_entropy")) < order.index("end_to_end")


def test_what_a_call_runs(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = script("gpu_suite")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert suite.chosen_parts(["gram", "ceilings"], 1, False) == ["build", "ceilings", "gram"]
    (tmp_path / "minisp").mkdir()
    (tmp_path / "minisp" / "_C.so").touch()
    assert suite.chosen_parts(["gram", "ceilings"], 1, False) == ["ceilings", "gram"]
    assert suite.chosen_parts(None, 2, False) == list(suite.CALLS[2])
    assert suite.chosen_parts(None, 1, True) == list(suite.PARTS)


def test_correctness_runs_every_file_that_has_gpu_tests_in_parts(script: Any, tmp_path: Path) -> None:
    commands = script("gpu_suite").commands_of("correctness", tmp_path, tmp_path)
    assert len(commands) > 1
    assert [own["MINISP_SHARD"] for _, own in commands] == [f"{i}/{len(commands)}" for i in range(len(commands))]
    for words, _ in commands:
        named = {Path(word) for word in words if word.endswith(".py")}
        for path in (ROOT / "tests").rglob("test_*.py"):
            marked = re.search(r"pytest\.mark\.(kernel|gpu)\b", path.read_text("utf-8")) is not None
            assert marked == (path in named), path


def test_shards_share_the_tests_out(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = script("shard")
    dropped: list[list[int]] = []
    hook = type("Hook", (), {"pytest_deselected": staticmethod(lambda items: dropped.append(items))})
    config, kept = type("Config", (), {"hook": hook}), []
    for number in range(3):
        monkeypatch.setenv("MINISP_SHARD", f"{number}/3")
        items = list(range(10))
        shard.pytest_collection_modifyitems(config, items)
        assert sorted([*items, *dropped[-1]]) == list(range(10))
        kept += items
    assert sorted(kept) == list(range(10))


@pytest.fixture
def suite_of(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """suite_of({part: [code of each of its processes]}): the suite with such parts, 60 seconds for each.

    A process gets the name of the file for its figures, and of the folder for what waits.
    """

    def make(codes: dict[str, list[str]]) -> Any:
        suite = script("gpu_suite")

        def commands_of(part: str, folder: Path, scratch: Path, *, rehearse: bool = False) -> list[Any]:
            files = [str(folder / f"{part}.json"), str(scratch)]
            return [([sys.executable, "-c", code, *files], {}) for code in codes[part]]

        monkeypatch.setattr(suite, "PARTS", dict.fromkeys(codes, 60))
        monkeypatch.setattr(suite, "CALLS", {1: suite.PARTS})
        monkeypatch.setattr(suite, "commands_of", commands_of)
        return suite

    return make


def test_the_suite_survives_parts_that_fail(suite_of: Any, tmp_path: Path) -> None:
    write = "import sys; open(sys.argv[1], 'w').write({!r})"
    suite = suite_of(
        {
            "fails": ["raise SystemExit('no luck')"],
            "hangs": [write.format('{"summary": []}') + "; import time; time.sleep(100)"],
            "torn": [write.format('{"summ')],
            "cut off": ["import os; os.write(1, 'é'.encode()[:1])"],
            "works": [write.format('{"summary": []}')],
            "late": [""],
        }
    )
    suite.PARTS |= {"hangs": 6, "late": 4}
    kept: list[list[str]] = []
    outcomes = suite.run_parts(list(suite.PARTS), tmp_path, lambda so_far: kept.append(list(so_far)))
    assert outcomes["fails"]["status"] == 1
    assert "no luck" in outcomes["fails"]["tail"]
    assert outcomes["hangs"]["status"] == "stopped after 6 s"
    assert outcomes["hangs"]["figures"] == {"summary": []}
    assert outcomes["torn"] | {"seconds": 0} == {"status": 0, "seconds": 0, "tail": ""}
    assert (outcomes["cut off"]["status"], outcomes["cut off"]["tail"]) == (0, "\ufffd")
    assert outcomes["works"] | {"seconds": 0} == {"status": 0, "seconds": 0, "tail": "", "figures": {"summary": []}}
    assert outcomes["late"]["status"] == "no time left"
    names = list(suite.PARTS)
    assert kept == [names[: count + 1] for count in range(len(names))]


def test_a_part_of_several_processes_fails_with_any_of_them(suite_of: Any, tmp_path: Path) -> None:
    # Each waits for the other: they have to run side by side.
    code = (
        "import os, sys, time\nopen(sys.argv[2] + {!r}, 'w').close()\n"
        "while not os.path.exists(sys.argv[2] + {!r}): time.sleep(0.01)\nraise SystemExit({!r})"
    )
    suite = suite_of({"both": [code.format("/a", "/b", "first"), code.format("/b", "/a", "")]})
    outcome = suite.run_parts(["both"], tmp_path, lambda so_far: None)["both"]
    assert outcome["status"] == 1
    assert "first" in outcome["tail"]


def test_what_a_part_that_hangs_has_started_and_written_goes(suite_of: Any, tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys\n"
        "pathlib.Path(sys.argv[2], 'states').write_bytes(b'0')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "print(child.pid, sys.argv[2], flush=True)\n"
        "child.wait()"
    )
    suite = suite_of({"hangs": [code]})
    suite.PARTS["hangs"] = 6
    outcome = suite.run_parts(["hangs"], tmp_path, lambda so_far: None)["hangs"]
    assert outcome["status"] == "stopped after 6 s"
    number, scratch = outcome["tail"].split()
    assert not Path(scratch).exists()
    assert not (tmp_path / "hangs").exists()
    # Who adopts a process may take a moment to bury it.
    state = Path("/proc", number, "stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_suite_that_is_ended_keeps_what_it_has(
    suite_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(100)"
    suite = suite_of({"first": ["print('one')"], "second": [ends]})
    described = {"gpu": "Imaginary 100", "torch": "0"}
    monkeypatch.setattr(suite, "machine", lambda: described)
    monkeypatch.setattr(suite, "chosen_parts", lambda *_: list(suite.PARTS))
    # That of the tests may be older than a suite may become.
    monkeypatch.setattr(suite, "age", lambda: 1.0)
    monkeypatch.setattr(suite.harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--label", "test"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="stopped"):
            suite.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == "gpu_imaginary-100_test.json"
    found = json.loads(path.read_text())
    assert found["machine"] == described
    assert found["parts"]["first"]["tail"] == "one\n"
    assert list(found["parts"]) == ["first"]


def test_the_suite_writes_a_checkpoint_only_for_capped_runs(
    suite_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []
    code = "import os, sys; raise SystemExit(not os.path.exists(os.path.dirname(sys.argv[1]) + '/checkpoint'))"
    suite = suite_of({"ceilings": [code], "capped_8": [code]})

    def start(folder: Path, log: Path, rehearse: bool = False) -> Any:
        started.append(folder)
        return suite.start(([sys.executable, "-c", "raise SystemExit('no room on this disk')"], {}), log, os.environ)

    monkeypatch.setattr(suite, "start_checkpoint", start)
    suite.run_parts(["ceilings"], tmp_path, lambda so_far: None)
    assert not started
    outcome = suite.run_parts(["capped_8"], tmp_path, lambda so_far: None)["capped_8"]
    assert started == [tmp_path]
    assert outcome["status"] == 1
    assert "no room on this disk" in outcome["tail"]


def test_a_checkpoint_that_takes_too_long_is_not_waited_for(
    suite_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_of({"capped_8": ["print('ran')"]})
    sleep = ([sys.executable, "-c", "import time; time.sleep(100)"], {})
    monkeypatch.setattr(suite, "start_checkpoint", lambda folder, log, rehearse: suite.start(sleep, log, os.environ))
    begin = time.perf_counter()
    seconds = suite.PARTS["capped_8"] + 0.5
    assert suite.run_parts(["capped_8"], tmp_path, lambda so_far: None, seconds)["capped_8"]["tail"] == "ran\n"
    assert time.perf_counter() - begin < 50


def test_a_checkpoint_without_room_is_refused_first(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = script("gpu_suite")
    monkeypatch.setattr(suite, "CHECKPOINT_BYTES", 1e18)
    child = suite.start_checkpoint(tmp_path, tmp_path / "log")
    assert child.wait(60) == 1
    assert re.search(r"no room for the checkpoint.*: needs \d+ GB in .*, has \d+ GB", (tmp_path / "log").read_text())
    assert not (tmp_path / "checkpoint").exists()


def test_calls_add_to_one_result_file(script: Any, tmp_path: Path) -> None:
    suite, path = script("gpu_suite"), tmp_path / "gpu_imaginary.json"
    first = {"gpu": "Imaginary 100", "torch": "0", "driver": "1"}
    gram, ridge = {"status": 0, "seconds": 1.0, "tail": ""}, {"status": 1, "seconds": 2.0, "tail": "no luck"}
    suite.merge(path, first, {"gram": gram})
    stamp = json.loads(path.read_text())["parts"]["gram"]["date"]
    suite.merge(path, first, {"gram": gram, "ridge": ridge})
    second = first | {"driver": "2"}
    suite.merge(path, second, {"ridge": ridge | {"status": 0}})
    found = json.loads(path.read_text())
    assert found["machine"] == second
    assert list(found["parts"]) == ["gram", "ridge"]
    assert found["parts"]["gram"] == gram | {"torch": "0", "driver": "1", "date": stamp}
    assert (found["parts"]["ridge"]["status"], found["parts"]["ridge"]["driver"]) == (0, "2")


@pytest.mark.slow
def test_the_driver_can_be_rehearsed() -> None:
    """With one part of every kind, each in its own processes; nothing is kept."""
    before = sorted(path.name for path in (BENCHMARKS / "results").iterdir())
    only = ["--only", "build", "correctness", "cross_entropy", "capped_8"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--rehearse", *only],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCHMARKS)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was measured" in done.stdout
    assert "FAILED" not in done.stdout
    assert sorted(path.name for path in (BENCHMARKS / "results").iterdir()) == before
