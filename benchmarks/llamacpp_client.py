"""Runs inside the environment of llama.cpp: starts its server on GGUF files and asks it over HTTP. Needs no torch.

Usage: python llamacpp_client.py < request.json, with the request

    {"models": [path, …], "prompts": [[token, …], …], "num_tokens": n, "texts": [text, …],
     "banned": [token that is never chosen, …]}

prints, after the word ANSWER, the version of the binding and for each model

    {"prompts": [{"tokens": […], "chosen": [log-probability of each],
    "text": …, "milliseconds": [for the prompt, for the answer]}, …], "concurrent": the same tokens, asked for at
    once, "streamed": text of the first prompt that came in pieces, "pieces": how many,
    "texts": [[token, …], …], "chat": text}
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp
from asking import ask, events


def served(path: str) -> xllamacpp.Server:
    """llama.cpp's server for one model, in float32 but for the weights, on a port that is free."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.port = 1024, 2, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # A cache of half precision would not give what float32 gives, and the fused attention rounds whatever the cache is.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def answers(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """Everything that is asked of one model."""
    count, prompts = request["num_tokens"], request["prompts"]
    greedy = {"temperature": 0, "logit_bias": [[token, False] for token in request["banned"]]}

    def complete(prompt: list[int]) -> dict[str, Any]:
        wanted = {"n_predict": count, "cache_prompt": False, "n_probs": 1, "return_tokens": True}
        found = ask(address, "/completion", {**greedy, **wanted, "prompt": prompt})
        times = [found["timings"]["prompt_ms"], found["timings"]["predicted_ms"]]
        chosen = [step["logprob"] for step in found["completion_probabilities"]]
        return {"tokens": found["tokens"], "chosen": chosen, "text": found["content"], "milliseconds": times}

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(complete, prompts))
    asked = {**greedy, "prompt": prompts[0], "n_predict": count, "cache_prompt": False, "stream": True}
    said = [event["content"] for event in events(ask(address, "/completion", asked))]
    asked = {**greedy, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": count}
    chat = ask(address, "/v1/chat/completions", asked)
    return {
        "prompts": alone,
        "concurrent": [found["tokens"] for found in together],
        "streamed": "".join(said),
        "pieces": sum(1 for text in said if text),
        "texts": [ask(address, "/tokenize", {"content": text})["tokens"] for text in request["texts"]],
        "chat": chat["choices"][0]["message"]["content"],
    }


def main() -> None:
    """One server after the other."""
    request = json.load(sys.stdin)
    models = []
    for path in request["models"]:
        server = served(path)
        models.append(answers(server.listening_address, request))
        del server
    print("ANSWER " + json.dumps({"version": xllamacpp.__version__, "models": models}), flush=True)


if __name__ == "__main__":
    main()
