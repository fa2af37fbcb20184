"""The parts of the GPU suite as far as they go without a GPU, and a rehearsal of all of them on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minisp.ops import reference

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def test_the_opponents_of_the_saliency_pass_compute_the_same(script: Any) -> None:
    passes = script("operations")
    gate, up, grad = torch.randn(50, 7), torch.randn(50, 7), torch.randn(50, 7)
    x, grad_gate, grad_up, sums = reference.activation_backward(gate, up, grad, "silu")
    for ours, true in zip(passes.eager_saliency(gate, up, grad), (x, grad_gate, grad_up, sums), strict=True):
        torch.testing.assert_close(ours, true)
    for ours, true in zip(passes.autograd_saliency(gate, up, grad), (x, grad_gate, grad_up, sums), strict=True):
        torch.testing.assert_close(ours, true)


def test_a_race_goes_on_without_the_one_that_falls(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("gpu_bench")
    times = iter([2.0, 5.0, 1.0, 3.0])
    monkeypatch.setattr(bench.Bench, "timed", lambda self, call: call() or next(times))

    def fall() -> None:
        raise torch.OutOfMemoryError("no room")

    figures = bench.Bench(rehearsal=True).race({"falls": fall, "runs": lambda: None})
    assert figures["falls"] is None
    assert figures["falls: error"] == "OutOfMemoryError: no room"
    # The first timing only says how often to repeat.
    assert figures["runs"] == [1.0, 3.0, 5.0]


def test_a_kernel_is_counted_once_and_by_its_kind(script: Any) -> None:
    layers, bench = script("gpu_parts"), script("gpu_bench").Bench()

    def event(key: str, device: str, *, is_user_annotation: bool = False) -> SimpleNamespace:
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(
            key=key, device_type=kind, is_user_annotation=is_user_annotation, self_device_time_total=2000.0, count=3
        )

    names = {
        "rotate_kernel": "minisp",
        "rms_norm_backward_kernel": "minisp",
        "cross_entropy_gradient_kernel": "minisp",
        "void minisp::(anonymous namespace)::invert_block_kernel<float>(minisp::View<float>)": "minisp",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>()": "others",
        "nvjet_tst_256x128_64x4_NNT": "products",
        "void pytorch_flash::flash_fwd_kernel<>()": "attention",
        "Memcpy DtoD (Device -> Device)": "copies",
    }
    events = [event(name, "CUDA") for name in names]
    # What launched them, and a range that a user marked.
    events += [event("aten::mm", "CPU"), event("ProfilerStep#1", "CUDA", is_user_annotation=True)]
    rows = layers.kernels_of(SimpleNamespace(key_averages=lambda: events), bench)
    assert {row["name"]: row["kind"] for row in rows} == {name[:80]: kind for name, kind in names.items()}
    assert all(row["milliseconds"] == 2.0 for row in rows)


PARTS_IN_MEMORY = ("gram", "product", "saliency", "cross_entropy", "norms", "attention", "ridge")


@pytest.mark.parametrize("part", PARTS_IN_MEMORY)
def test_a_part_goes_on_where_nothing_can_be_timed(part: str, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("gpu_bench").Bench(rehearsal=True)
    monkeypatch.setattr(type(bench), "race", lambda self, contenders, **_: dict.fromkeys(contenders))
    found = list(script("gpu_parts").FUNCTIONS[part](bench))
    assert found and all("summary" in figures for figures in found)


def test_a_wrong_operation_ends_its_part_and_one_that_is_missing_does_not(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, operations = script("gpu_bench").Bench(rehearsal=True), script("operations")
    shape = {"V": 50, "T": 8}
    row = bench.measure(operations.cross_entropy, shape, torch.float32)
    assert 0 <= row["errors"]["minisp torch"] <= 1 and row["minisp torch"]

    def missing(*arguments: Any, impl: str) -> Any:
        raise AttributeError("no such symbol")

    monkeypatch.setattr(operations.ops, "cross_entropy_gradient", missing)
    row = bench.measure(operations.cross_entropy, shape, torch.float32)
    assert row["errors"]["minisp torch"] == row["minisp torch: error"] == "AttributeError: no such symbol"
    assert row["autograd"]
    text = script("gpu_bench").told(row)
    assert text.startswith("minisp was not timed") and "minisp torch: error AttributeError: no such symbol" in text
    for wrong in (1.001, float("nan")):
        monkeypatch.setattr(
            operations.ops, "cross_entropy_gradient", lambda logits, targets, impl, by=wrong: (1.0, logits * by)
        )
        with pytest.raises(AssertionError, match="times what is allowed"):
            bench.measure(operations.cross_entropy, shape, torch.float32)


def test_a_solver_that_is_missing_leaves_the_others_their_rows(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, ridge = script("gpu_operations"), script("ridge")

    def missing(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such symbol")

    monkeypatch.setitem(ridge.CONTENDERS, parts.SOLVERS["minisp"], missing)
    (found, *_) = parts.systems(script("gpu_bench").Bench(rehearsal=True))
    row, text = found["rows"][0], found["summary"][0]["text"]
    assert row["minisp: error"] == "AttributeError: no such symbol" and row["minisp"] is None
    assert len(row["torch cholesky"]) == len(row[parts.ENGINE]) == 3
    assert set(row["accuracy"]) == {"torch cholesky", parts.ENGINE}
    assert "of torch cholesky" in text and "no such symbol" in text


def test_a_solver_that_is_wrong_ends_its_part(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, ridge = script("gpu_operations"), script("ridge")
    right = ridge.CONTENDERS["torch cholesky"]
    monkeypatch.setitem(ridge.CONTENDERS, "torch cholesky", lambda gram, rows: right(gram, rows) * 1.01)
    with pytest.raises(AssertionError, match="backward_error"):
        list(parts.systems(script("gpu_bench").Bench(rehearsal=True)))


def test_the_residual_by_columns_is_that_of_the_whole(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ridge = script("ridge")
    gram, right = ridge.make_system(90, 12, torch.float32, torch.device("cpu"))
    x = ridge.torch_solve(gram, right)
    a, r, x64 = gram.double(), right.double(), x.double()
    expected = float((r - x64 @ a).norm() / (a.norm() * x64.norm() + r.norm()))
    monkeypatch.setattr(ridge, "COLUMNS", 32)
    found = ridge.accuracy(gram, right, x)
    assert found["backward_error"] == pytest.approx(expected, rel=1e-6)
    assert found["excess_loss"] < 1e-6
    monkeypatch.setattr(ridge, "LARGEST_EXACT", 89)
    assert set(ridge.accuracy(gram, right, x)) == {"backward_error"}


def test_runs_from_disk_take_the_windows_that_there_is_room_for(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = script("gpu_end_to_end")
    planned = type("Plan", (), {"scratch_bytes": 0, "bytes_after": 10})

    def plan(checkpoint: Path, *, num_windows: int, window: int, **options: Any) -> Any:
        planned.scratch_bytes = 10 * num_windows
        return planned

    monkeypatch.setattr(runs, "plan", plan)
    windows, options = torch.zeros(8, 4, dtype=torch.int64), {"scratch": str(tmp_path)}
    for free, expected in ((100, 8), (60, 4)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert len(runs.windows_with_room(tmp_path, windows, tmp_path, options)) == expected
    usage.free = 20
    with pytest.raises(runs.OutputError, match=r"no room: needs .* has .*on one disk"):
        runs.windows_with_room(tmp_path, windows, tmp_path, options)


def rehearse(words: list[str], **options: Any) -> str:
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", **options}
    done = subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_part_can_be_rehearsed(script: Any, tmp_path: Path) -> None:
    """Every line of every part, in one process: kernels in the interpreter, small shapes, a CPU."""
    suite = script("gpu_suite")
    parts = [part for part in suite.PARTS if part not in ("build", "correctness")]
    script("synthetic").write_synthetic(tmp_path / "checkpoint", "tiny")
    folders = {name: tmp_path / name for name in ("result", "out", "scratch")}
    for folder in folders.values():
        folder.mkdir()
    places = [word for name, path in folders.items() for word in (f"--{name}", str(path))]
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint")]
    rehearse([str(BENCHMARKS / "gpu_parts.py"), *parts, *places, *checkpoint, "--rehearse"])
    found = {part: json.loads((folders["result"] / f"{part}.json").read_text()) for part in parts}
    assert all(figures["summary"] for figures in found.values())
    # What a CPU lacks, and nothing else, has failed.
    assert errors_of(found) <= {"addmm to float32: error"}
    rows = [row for part in found.values() for row in part.get("rows", []) if "errors" in row]
    assert len(rows) > 12
    # Every kernel went through the interpreter, was right, and was timed; attention has none.
    for row in rows:
        ours = "minisp torch" if row["operation"] == "attention" else "minisp triton"
        assert row["errors"][ours] <= 1 and row[ours], row
    assert all(found[part]["seconds"] > 0 for part in script("gpu_end_to_end").PARTS)
    assert (folders["out"] / "capped_8" / "config.json").exists()


def errors_of(found: Any) -> set[str]:
    if isinstance(found, list):
        return set().union(*map(errors_of, found))
    if not isinstance(found, dict):
        return set()
    own = {key for key in found if key.split(": ")[-1] == "error"}
    return own.union(*map(errors_of, found.values()))
