"""Several processes: one result, and what happens where one is lost or has nothing to do."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from minisp import fast
from minisp.cli.app import app
from minisp.config import MinifyConfig
from minisp.errors import CalibrationError
from minisp.models.stream import Stream
from minisp.phases.calibrate import calibrate
from minisp.phases.run import Run
from minisp.ranks import Ranks
from tests.runs.test_resume import run
from tests.tiny import save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_model("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_windows_and_give_one_result(size: int, source: Path, text: Path, tmp_path: Path) -> None:
    options = ["--num-windows", "10", "--window", "32", "--dtype", "float32", "--keep", "0.6", "-c", str(text), "-q"]
    command = ["-m", "minisp", "minify", str(source), *options, "--segment", "2"]
    alone = CliRunner().invoke(app, [*command[2:], "--out", str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fast.__file__).parents[1])}
    done = subprocess.run(
        [*launcher, *command, "--out", str(tmp_path / "together")], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    one, many = (json.loads((tmp_path / name / "minisp.json").read_text()) for name in ("alone", "together"))
    assert [layer["kept"] for layer in one["layers"]] == [layer["kept"] for layer in many["layers"]]
    for a, b in zip(one["layers"], many["layers"], strict=True):
        assert a["residual"] == pytest.approx(b["residual"], rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", text.name, "together"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "pattern"), [("surgeon", "unstructured"), ("surgeon", "rows-columns"), ("wanda", "2:4")]
)
def test_processes_share_the_maps_too(method: str, pattern: str, source: Path, text: Path, tmp_path: Path) -> None:
    shots = ["--shots", "2"] if method == "surgeon" else []
    options = ["--num-windows", "10", "--window", "32", "--dtype", "float32", "--keep", "0.5", "-c", str(text), "-q"]
    command = ["-m", "minisp", "minify", str(source), *options, "--method", method, "--pattern", pattern, *shots]
    alone = CliRunner().invoke(app, [*command[2:], "--out", str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fast.__file__).parents[1])}
    done = subprocess.run(
        [*launcher, *command, "--out", str(tmp_path / "together")], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    same = sum(int(((one[name] == 0) == (many[name] == 0)).sum()) for name in one)
    # Sums in another order: costs that are nearly equal may change places.
    assert same > 0.99 * sum(tensor.numel() for tensor in one.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", text.name, "together"]


LOST = """
import os, signal, sys, torch
from minisp import fast
from tests.runs.test_resume import OPTIONS, WINDOWS

def progress(phase, done, total):
    if os.environ["RANK"] == "1" and phase == "saliency, layers 1-1" and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)

resume = "--resume" in sys.argv
fast.minify(sys.argv[1], out=sys.argv[2], calibration=WINDOWS, progress=progress, resume=resume, **OPTIONS)
"""


@pytest.mark.slow
def test_a_lost_process_ends_the_run_which_resumes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "alone")
    (tmp_path / "lost.py").write_text(LOST)
    root = Path(fast.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launcher, str(tmp_path / "lost.py"), str(source), str(tmp_path / "out")]
    lost = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert lost.returncode != 0 and "Signal 9 (SIGKILL)" in lost.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.scratch").is_dir()
    done = subprocess.run([*command, "--resume"], cwd=root, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    kept = [
        [layer["kept"] for layer in json.loads((tmp_path / name / "minisp.json").read_text())["layers"]]
        for name in ("alone", "out")
    ]
    assert kept[0] == kept[1]


def test_helper_threads_start_no_openmp_team_and_leave_the_number_of_threads() -> None:
    # In a process of its own: teams that other tests have started would hide one.
    script = (
        "import os, torch; torch.set_num_threads(2); from minisp.store.files import helper_thread\n"
        "large = torch.ones(10**7); large.sum(); pool = helper_thread('helper')\n"
        "before = len(os.listdir('/proc/self/task')); pool.submit(large.sum).result()\n"
        "print(len(os.listdir('/proc/self/task')) - before, torch.get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "2"]


@dataclass(frozen=True)
class Alone(Ranks):
    """The first of several processes, without the others."""

    def wait(self) -> None:
        pass


def test_a_text_with_fewer_windows_than_processes_is_refused() -> None:
    run = Run.in_memory()
    run = Run(run.shared, run.own, Alone(0, 4), run.progress)
    model = tiny_model("llama")
    config = MinifyConfig(num_windows=8, window=32, generic=0.0)
    with (
        pytest.warns(UserWarning, match="holds 3 windows"),
        pytest.raises(CalibrationError, match="a window for each of 4 processes, got 3"),
    ):
        calibrate(Stream.from_module(model), torch.arange(96) % 60, None, config, run, write_room=None)
