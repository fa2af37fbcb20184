"""The GPU suite and the figures, as far as they go without a GPU: no invented result is ever committed."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minisp import reference

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
    assert suite.BUDGET < 9 * 60
    assert set(suite.PARTS) == {"build", "correctness", *parts.FUNCTIONS, *runs.PARTS}
    assert list(suite.PARTS)[:2] == ["build", "correctness"]


def test_the_suite_survives_parts_that_fail(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = script("gpu_suite")
    codes = {
        "fails": "raise SystemExit('no luck')",
        "hangs": "import time; time.sleep(100)",
        "works": "import sys; open(sys.argv[1], 'w').write('{\"summary\": []}')",
        "late": "",
    }
    monkeypatch.setattr(suite, "PARTS", {"fails": 60, "hangs": 6, "works": 60, "late": 4})
    monkeypatch.setattr(suite, "command_of", lambda part, result, _: [sys.executable, "-c", codes[part], str(result)])
    outcomes = suite.run_parts(list(codes), tmp_path)
    assert outcomes["fails"]["status"] == 1
    assert "no luck" in outcomes["fails"]["tail"]
    assert outcomes["hangs"]["status"] == "stopped after 6 s"
    assert outcomes["works"] | {"seconds": 0} == {"status": 0, "seconds": 0, "tail": "", "figures": {"summary": []}}
    assert outcomes["late"]["status"] == "no time left"


def test_the_suite_writes_a_checkpoint_only_for_capped_runs(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = script("gpu_suite")
    started: list[Path] = []

    def start(out: Path, log: Path) -> Any:
        started.append(out)
        log.write_text("no room on this disk")
        return suite.subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    def command(part: str, result: Path, checkpoint: Path) -> list[str]:
        return [sys.executable, "-c", f"import os; raise SystemExit(not os.path.exists({str(checkpoint)!r}))"]

    monkeypatch.setattr(suite, "start_checkpoint", start)
    monkeypatch.setattr(suite, "command_of", command)
    suite.run_parts(["ceilings"], tmp_path)
    assert not started
    outcome = suite.run_parts(["capped_8"], tmp_path)["capped_8"]
    assert len(started) == 1
    assert outcome["status"] == 1
    assert "no room on this disk" in outcome["tail"]


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


def test_every_committed_result_has_its_figure(script: Any) -> None:
    kinds = tuple(f"{kind}_" for kind in script("plot").KINDS)
    sources = [path for path in RESULTS.glob("*.json") if path.name.startswith(kinds)]
    assert sources
    assert all(path.with_suffix(".png").exists() for path in sources)
