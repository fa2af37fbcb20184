"""Runs inside the environment of llama.cpp: how much processor time its server needs for tokens, by model, in turns.

Usage: python llamacpp_speed.py < request.json, with the request

    {"models": [path, …], "prompt": tokens of the prompt, "num_tokens": tokens of the answer, "turns": n}

prints, after the word ANSWER, for each model {"prefill": [tokens per second, one a turn], "decode": the same}.

A second is one of processor time of one thread: what other programs on the machine take does not count, though they do
share its caches and its memory.
"""

import json
import sys
import time
from typing import Any

from asking import ask
from llamacpp_client import served


def rates(address: str, prompt: int, num_tokens: int) -> dict[str, float]:
    """Tokens per second for a prompt alone, and for an answer to a prompt of one token."""
    wanted = {"cache_prompt": False, "ignore_eos": True, "temperature": 0}
    found = {}
    for name, length, count in (("prefill", prompt, 1), ("decode", 1, num_tokens)):
        tokens = [1000 + i * 37 % 20000 for i in range(length)]
        start = time.process_time()
        ask(address, "/completion", {**wanted, "prompt": tokens, "n_predict": count})
        found[name] = max(length, count) / (time.process_time() - start)
    return found


def main() -> None:
    """Every model in every turn, in an order that turns round each time."""
    request = json.load(sys.stdin)
    servers = [served(path) for path in request["models"]]
    found: list[dict[str, Any]] = [{"prefill": [], "decode": []} for _ in servers]
    for turn in range(-1, request["turns"]):
        places = range(len(servers))
        for place in places if turn % 2 else reversed(places):
            once = rates(servers[place].listening_address, request["prompt"], request["num_tokens"])
            # The first turn warms up.
            for name, value in once.items() if turn >= 0 else ():
                found[place][name].append(value)
    print("ANSWER " + json.dumps({"models": found}), flush=True)


if __name__ == "__main__":
    main()
