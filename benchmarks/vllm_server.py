"""vLLM's server in an environment of its own: started on a checkpoint folder, asked over HTTP, and always ended.

See server_environments.py for the environment. The server computes in float32 on a CPU.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from asking import ask, events
from server_environments import interpreter

# Seconds until a server answers: it imports a lot, which takes minutes where other programs want the processor.
START_SECONDS = 1200
NAME = "model"
# One GiB for keys and values; threads are those of OMP_NUM_THREADS, bound to no core.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--trust-remote-code", "--max-num-seqs", "4", "--host", "127.0.0.1")


@contextmanager
def served(folder: Path, *, context: int = 256, threads: int = 1) -> Iterator[str]:
    """The address of vLLM's server for a checkpoint folder; the server and its processes end with the block.

    Args:
        context: tokens of a prompt with its answer.

    Raises:
        SystemExit: the environment is not built, or the server ended or said nothing for `START_SECONDS`; with the end
            of what it printed.
    """
    python = interpreter("vllm")
    if python is None:
        raise SystemExit("vLLM: no environment. Run python benchmarks/server_environments.py vllm.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; that command looks up the version of a package vllm, and vllm-cpu is none.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *OPTIONS, "--port", port]
    command += ["--served-model-name", NAME, "--max-model-len", context]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    with TemporaryFile() as log:
        process = subprocess.Popen(
            [*map(str, command)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        # Ends the server where this process is killed: its input ends with this process.
        guard = subprocess.Popen(
            ["sh", "-c", f"read _; kill -KILL -{process.pid}"], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            if not _answers(address, process):
                raise SystemExit(f"vLLM did not serve {folder}:\n{_end_of(log)}")
            try:
                yield address
            except OSError as error:
                raise SystemExit(f"vLLM did not answer ({error}):\n{_end_of(log)}") from error
        finally:
            guard.kill()
            _end(process)
            guard.communicate()


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-6000:]


def _answers(address: str, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until the server answers; False where it ended, or time ran out."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return True
        except OSError:
            time.sleep(0.5)
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the server, then what is left of its process group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ask_vllm(
    address: str, prompts: list[list[int]], num_tokens: int, banned: list[int] | None = None
) -> dict[str, Any]:
    """What the OpenAI-compatible endpoint answers: every prompt alone, all at once, and the first as a stream.

    Args:
        prompts: tokens.
        banned: tokens that are never chosen.

    Returns:
        {"prompts": [{"tokens": […], "chosen": [log-probability of each], "text": …}, …], "concurrent": the same, asked
        for at once, "streamed": text that came in pieces, "pieces": how many}.
    """
    wanted = {"model": NAME, "temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
    if banned:
        wanted["logit_bias"] = dict.fromkeys(map(str, banned), -100)

    def complete(prompt: list[int]) -> dict[str, Any]:
        values = {**wanted, "prompt": prompt, "logprobs": 1, "return_token_ids": True}
        [found] = ask(address, "/v1/completions", values)["choices"]
        chosen = found["logprobs"]["token_logprobs"]
        return {"tokens": found["token_ids"], "chosen": chosen, "text": found["text"]}

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(complete, prompts))
    stream = ask(address, "/v1/completions", {**wanted, "prompt": prompts[0], "stream": True})
    said = [choice["text"] for event in events(stream) for choice in event["choices"]]
    return {
        "prompts": alone,
        "concurrent": together,
        "streamed": "".join(said),
        "pieces": sum(1 for text in said if text),
    }
