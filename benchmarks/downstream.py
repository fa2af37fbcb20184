"""Downstream tasks by EleutherAI's harness, several models side by side: needs `pip install 'minisp[eval]'` and data.

    python benchmarks/downstream.py path/to/llama llama-80 --tasks arc_easy,hellaswag,piqa,winogrande [--limit 200]

The harness fetches its tasks' data from the hub unless they are in its cache already; --include names a folder of tasks
of your own, whose data may be local files. Prompts, metrics and standard errors are the harness's; results are written
as it gives them. Nothing here is measured in the README: its machine has none of the data.
"""

import argparse
from pathlib import Path
from typing import Any

import harness

from minisp.config import MinifyConfig
from minisp.device import compute_device, compute_dtype
from minisp.evaluate.measure import load_any
from minisp.store.hub import load_tokenizer, local_folder


def evaluate(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Task → metric → value, as the harness names them."""
    # Here, so that --help works where it is not installed.
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = MinifyConfig(device=args.device)
    device = compute_device(config)
    model = load_any(folder, device, compute_dtype(config, device))
    wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=args.batch)
    found = simple_evaluate(
        wrapped,
        tasks=args.tasks.split(","),
        num_fewshot=args.fewshot,
        limit=args.limit,
        task_manager=TaskManager(include_path=args.include),
        log_samples=False,
    )
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


def rows(results: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """One row per task and metric, a column per model, each with its standard error where there is one."""
    first: dict[str, Any] = next(iter(results.values()))
    table = []
    for task, metrics in first.items():
        for metric in metrics:
            if "_stderr" in metric:
                continue
            name, _, how = metric.partition(",")
            cells = []
            for found in results.values():
                error = found[task].get(f"{name}_stderr,{how}")
                cells.append(f"{found[task][metric]:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
            table.append([f"{task}, {name}", *cells])
    return table


def main() -> None:
    """Evaluate, print, write benchmarks/results/downstream_<machine>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or hub ids; the first is what the others compare to")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--include", help="folder of further task definitions")
    parser.add_argument("--limit", type=int, help="documents per task at most")
    parser.add_argument("--fewshot", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    results = {str(name): evaluate(local_folder(name), args) for name in args.models}
    harness.print_table(f"{args.fewshot} shots", ["task, metric", *results], rows(results))
    content = {"fewshot": args.fewshot, "limit": args.limit, "results": results}
    print(harness.write_json(harness.result_name("downstream"), content))


if __name__ == "__main__":
    main()
