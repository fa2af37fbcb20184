"""vLLM's server ends with whoever started it, however that ends; a stand-in that answers plays the server."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# Answers at the port that it is given, and has a process of its own, as vLLM does.
STAND_IN = """#!/bin/sh
{python} -c 'import time; time.sleep(600)' &
echo $! > {folder}/child
mkdir {folder}/www && touch {folder}/www/health
port=$(echo "$@" | sed 's/.*--port \\([0-9]*\\).*/\\1/')
exec {python} -m http.server --directory {folder}/www --bind 127.0.0.1 $port
"""
OWNER = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
import vllm_server
vllm_server.interpreter = lambda server: Path({folder!r}) / "python"
with vllm_server.served(Path("model")) as address:
    print(address, flush=True)
    {then}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM on a CPU runs on Linux")
@pytest.mark.parametrize(("then", "number"), [("pass", 0), ("1 / 0", 0), ("time.sleep(600)", signal.SIGKILL)])
def test_the_server_and_its_processes_end(then: str, number: int, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(STAND_IN.format(python=sys.executable, folder=tmp_path))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    benchmarks = str(Path(__file__).parents[2] / "benchmarks")
    code = OWNER.format(benchmarks=benchmarks, folder=str(tmp_path), then=then)
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert owner.stdout is not None and owner.stdout.readline().startswith("http://127.0.0.1:")
    child = int((tmp_path / "child").read_text())
    if number:
        assert psutil.pid_exists(child)
        os.kill(owner.pid, number)
    owner.communicate(timeout=60)
    end = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "a process of the server is left"
        time.sleep(0.1)
