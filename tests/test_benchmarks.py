"""The GPU suite and the figures, as far as they go without a GPU: no invented result is ever committed."""

import importlib
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minisp import reference
from tests.models import VOCABULARY, save_checkpoint, tiny_model

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """script(name): a module of benchmarks/, imported as its own scripts import it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_the_suite_keeps_to_its_time(script: Any) -> None:
    suite, parts, runs = (script(name) for name in ("gpu_suite", "gpu_parts", "gpu_end_to_end"))
    # What comes before and after the parts has to find time in nine minutes too.
    assert suite.BUDGET + 40 <= 9 * 60
    assert set(suite.PARTS) == {"build", "correctness", *parts.FUNCTIONS, *runs.PARTS}
    assert list(suite.PARTS)[:2] == ["build", "correctness"]


def test_correctness_runs_every_file_that_has_gpu_tests(script: Any, tmp_path: Path) -> None:
    commands = script("gpu_suite").commands_of("correctness", tmp_path, tmp_path)
    assert len(commands) > 1
    named = {Path(command[-1]) for command in commands}
    for path in (ROOT / "tests").rglob("test_*.py"):
        marked = re.search(r"pytest\.mark\.(kernel|gpu)\b", path.read_text("utf-8")) is not None
        assert marked == (path in named), path


@pytest.fixture
def suite_of(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """suite_of({part: [code of each of its processes]}): the suite with such parts, 60 seconds for each.

    A process gets the name of the file for its figures, and of the folder for what waits.
    """

    def make(codes: dict[str, list[str]]) -> Any:
        suite = script("gpu_suite")

        def commands_of(part: str, folder: Path, scratch: Path) -> list[list[str]]:
            files = [str(folder / f"{part}.json"), str(scratch)]
            return [[sys.executable, "-c", code, *files] for code in codes[part]]

        monkeypatch.setattr(suite, "PARTS", dict.fromkeys(codes, 60))
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

    def start(out: Path, log: Path) -> Any:
        started.append(out)
        return suite.start([sys.executable, "-c", "raise SystemExit('no room on this disk')"], log)

    monkeypatch.setattr(suite, "start_checkpoint", start)
    suite.run_parts(["ceilings"], tmp_path, lambda so_far: None)
    assert not started
    outcome = suite.run_parts(["capped_8"], tmp_path, lambda so_far: None)["capped_8"]
    assert started == [tmp_path / "checkpoint"]
    assert outcome["status"] == 1
    assert "no room on this disk" in outcome["tail"]


def test_a_checkpoint_that_takes_too_long_is_not_waited_for(
    suite_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_of({"capped_8": ["print('ran')"]})
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(suite, "start_checkpoint", lambda out, log: suite.start(sleep, log))
    begin = time.perf_counter()
    seconds = suite.PARTS["capped_8"] + 0.5
    assert suite.run_parts(["capped_8"], tmp_path, lambda so_far: None, seconds)["capped_8"]["tail"] == "ran\n"
    assert time.perf_counter() - begin < 50


def test_the_opponents_of_the_saliency_pass_compute_the_same(script: Any) -> None:
    parts = script("gpu_parts")
    gate, up, grad = torch.randn(50, 7), torch.randn(50, 7), torch.randn(50, 7)
    x, grad_gate, grad_up, sums = reference.activation_backward(gate, up, grad, "silu")
    for ours, true in zip(parts._eager_saliency(gate, up, grad), (x, grad_gate, grad_up, sums), strict=True):
        torch.testing.assert_close(ours, true)
    for ours, true in zip(parts._autograd_saliency(gate, up, grad), (grad_gate, grad_up, sums), strict=True):
        torch.testing.assert_close(ours, true)


def test_a_race_goes_on_without_the_one_that_falls(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = script("gpu_parts")
    monkeypatch.setattr(parts, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(parts, "FLUSH_BYTES", 16)
    times = iter([2.0, 5.0, 1.0, 3.0])
    monkeypatch.setattr(parts, "_timed", lambda call: call() or next(times))

    def fall() -> None:
        raise torch.OutOfMemoryError("no room")

    figures = parts.race({"falls": fall, "runs": lambda: None})
    assert figures["falls"] is None
    assert figures["falls: error"] == "no room"
    # The first timing only says how often to repeat.
    assert figures["runs"] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("part", ["gram", "saliency", "cross_entropy"])
def test_a_part_goes_on_where_nothing_can_be_timed(part: str, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = script("gpu_parts")
    monkeypatch.setattr(parts, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(parts, "race", lambda contenders, **_: dict.fromkeys(contenders))
    for name in ("randn", "zeros"):
        monkeypatch.setattr(torch, name, lambda *size, **how: torch.ones(1, 1))
    counts = [len(figures["rows"]) for figures in parts.FUNCTIONS[part]()]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("part", ["end_to_end", "naive", "capped_8"])
def test_a_whole_run_on_a_small_model(part: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model = script("gpu_end_to_end"), tiny_model("llama")
    device = SimpleNamespace(total_memory=8 * 10**9)
    for name in ("init", "synchronize", "reset_peak_memory_stats", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(runs, "in_memory", lambda cut: {"seconds": sum(cut(model).values())})
    monkeypatch.setattr(runs, "VOCABULARY", VOCABULARY)
    monkeypatch.setattr(runs, "WINDOWS", (4, 32))
    checkpoint = save_checkpoint(tmp_path / "checkpoint", model)
    found = list(runs.run(part, checkpoint, tmp_path / "out", tmp_path / "waiting"))
    assert len(found) == len(found[-1]["summary"]) == (2 if part == "end_to_end" else 1)
    assert all(figures["seconds"] > 0 for figures in found)
    assert (tmp_path / "out" / "config.json").exists() == (part == "capped_8")


def gpu_result() -> dict[str, Any]:
    """The shape of what gpu_suite.py writes; the numbers mean nothing."""
    times = {"minisp": [1e-3, 2e-3, 3e-3], "bf16 matmul": [3e-3, 4e-3, 5e-3], "addmm to float32": None}
    parts: dict[str, Any] = {
        "ceilings": {"figures": {"bf16_flops": 7e14, "copy_bytes_per_s": 3e12}},
        "gram": {"figures": {"rows": [{"m": m, "T": t, **times} for m in (1536, 8192) for t in (4096, 8192)]}},
        "saliency": {"figures": {"rows": [{"m": 4096, "T": 8192, **times, "torch.compile": None}]}},
        "end_to_end": {"figures": {"seconds": 20.0}},
        "capped_8": {"figures": {"seconds": 50.0, "gigabytes": 8}},
        "naive": {"figures": {"seconds": None, "error": "out of memory"}},
        "ridge": {"status": "stopped after 60 s"},
    }
    return {"machine": {"gpu": "Imaginary 100", "torch": "0"}, "parts": parts}


@pytest.mark.parametrize("missing", [(), ("gram", "ceilings"), ("saliency",), ("end_to_end", "capped_8")])
def test_figures_of_a_gpu_result(script: Any, tmp_path: Path, missing: tuple[str, ...]) -> None:
    result = gpu_result()
    for part in missing:
        result["parts"][part] = {"status": 1}
    (tmp_path / "gpu_imaginary-100.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text("{}")
    (path,) = script("plot").plot_folder(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = script("plot").plot_gpu(result)
    titles = " ".join(axes.get_title() for axes in figure.axes)
    assert ("Gram" in titles, "Saliency" in titles, "7B" in titles) == (
        "gram" not in missing,
        "saliency" not in missing,
        "end_to_end" not in missing,
    )


def test_what_ran_out_of_memory_has_no_bar(script: Any) -> None:
    figure = script("plot").plot_gpu(gpu_result())
    axes = figure.axes[-1]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["minisp", "minisp, 8 GB", "naive: out of memory"]
    assert [patch.get_width() for patch in axes.patches] == [20.0, 50.0, 0.0]
    assert all(text.get_text() != "0" for text in axes.texts)


def test_nothing_measured_gives_no_figure(script: Any, tmp_path: Path) -> None:
    result = gpu_result()
    result["parts"] = {"build": {"status": 1}}
    (tmp_path / "gpu_imaginary-100.json").write_text(json.dumps(result))
    assert script("plot").plot_folder(tmp_path) == []


def test_every_committed_result_can_be_drawn_and_has_its_figure(script: Any, tmp_path: Path) -> None:
    plot = script("plot")
    kinds = tuple(f"{kind}_" for kind in plot.KINDS)
    sources = [path for path in RESULTS.glob("*.json") if path.name.startswith(kinds)]
    assert sources
    for path in sources:
        shutil.copy(path, tmp_path)
    drawn = {path.name for path in plot.plot_folder(tmp_path)}
    assert drawn == {path.name for path in RESULTS.glob("*.png")} == {path.with_suffix(".png").name for path in sources}


def test_the_quality_figure_has_a_panel_for_each_domain_and_a_line_for_each_method(script: Any) -> None:
    def cell(place: int, keep: float, text: float) -> dict[str, Any]:
        return {"place": place, "keep": keep, "perplexity": {"text": text, "code": 2 * text}}

    rows = {"80% FLAP": cell(2, 0.8, 15.0), "80% minisp: + refit": cell(7, 0.8, 12.0)}
    rows["90% minisp: + refit"] = cell(7, 0.9, 11.0)
    data = {"machine": {"cpu": "a", "cores": 2, "torch": "x", "gpu": None}, "dense": {"text": 10.0, "code": 10.0}}
    panels = script("plot").plot_quality({**data, "rows": rows}).axes
    assert [axes.get_title() for axes in panels] == ["text", "code"]
    lines = {line.get_label(): line.get_xydata().round(6).tolist() for line in panels[1].get_lines()}
    assert lines == {"FLAP": [[80, 3.0]], "minisp: + refit": [[80, 2.4], [90, 2.2]]}
