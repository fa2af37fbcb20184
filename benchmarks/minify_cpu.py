"""Is minisp faster and smaller in memory than the paper's recipe in plain PyTorch, and is its result as good?

    python benchmarks/minify_cpu.py --calibration CALIBRATION.txt --evaluation EVALUATION.txt

Every run is a child process of its own, so that peak memory is the whole process; contenders are interleaved. minisp
computes in the type that it takes by itself on this machine. Ratios are to the honest opponent: the faster of the naive
ones. Naive float32 always runs; naive bfloat16 runs where minisp takes bfloat16 too, for elsewhere processors have no
bfloat16 products, and it would take an hour. The floor of minisp's time is the operations that its plan counts, at the
speed of matrix products measured here; no floor counts element-wise passes, where much of the time goes.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import naive
import torch

HERE = Path(__file__).parent
PAPER = {
    "saliency": "taylor", "labels": "text", "allocation": "score", "correct_drift": False,
    "shrink_to": "zero", "alignment": 1, "min_keep": 0.0, "damping": naive.DAMPING,
}  # fmt: skip
# What minify() does before it minifies; the opponent's figure has no loading and no tokenising in it either.
NOT_MINIFYING = ("loading", "calibration text")
Row = dict[str, Any]


def run_contender(contender: Row, args: argparse.Namespace, *, evaluate: bool) -> harness.ChildRun:
    """One child process that minifies; with `evaluate`, perplexity of the result is in its output too."""
    with tempfile.TemporaryDirectory() as work:
        result, out = Path(work) / "result.json", Path(work) / "out"
        if contender["name"].startswith("naive"):
            command = [HERE / "naive.py", args.model, "--text", args.calibration, "--save", out, "--json", result]
            command += [word for key, value in contender["options"].items() for word in (f"--{key}", value)]
            command += ["--keep", args.keep, "--windows", args.windows, "--window", args.window]
            return harness.run_child(command + (["--eval", args.evaluation, args.foreign] if evaluate else []), result)
        options = json.dumps(contender["options"])
        command = [__file__, *args.forward, "--child", options, "--out", out, "--result", result]
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
    work = {"flops": report.plan.flops, "solve_flops": report.plan.solve_flops}
    return {"seconds": report.seconds, "kept": [kept.tolist() for kept in report.kept], "work": work}


def child_evaluate(args: argparse.Namespace) -> dict[str, float]:
    """In the child: perplexity of the checkpoint in a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.float32, trust_remote_code=True)
    return naive.evaluate(model, args.model, args.evaluation, args.foreign)


def make_contenders(args: argparse.Namespace, own: str) -> list[Row]:
    """The opponent, minisp with the paper's recipe, and as it comes, in the type `own` that it takes here."""
    naives = {
        f"naive {dtype}": {"dtype": dtype, "batch": args.batch, "damping": naive.DAMPING}
        for dtype in dict.fromkeys((own, "float32"))
    }
    ours = {"ours, paper's recipe": {**PAPER, "dtype": own}, "ours, the defaults": {"dtype": own}}
    return [
        {"name": name, "options": options, "minify_seconds": [], "phases": [], "peak_rss_bytes": [], "disturbance": []}
        for name, options in (naives | ours).items()
        if args.only is None or any(part in name for part in args.only)
    ]


def own_dtype() -> str:
    """The type that minisp computes in on this machine's CPU."""
    from minisp.config import MinifyConfig
    from minisp.device import CPU, compute_dtype

    return str(compute_dtype(MinifyConfig(), CPU)).removeprefix("torch.")


def run_all(contenders: list[Row], args: argparse.Namespace, keys: list[str]) -> None:
    """All runs, in rounds whose order alternates; the first round evaluates."""
    first: list[list[int]] = []
    for repeat in range(args.repeats):
        for row in contenders if repeat % 2 == 0 else reversed(contenders):
            run = run_contender(row, args, evaluate=repeat == 0)
            phases = run.output["seconds"]
            row["phases"].append(phases)
            row["minify_seconds"].append(sum(s for phase, s in phases.items() if phase not in NOT_MINIFYING))
            row["peak_rss_bytes"].append(run.peak_rss)
            row["disturbance"].append(run.disturbance)
            if repeat == 0:
                kept = run.output["kept"]
                first = first or kept
                row |= {key: run.output[key] for key in keys} | {"widths": [len(indices) for indices in kept]}
                row |= {"units_kept_as_first": agreement(kept, first), "work": run.output.get("work")}
            took = f"{row['minify_seconds'][-1]:.1f} s, {run.peak_rss / 2**20:.0f} MiB"
            harness.say(f"run {repeat + 1} of {args.repeats}, {row['name']}: {took}")


def agreement(kept: list[list[int]], reference: list[list[int]]) -> float:
    """Share of the units in `reference` that `kept` has too."""
    common = sum(len(set(a) & set(b)) for a, b in zip(kept, reference, strict=True))
    return common / sum(len(b) for b in reference)


def compare(args: argparse.Namespace) -> None:
    """The parent: floor, then the runs. It never loads a model (see `harness.ChildRun`)."""
    own = own_dtype()
    rates = {name: harness.gemm_ceiling(getattr(torch, name), 1024) for name in dict.fromkeys((own, "float32"))}
    dense = evaluate_folder(args.model, args)
    harness.say(f"dense: {dense}")
    contenders = make_contenders(args, own)
    run_all(contenders, args, list(dense))
    for row in contenders:
        if row["work"]:
            floor = row["work"]["flops"] / rates[own] + row["work"]["solve_flops"] / rates["float32"]
            harness.say(f"{row['name']}: floor {floor:.1f} s, {floor / statistics.median(row['minify_seconds']):.0%}")
    settings = {key: getattr(args, key) for key in ("keep", "windows", "window", "batch", "repeats")}
    windows, window = naive.EVALUATION
    found = {
        "settings": {**settings, "model": Path(args.model).name, "calibration": args.calibration.name},
        "evaluation": {
            "text": args.evaluation.name, "foreign text": "Python's documentation", "windows": windows, "window": window
        },
        **{f"dense_{key}": value for key, value in dense.items()},
        "gemm_flops": rates,
        "contenders": contenders,
    }  # fmt: skip
    print("".join(table(found)))
    print(harness.write_json(harness.result_name("minify_cpu"), found))


def table(data: Row) -> Iterator[str]:
    """Quality, time and memory of whole processes, ratios to the faster naive contender."""
    measured = {"text": "perplexity", "documentation": "foreign_perplexity"}
    measured = {domain: key for domain, key in measured.items() if f"dense_{key}" in data}
    settings, base = data["settings"], opponent(data)
    yield f"{settings['keep']:.0%} kept, {settings['windows']} windows of {settings['window']} tokens; "
    yield "interleaved runs: median (fastest–slowest). "
    yield f"Speed and memory are ratios to {base['name']}" if base else "No opponent was measured beside them"
    yield ". Disturbance is the share of the machine that others used meanwhile.\n\n"
    columns = ["", " · ".join(measured), "minify, seconds", "speed", "peak of the process", "memory", "runs"]
    rows = []
    for one in data["contenders"]:
        name = one["name"] + ("" if one["name"].startswith("naive") else f", {one['options']['dtype']}")
        ratios = " · ".join(f"{one[key] / data[f'dense_{key}']:.3f}" for key in measured.values())
        peak, speed, memory = statistics.median(one["peak_rss_bytes"]), "", ""
        if base:
            speed = f"×{statistics.median(base['minify_seconds']) / statistics.median(one['minify_seconds']):.2f}"
            memory = f"{peak / statistics.median(base['peak_rss_bytes']):.2f}"
        last = [len(one["minify_seconds"]), f"{max(one['disturbance']):.1%}"]
        rows.append([name, ratios, harness.spread(one["minify_seconds"]), speed, f"{peak / 1e9:.2f} GB", memory, *last])
    yield harness.markdown([*columns, "disturbance"], rows)
    yield from (f"\n{note}\n" for note in data.get("notes", []))


def opponent(data: Row) -> Row | None:
    """The naive contender with the fewest seconds; None where none was measured."""
    naives = [one for one in data["contenders"] if one["name"].startswith("naive")]
    return min(naives, key=lambda one: statistics.median(one["minify_seconds"]), default=None)


def figure(data: Row) -> Any:
    """Quality, time and memory of each contender."""
    from drawing import OURS, THEIRS, bars, plt

    contenders = data["contenders"]
    names = [c["name"].replace("ours", "minisp") for c in contenders]
    colors = [OURS if name.startswith("minisp") else THEIRS for name in names]
    titles = {"perplexity": "Text", "foreign_perplexity": "Documentation"}
    measured = [key for key in titles if f"dense_{key}" in data]
    size = (3.2 * (len(measured) + 2), 2.7)
    drawn, (*qualities, time, memory) = plt.subplots(
        1, len(measured) + 2, figsize=size, layout="constrained", sharey=True
    )
    for axes, key in zip(qualities, measured, strict=True):
        ratios = [[c[key] / data[f"dense_{key}"]] for c in contenders]
        bars(axes, names, ratios, colors, "perplexity / dense model's")
        axes.axvline(1, color="0.25", linewidth=1, linestyle=":")
        axes.set_title(titles[key])
    bars(time, names, [c["minify_seconds"] for c in contenders], colors, "seconds")
    bars(memory, names, [[p / 1e9 for p in c["peak_rss_bytes"]] for c in contenders], colors, "GB, peak of the process")
    # Shared axes are inverted once for each panel.
    time.set_ylim(len(names) - 0.5, -0.5)
    settings = data["settings"]
    for axes, title in ((time, "Time"), (memory, "Memory")):
        axes.set_title(title)
    drawn.supxlabel(
        f"Less is better. {settings['keep']:.0%} of the units kept, {settings['windows']} windows of "
        f"{settings['window']} tokens; {harness.machine_line(data)}",
        fontsize=8.5,
        color="0.35",
    )
    return drawn


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
