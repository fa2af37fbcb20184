"""How much faster a pruned model is: prefill and decode in transformers, llama.cpp and vLLM, against the floor.

Usage: python serving_speed.py DENSE PRUNED [--readers transformers llama.cpp vLLM]

All compute in float32 with one thread, both models in turns. A rate is tokens per second of processor time of the
reader's processes, so that other programs on the machine do not count, though they do share its caches and memory. The
floor of decode is the ratio of the bytes of weights that a token reads, that of prefill the ratio of the floating-point
operations of linear layers and attention per token of the prompt; the head computes for one token alone.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import harness
import psutil
import torch
from asking import ask
from server_environments import interpreter
from vllm_server import NAME, served

from minisp.export.targets import export

PROMPT, ANSWER, TURNS = 256, 32, 5
Rates = list[dict[str, list[float]]]


def prompts(length: int) -> list[int]:
    """Tokens that all vocabularies have."""
    return [1000 + i * 37 % 20000 for i in range(length)]


def in_turns(readers: list[Callable[[str], float]]) -> Rates:
    """Tokens per second of every reader in every turn; a reader is called with "prefill" or "decode"."""
    found: Rates = [{"prefill": [], "decode": []} for _ in readers]
    for turn in range(-1, TURNS):
        places = range(len(readers))
        for place in places if turn % 2 else reversed(places):
            for name in ("prefill", "decode"):
                rate = readers[place](name)
                # The first turn warms up.
                if turn >= 0:
                    found[place][name].append(rate)
    return found


def in_transformers(folders: list[Path]) -> Rates:
    """Rates in transformers' own generation loop: a forward pass per token with its cache."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)

    def reader(model: Any) -> Callable[[str], float]:
        @torch.no_grad()
        def rate(name: str) -> float:
            cache, ids = None, torch.tensor([prompts(PROMPT if name == "prefill" else 1)])
            start = time.process_time()
            for _ in range(1 if name == "prefill" else ANSWER):
                output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            return (PROMPT if name == "prefill" else ANSWER) / (time.process_time() - start)

        return rate

    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": True}
    return in_turns([reader(AutoModelForCausalLM.from_pretrained(f, **options).eval()) for f in folders])


def in_llamacpp(folders: list[Path]) -> Rates:
    """Rates in llama.cpp's server."""
    with tempfile.TemporaryDirectory() as work:
        files = [Path(work) / f"{place}.gguf" for place in range(len(folders))]
        for folder, file in zip(folders, files, strict=True):
            export(folder, "gguf", file, dtype="f32")
        return llamacpp_rates(files, prompt=PROMPT, num_tokens=ANSWER, turns=TURNS)


def llamacpp_rates(files: list[Path], *, prompt: int, num_tokens: int, turns: int) -> Rates:
    """Rates of GGUF files in llama.cpp's server; see llamacpp_speed.py.

    Raises:
        SystemExit: its environment is not built, or it failed.
    """
    python = interpreter("xllamacpp")
    if python is None:
        raise SystemExit("llama.cpp: no environment. Run python benchmarks/server_environments.py xllamacpp.")
    request = {"models": [*map(str, files)], "prompt": prompt, "num_tokens": num_tokens, "turns": turns}
    command = [str(python), str(Path(__file__).with_name("llamacpp_speed.py"))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"llama.cpp ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    found: Rates = json.loads(lines[-1].removeprefix("ANSWER "))["models"]
    return found


def in_vllm(folders: list[Path]) -> Rates:
    """Rates in vLLM's server, with what its processes need for HTTP and scheduling."""

    def reader(address: str, processes: list[psutil.Process]) -> Callable[[str], float]:
        def used() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        def rate(name: str) -> float:
            count = 1 if name == "prefill" else ANSWER
            values = {"model": NAME, "temperature": 0, "ignore_eos": True, "max_tokens": count}
            start = used()
            ask(address, "/v1/completions", {**values, "prompt": prompts(PROMPT if name == "prefill" else 1)})
            return (PROMPT if name == "prefill" else ANSWER) / (used() - start)

        return rate

    with ExitStack() as stack:
        readers = []
        for folder in folders:
            before = {process.pid for process in psutil.Process().children(recursive=True)}
            address = stack.enter_context(served(folder, context=2 * PROMPT))
            own = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
            readers.append(reader(address, own))
        return in_turns(readers)


READERS = {"transformers": in_transformers, "llama.cpp": in_llamacpp, "vLLM": in_vllm}


def floors(folders: list[Path]) -> dict[str, float]:
    """How many times faster the second model is where nothing but bytes, or operations, takes time."""
    from minisp.models.skeleton import skeleton
    from minisp.store.checkpoint import Checkpoint

    bytes_read, operations = [], []
    for folder in folders:
        model = skeleton(Checkpoint.open(folder))
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        embeddings = model.get_input_embeddings().weight.numel()
        # Embeddings apart from the head are looked up, not read.
        looked_up = 0 if model.config.tie_word_embeddings else embeddings
        bytes_read.append(sum(sizes.values()) - looked_up)
        layers = sum(size for name, size in sizes.items() if ".layers." in name)
        config = model.config
        # Half of the positions are seen on average, by scores and by values.
        attention = 2 * config.num_hidden_layers * config.hidden_size * PROMPT // 2
        operations.append(layers + attention)
    return {"decode": bytes_read[0] / bytes_read[1], "prefill": operations[0] / operations[1]}


def table(data: dict[str, Any]) -> Iterator[str]:
    """How many times faster the pruned model is, by reader."""
    yield f"{' against '.join(data['models'])}: how many times faster the second is, and its tokens per second of "
    yield f"processor time; a prompt of {data['prompt']} tokens, an answer of {data['answer']}.\n\n"
    parts = ("prefill", "decode")
    rows = [["floor", *(f"{data['floor'][part]:.2f}" for part in parts), "", ""]]
    for reader, found in data["readers"].items():
        ratios = [harness.spread(found["ratios"][part], 2) for part in parts]
        rows.append([reader, *ratios, *(harness.spread(found["pruned"][part], 0) for part in parts)])
    yield harness.markdown(["reader", *parts, *(f"{part}, tokens/s" for part in parts)], rows)


def main() -> None:
    """Every reader; rows are kept as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dense", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=[*READERS])
    options = parser.parse_args()
    folders = [options.dense, options.pruned]
    name = harness.result_name("serving_speed")
    path = harness.RESULTS / f"{name}.json"
    data: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"readers": {}}
    data |= {"models": [folder.name for folder in folders], "prompt": PROMPT, "answer": ANSWER}
    data["floor"] = floors(folders)
    for reader in options.readers:
        dense, pruned = READERS[reader](folders)
        ratios = {
            part: [b / a for a, b in zip(dense[part], pruned[part], strict=True)] for part in ("prefill", "decode")
        }
        data["readers"][reader] = {"dense": dense, "pruned": pruned, "ratios": ratios}
        print(reader, {part: f"×{median(found):.3f}" for part, found in ratios.items()}, data["floor"], flush=True)
        harness.write_json(name, data)


if __name__ == "__main__":
    main()
