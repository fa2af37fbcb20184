"""Do real servers compute what transformers computes from the same weights? Greedy tokens, log-probabilities, bytes.

Usage: python serving.py FOLDER [FOLDER …]. Rows go to results/serving_MACHINE.json.

Exports every checkpoint folder to GGUF in float32, where tokens have to be equal, and in q8_0, whose distance is
reported, and starts llama.cpp's server on each file; see server_environments.py for its environment. Times are those of
one thread and of one run: they are printed to be looked at, not to be compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from server_environments import interpreter

CLIENT = Path(__file__).with_name("llamacpp_client.py")
TEXTS = (
    "Hello 12345 world's end,  two spaces\n\n\tand a tab. It'll be 2.5% of œuvre – naïve, 日本語 and 🙂.",
    "def f(x):\n    return x ** 2  # squared\n",
)
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass(frozen=True)
class Greedy:
    """What a model goes on with: its most likely tokens, and the log-probability of each."""

    tokens: list[int]
    chosen: list[float]


def ask_llamacpp(
    models: list[Path], prompts: list[list[int]], texts: list[str], num_tokens: int, banned: list[int] | None = None
) -> dict[str, Any]:
    """The answers of llama.cpp's server for each GGUF file; see llamacpp_client.py for what they hold.

    Args:
        banned: tokens that are never chosen.

    Raises:
        SystemExit: the environment is not built, or a file did not load; with the end of what llama.cpp said.
    """
    python = interpreter("xllamacpp")
    if python is None:
        raise SystemExit("llama.cpp: no environment. Run python benchmarks/server_environments.py xllamacpp.")
    paths = [str(path) for path in models]
    request = {"models": paths, "prompts": prompts, "texts": texts, "num_tokens": num_tokens, "banned": banned or []}
    done = subprocess.run(
        [str(python), str(CLIENT)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"llama.cpp ended with status {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("ANSWER "))
    return found


@torch.no_grad()
def greedy(model: Any, prompt: list[int], num_tokens: int, banned: list[int] | None = None) -> Greedy:
    """What transformers goes on with, whatever ends a text; `model` computes in its own dtype."""
    ids, cache, tokens, chosen = torch.tensor([prompt]), None, [], []
    for _ in range(num_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores = output.logits[0, -1].float().log_softmax(-1)
        best = int(scores.index_fill(0, torch.tensor(banned or [], dtype=torch.long), -torch.inf).argmax())
        tokens.append(best)
        chosen.append(float(scores[best]))
        ids = torch.tensor([[best]])
    return Greedy(tokens, chosen)


def agreement(found: dict[str, Any], expected: Greedy) -> tuple[int, float]:
    """How many tokens agree from the start, and the largest difference of their log-probabilities.

    A server ends at the token that ends a text, which transformers was not told to.
    """
    count = 0
    for ours, theirs in zip(expected.tokens, found["tokens"], strict=False):
        if ours != theirs:
            break
        count += 1
    pairs = zip(expected.chosen[:count], found["chosen"][:count], strict=True)
    return count, max((abs(a - b) for a, b in pairs), default=0.0)


def table(data: dict[str, Any]) -> str:
    """One row a file that was served."""
    columns = [
        "tokens equal",
        "tokens",
        "largest difference of a log-probability",
        "concurrent equal",
        "streamed equal",
    ]
    rows = ([row["model"], row["dtype"], *(row[column] for column in columns)] for row in data["rows"])
    return harness.markdown(["model", "type", *columns], rows)


def main() -> None:
    """Export, serve, compare."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minisp.export.targets import export

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--num-tokens", type=int, default=24)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for folder in options.folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
        expected = [greedy(model, prompt, options.num_tokens) for prompt in prompts]
        del model
        with tempfile.TemporaryDirectory() as work:
            exported = [export(folder, "gguf", Path(work) / f"{dtype}.gguf", dtype=dtype) for dtype in ("f32", "q8_0")]
            found = ask_llamacpp([one.out for one in exported], prompts, list(TEXTS), options.num_tokens)
        texts = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
        for one, dtype, answers in zip(exported, ("f32", "q8_0"), found["models"], strict=True):
            pairs = [agreement(*pair) for pair in zip(answers["prompts"], expected, strict=True)]
            row = {
                "model": folder.name,
                "widths": list(one.widths),
                "dtype": dtype,
                "bytes": one.bytes,
                "tokens equal": sum(count for count, _ in pairs),
                "tokens": sum(len(answer["tokens"]) for answer in answers["prompts"]),
                "largest difference of a log-probability": max(difference for _, difference in pairs),
                "texts split as transformers does": answers["texts"] == texts,
                "concurrent equal": answers["concurrent"] == [answer["tokens"] for answer in answers["prompts"]],
                "streamed in pieces": answers["pieces"],
                "streamed equal": answers["streamed"] == answers["prompts"][0]["text"],
                "xllamacpp": found["version"],
            }
            rows.append(row)
            print({key: value for key, value in row.items() if key != "widths"}, flush=True)
    harness.write_json(harness.result_name("serving"), {"rows": rows})
    if any(row["dtype"] == "f32" and row["tokens equal"] < row["tokens"] for row in rows):
        sys.exit("float32 tokens differ")


if __name__ == "__main__":
    main()
