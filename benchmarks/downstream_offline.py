"""Downstream tasks that need no download, several models side by side; the first is what the others are compared to.

    python benchmarks/downstream_offline.py dense=path/to/llama ours=llama-80 --text evaluation.txt --neutral folder

Tasks, each of about --items items, the same for the same texts and seed (`offline_tasks.py`, `offline_programs.py`):
which passage or word of the text goes on (also in the --neutral texts, their items together); sums, differences and
comparisons of numbers after examples; a colour that was told, a list that is repeated; three points of grammar; Python
functions to complete from their docstring, which are run and checked. A question is answered by the candidate of the
largest likelihood, a function by greedy completion.

An item's answers by two models are a pair: differences have an interval by the bootstrap over items, and in the JSON
McNemar's exact p. What does not discriminate is left out by a rule that is fixed before the models are compared: a task
on which the first model's interval reaches down to chance is shown, and has no share in the mean.

With 100 items and five neutral texts a model reads 68,000 tokens, counted with SmolLM2's tokenizer, and writes at most
48 for each program. Models are loaded one after the other, in float32, and may bring a modelling file of their own,
which is run: pass folders that you trust.
"""

import argparse
import gc
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from offline_programs import Program, check_runner, ended, passes
from offline_scoring import choose, write
from offline_tasks import Task, make_tasks
from tables import downstream_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisp.config import MinifyConfig
from minisp.device import compute_device
from minisp.text.corpora import load_text, load_texts

RESAMPLES = 10_000
# Of the standard normal distribution, for an interval of 95 %.
QUANTILE = 1.959964
Answers = dict[str, list[bool]]
"""Task → whether each of its items was answered rightly."""


def answers(model: Any, tokenizer: Any, task: Task) -> list[bool]:
    """Whether each item is answered rightly. A tie of two candidates is no answer."""
    if isinstance(task.items[0], Program):
        found = write(model, tokenizer, [program.prompt for program in task.items], ended)
        return [passes(program, text) for program, text in zip(task.items, found, strict=True)]
    scores = choose(model, tokenizer, task.items)
    return [
        all(own[item.answer] > score for place, score in enumerate(own) if place != item.answer)
        for item, own in zip(task.items, scores, strict=True)
    ]


def examine(folder: Path, tasks: Sequence[Task], device: torch.device) -> tuple[Answers, float]:
    """What a checkpoint answers, in float32, and the seconds that it took without loading it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The folders are results of the user's own: a modelling file in them is minisp's, or a peer's.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    model = model.to(device).eval()
    began = time.perf_counter()
    found = {task.name: answers(model, tokenizer, task) for task in tasks}
    return found, time.perf_counter() - began


# Intervals


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score: the shares p with |right/count − p| ≤ z√(p(1 − p)/count)."""
    share, z2 = right / count, QUANTILE**2 / count
    middle, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)


def paired(values: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float, float]:
    """The mean over tasks of the mean over items, and its 95 % interval by the bootstrap.

    Args:
        values: per task and item, an answer (1 where right, else 0), or the difference of two models' answers, which
            keeps the models paired. Items are drawn anew within their tasks; the tasks stay.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for own in values:
        drawn = torch.randint(len(own), (RESAMPLES, len(own)), generator=generator)
        means += torch.tensor(own, dtype=torch.float64)[drawn].mean(1) / len(values)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return sum(sum(own) / len(own) for own in values) / len(values), low, high


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test: of the items that one model alone answered, is half the first's?"""
    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((first, second), (second, first))]
    count = sum(only)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(min(only) + 1)) / 2**count)


def summary(tasks: Sequence[Task], found: Mapping[str, Answers]) -> dict[str, Any]:
    """What each model answers, and its difference to the first model: per task, and in the mean over tasks.

    A task counts in the mean where the first model is better than chance: the interval of its answers lies above. On
    the others no model can lose anything. The rule looks at the first model alone, so that it favours none.
    """
    first, *_ = found.values()
    compared: dict[str, Any] = {}
    for task in tasks:
        dense = first[task.name]
        counts = wilson(sum(dense), len(dense))[0] > task.chance
        models = {label: _compared(dense, own[task.name]) for label, own in found.items()}
        compared[task.name] = {"items": len(dense), "chance": task.chance, "counts": counts, "models": models}
    counted = [name for name, task in compared.items() if task["counts"]]
    means = {}
    for label, own in found.items() if counted else ():
        mean, *interval = paired([own[name] for name in counted])
        change, *reach = paired([_differences(first[name], own[name]) for name in counted])
        means[label] = {"accuracy": mean, "interval": interval, "difference": change, "difference_interval": reach}
    return {"tasks": compared, "mean": means}


def _compared(first: Sequence[bool], own: Sequence[bool]) -> dict[str, Any]:
    change, *reach = paired([_differences(first, own)])
    return {
        "accuracy": sum(own) / len(own),
        "interval": wilson(sum(own), len(own)),
        "difference": change,
        "difference_interval": reach,
        "p": mcnemar(first, own),
        # One digit per item, so that other models can be compared with these later.
        "right": "".join(str(int(one)) for one in own),
    }


def _differences(first: Sequence[bool], second: Sequence[bool]) -> list[int]:
    return [int(b) - int(a) for a, b in zip(first, second, strict=True)]


def named(models: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER, or a folder, which is called by its own name."""
    found: dict[str, Path] = {}
    for model in models:
        name, equals, folder = model.partition("=")
        path = Path(folder if equals else model)
        label = name if equals else path.name
        if label in found:
            raise SystemExit(f"Models: expected different names, got {label} twice. Name them as NAME=FOLDER.")
        if not path.is_dir():
            raise SystemExit(f"Models: expected a checkpoint folder, got {path}. Check the path.")
        found[label] = path
    return found


def main() -> None:
    """Examine, print, write benchmarks/results/downstream_offline_<machine>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folder or NAME=FOLDER; the first is what the others compare to")
    parser.add_argument("--text", type=Path, required=True, help="text that nothing was calibrated on")
    parser.add_argument("--neutral", type=Path, help="folder of texts of other domains")
    parser.add_argument("--items", type=int, default=100, help="per task, 100 by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="appended to the name of the result file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and no table")
    arguments = parser.parse_args()
    models = named(arguments.models)
    check_runner()
    neutral = load_texts([arguments.neutral]) if arguments.neutral else {}
    tasks = make_tasks(load_text(arguments.text), neutral, arguments.items, arguments.seed)
    device = compute_device(MinifyConfig())
    found, seconds = {}, {}
    for label, folder in models.items():
        found[label], seconds[label] = examine(folder, tasks, device)
        gc.collect()
    items = hashlib.sha256(repr(tasks).encode()).hexdigest()[:16]
    content = {"seed": arguments.seed, "items": items, "seconds": seconds, **summary(tasks, found)}
    path = harness.write_json(harness.result_name("downstream_offline", arguments.label), content)
    if arguments.json:
        print(json.dumps(content))
        return
    title = "Right answers in %, 95 % interval; for the others difference to the first, * where its interval excludes 0"
    harness.print_table(title, ["task", "items", "chance", *models], downstream_rows(content))
    print(path)


if __name__ == "__main__":
    main()
