"""Is minisp faster and smaller in memory than the paper's recipe in plain PyTorch, and is its result as good?

    python benchmarks/minify_cpu.py --calibration CALIBRATION.txt --evaluation EVALUATION.txt

Every run is a child process of its own, so that peak memory is the whole process; contenders are interleaved. The floor
is in `minify_floor.py`. minisp computes in the type that it takes by itself on this machine. Ratios are to the honest
opponent: the faster of the two naive ones here. Where processors have no bfloat16 products that is float32, and naive
bfloat16 may take an hour a run: both are tried on a single window first. One that is `contenders.SLOW` times slower
than the other runs once, or, where that would take longer than `contenders.PATIENCE`, not at all; the result file says
so.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import harness
import minify_floor
import naive
import torch
from contenders import Contender, agreement, judged, opponent, print_correctness, print_speed, say

HERE = Path(__file__).parent
PAPER = {
    "saliency": "taylor", "allocation": "score", "correct_drift": False,
    "shrink_to": "zero", "alignment": 1, "min_keep": 0.0, "damping": naive.DAMPING,
}  # fmt: skip


def run_contender(contender: Contender, args: argparse.Namespace, *, evaluate: bool) -> harness.ChildRun:
    """One child process that minifies; with `evaluate`, perplexity of the result is in its output too."""
    with tempfile.TemporaryDirectory() as work:
        result, out = Path(work) / "result.json", Path(work) / "out"
        if contender.naive:
            command = [HERE / "naive.py", args.model, "--text", args.calibration, "--save", out, "--json", result]
            command += [word for key, value in contender.options.items() for word in (f"--{key}", value)]
            command += ["--keep", args.keep, "--windows", args.windows, "--window", args.window]
            return harness.run_child(command + (["--eval", args.evaluation, args.foreign] if evaluate else []), result)
        command = [__file__, *args.forward, "--child", json.dumps(contender.options), "--out", out, "--result", result]
        run = harness.run_child(command, result)
        if evaluate:
            run.output.update(evaluate_folder(out, args))
        return run


def evaluate_folder(folder: str | Path, args: argparse.Namespace) -> dict[str, float]:
    """Perplexity of a checkpoint, in a child process, as `naive.evaluate` gives it."""
    with tempfile.TemporaryDirectory() as work:
        result = Path(work) / "result.json"
        command = [__file__, *args.forward, "--evaluate", folder, "--result", result]
        return harness.run_child(command, result).output


def child_minify(args: argparse.Namespace) -> dict[str, Any]:
    """In the child: minisp on the same tokens as the opponent."""
    from minisp.fast import minify

    windows = naive.read_windows(args.model, args.calibration, args.windows, args.window)
    options = {"num_windows": args.windows, "window": args.window, **json.loads(args.child)}
    report = minify(args.model, keep=args.keep, out=args.out, calibration=windows, **options)
    return {"seconds": report.seconds, "kept": [kept.tolist() for kept in report.kept]}


def child_evaluate(args: argparse.Namespace) -> dict[str, float]:
    """In the child: perplexity of the checkpoint in a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32, trust_remote_code=True)
    return naive.evaluate(model, args.model, args.evaluation, args.foreign)


def make_contenders(args: argparse.Namespace) -> list[Contender]:
    """The opponent in both dtypes, minisp with the paper's recipe, and as it comes, in the type it takes here."""
    naives = [
        Contender(f"naive {d}", {"dtype": d, "batch": args.batch, "damping": naive.DAMPING}, args.repeats)
        for d in ("bfloat16", "float32")
    ]
    own = {"dtype": own_dtype()}
    ours = [
        Contender("ours, paper's recipe", {**PAPER, **own}, args.repeats),
        Contender("ours, the defaults", own, args.repeats),
    ]
    return [c for c in naives + ours if args.only is None or any(part in c.name for part in args.only)]


def own_dtype() -> str:
    """The type that minisp computes in on this machine's CPU."""
    from minisp.config import MinifyConfig
    from minisp.device import CPU, compute_dtype

    return str(compute_dtype(MinifyConfig(), CPU)).removeprefix("torch.")


def without_the_hopeless(contenders: list[Contender], args: argparse.Namespace) -> tuple[list[Contender], list[str]]:
    """Those that are run, and notes on those that are not, or once: naive ones are tried on a single window."""
    tried = {c.name: c for c in contenders if c.naive}
    if len(tried) < 2:
        return contenders, []
    probe = argparse.Namespace(**{**vars(args), "windows": 1})
    seconds = {}
    for name, contender in tried.items():
        alone = Contender(name, {**contender.options, "batch": 1}, 1)
        seconds[name] = run_contender(alone, probe, evaluate=False).output["seconds"]["calibration"]
        say(f"{name}: one window of {args.window} tokens in {seconds[name]:.1f} s")
    return judged(contenders, seconds, args.windows)


def run_all(contenders: list[Contender], args: argparse.Namespace, keys: list[str]) -> None:
    """All runs, in rounds whose order alternates; the first round evaluates."""
    for repeat in range(args.repeats):
        for contender in contenders if repeat % 2 == 0 else reversed(contenders):
            if repeat >= contender.repeats:
                continue
            run = run_contender(contender, args, evaluate=repeat == 0)
            contender.add(run)
            if repeat == 0:
                contender.quality, contender.kept = {key: run.output[key] for key in keys}, run.output["kept"]
            took = f"{contender.minify_seconds[-1]:.1f} s, {run.peak_rss / 2**20:.0f} MiB"
            say(f"run {repeat + 1} of {contender.repeats}, {contender.name}: {took}")


def compare(args: argparse.Namespace) -> None:
    """The parent: floor, then the runs. It never loads a model (see `harness.ChildRun`)."""
    found = minify_floor.floor(args.model, args.windows, args.window, args.keep, own_dtype())
    minify_floor.print_floor(found)
    dense = evaluate_folder(args.model, args)
    contenders, notes = without_the_hopeless(make_contenders(args), args)
    run_all(contenders, args, list(dense))
    print_correctness(contenders, dense)
    print_speed(contenders)
    print(harness.write_json(harness.result_name("minify_cpu"), result(args, found, dense, contenders, notes)))


def result(
    args: argparse.Namespace,
    floor: dict[str, Any],
    dense: dict[str, float],
    contenders: list[Contender],
    notes: list[str],
) -> dict[str, Any]:
    """What the result file holds."""
    settings = {key: getattr(args, key) for key in ("keep", "windows", "window", "batch", "repeats")}
    return {
        "settings": {**settings, "model": Path(args.model).name, "calibration": args.calibration.name},
        "evaluation": {
            "text": args.evaluation.name,
            "foreign text": "Python's documentation",
            "windows": naive.EVALUATION[0],
            "window": naive.EVALUATION[1],
        },
        **{f"dense_{key}": value for key, value in dense.items()},
        "floor": floor,
        "opponent": opponent(contenders).name,
        "notes": notes,
        "contenders": [
            {**c.summary(), "units_kept_as_first": agreement(c.kept, contenders[0].kept)} for c in contenders
        ],
    }


def main() -> None:
    """The command line; --child and --evaluate are how it starts itself."""
    parser = argparse.ArgumentParser(description="minisp against the paper's recipe in plain PyTorch, on the CPU.")
    parser.add_argument("--model", help="Llama-shaped folder; by default SmolLM2-135M from the package registry")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--evaluation", type=Path, required=True, help="text file, another one")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="windows per batch of the opponent")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the first is evaluated")
    parser.add_argument("--only", nargs="+", help="parts of the names of contenders")
    parser.add_argument("--foreign", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        from minisp.cli.demo_model import smollm2_135m

        args.model = str(smollm2_135m())
    if args.child or args.evaluate:
        output = child_minify(args) if args.child else child_evaluate(args)
        args.result.write_text(json.dumps(output), "utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        from minisp.evaluate.measure import builtin_texts

        args.foreign = Path(folder) / "documentation.txt"
        args.foreign.write_text(builtin_texts()["documentation"], "utf-8")
        args.forward = ["--model", args.model, "--calibration", args.calibration, "--evaluation", args.evaluation]
        args.forward += ["--keep", str(args.keep), "--windows", str(args.windows), "--window", str(args.window)]
        args.forward += ["--foreign", args.foreign]
        compare(args)


if __name__ == "__main__":
    main()
