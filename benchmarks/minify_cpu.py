"""Is minisp faster and smaller in memory than the paper's recipe in plain PyTorch, and is its result as good?

    python benchmarks/minify_cpu.py --calibration CALIBRATION.txt --evaluation EVALUATION.txt

Every run is a child process of its own, so that peak memory is the whole process; contenders are interleaved. The
floor, per token, written down before measuring. P: weights in the layers' matrix products, H = d·V: the head,
A = 2·L·window·d: the two products of causal attention (half of them masked), L layers of width m.

    naive    6(P + H) + 3A + 2Lm²    forward, input gradients, weight gradients; a float32 Gram matrix, 2m² a layer
    ours     4(P + H) + 3A + Lm²     no weight gradients; half of a symmetric Gram matrix, 16-bit products
             + (2P + A)(1 − 1/s)     the second forward pass when layers are held in s segments to save memory

Seconds are these over the GEMM speed of the machine, measured here in the dtype concerned. Neither side's floor counts
element-wise passes, which is where the rest of the time goes.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import naive
import torch

HERE = Path(__file__).parent
# What minify() does before it minifies; the opponent's figure has no loading and no tokenising in it either.
NOT_MINIFYING = ("loading", "calibration text")
PAPER = {
    "saliency": "taylor", "allocation": "score", "inputs": "dense",
    "shrink_to": "zero", "alignment": 1, "min_keep": 0.0, "damping": naive.DAMPING,
}  # fmt: skip


@dataclass
class Contender:
    """One row: how it is started, what its first run gave, and time and memory of all runs."""

    name: str
    options: dict[str, Any]
    quality: dict[str, float] = field(default_factory=dict)
    kept: list[list[int]] = field(default_factory=list)
    minify_seconds: list[float] = field(default_factory=list)
    runs: list[harness.ChildRun] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    def add(self, run: harness.ChildRun) -> None:
        """Count a run: the seconds of its minification, and the peak memory of its process."""
        phases = run.output["seconds"]
        self.runs.append(run)
        self.phases.append(phases)
        self.minify_seconds.append(sum(s for phase, s in phases.items() if phase not in NOT_MINIFYING))

    def summary(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "name": self.name,
            "options": self.options,
            **self.quality,
            "widths": [len(indices) for indices in self.kept],
            "minify_seconds": self.minify_seconds,
            "phases": self.phases,
            "peak_rss_bytes": [run.peak_rss for run in self.runs],
            "disturbance": [run.disturbance for run in self.runs],
        }


def run_contender(contender: Contender, args: argparse.Namespace, *, evaluate: bool) -> harness.ChildRun:
    """One child process that minifies; with `evaluate`, perplexity of the result is in its output too."""
    with tempfile.TemporaryDirectory() as work:
        result, out = Path(work) / "result.json", Path(work) / "out"
        if contender.name.startswith("naive"):
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

    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.bfloat16, trust_remote_code=True)
    return naive.evaluate(model, args.model, args.evaluation, args.foreign)


def floor(args: argparse.Namespace) -> dict[str, float]:
    """GFLOP per token of both sides by the formulas above, measured GEMM speeds, and the seconds that follow."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(args.model)
    d, m, num_layers, heads = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or d // heads
    layers = num_layers * (2 * d * head_dim * (heads + c.num_key_value_heads) + 3 * d * m)
    head, attention = d * c.vocab_size, 2 * num_layers * args.window * heads * head_dim
    shared = 4 * (layers + head) + 3 * attention
    weights, gram, again = 2 * (layers + head), num_layers * m * m, 2 * layers + attention
    low, full = harness.gemm_ceiling(torch.bfloat16), harness.gemm_ceiling(torch.float32)
    tokens = args.windows * args.window
    return {
        "bfloat16_flops": low,
        "float32_flops": full,
        "naive_gflop_per_token": (shared + weights + 2 * gram) / 1e9,
        "ours_gflop_per_token": (shared + gram) / 1e9,
        "second_forward_gflop_per_token": again / 1e9,
        "naive_bfloat16_seconds": tokens * ((shared + weights) / low + 2 * gram / full),
        "naive_float32_seconds": tokens * (shared + weights + 2 * gram) / full,
        "ours_seconds": tokens * (shared + gram) / low,
        "ours_segmented_seconds": tokens * (shared + gram + again) / low,
    }


def print_floor(f: dict[str, float]) -> None:
    """The floor and the ratios it predicts."""
    base, ours, segmented = f["naive_bfloat16_seconds"], f["ours_seconds"], f["ours_segmented_seconds"]
    rows = [
        ("naive bfloat16", f["naive_gflop_per_token"], base, 1.0),
        ("naive float32", f["naive_gflop_per_token"], f["naive_float32_seconds"], base / f["naive_float32_seconds"]),
        ("ours, one segment", f["ours_gflop_per_token"], ours, base / ours),
        (
            "ours, many segments",
            f["ours_gflop_per_token"] + f["second_forward_gflop_per_token"],
            segmented,
            base / segmented,
        ),
    ]
    title = f"Floor (GEMM: {f['bfloat16_flops'] / 1e9:.0f} GFLOP/s bfloat16, {f['float32_flops'] / 1e9:.0f} float32)"
    columns = ["", "GFLOP/token", "seconds", "faster than naive bfloat16"]
    harness.print_table(title, columns, [(n, f"{g:.3f}", f"{s:.1f}", f"×{r:.2f}") for n, g, s, r in rows])


def agreement(kept: list[list[int]], reference: list[list[int]]) -> float:
    """Share of the units in `reference` that `kept` has too."""
    common = sum(len(set(a) & set(b)) for a, b in zip(kept, reference, strict=True))
    return common / sum(len(b) for b in reference)


def print_correctness(contenders: list[Contender], dense: dict[str, float]) -> None:
    """Perplexity, on text and on the foreign domain, and kept units of every contender's first run."""
    first = contenders[0]

    def values(quality: dict[str, float]) -> list[str]:
        return [word for key, base in dense.items() for word in (f"{quality[key]:.3f}", f"×{quality[key] / base:.4f}")]

    rows = [["dense", *values(dense), "", ""]]
    for c in contenders:
        units, share = sum(map(len, c.kept)), f"{agreement(c.kept, first.kept):.2%}"
        rows.append([c.name, *values(c.quality), f"{units}", share])
    columns = ["", "perplexity", "of dense", "documentation", "of dense", "units kept", f"kept as {first.name} does"]
    harness.print_table("Correctness", columns, rows)


def print_speed(contenders: list[Contender]) -> None:
    """Medians (and range) of seconds and peak memory, with ratios to the first contender."""

    def peak(c: Contender) -> float:
        return statistics.median(run.peak_rss for run in c.runs)

    base, rows = contenders[0], []
    for c in contenders:
        seconds = statistics.median(c.minify_seconds)
        rows.append(
            (
                c.name,
                f"{seconds:.1f} ({min(c.minify_seconds):.1f}–{max(c.minify_seconds):.1f})",
                f"×{statistics.median(base.minify_seconds) / seconds:.2f}",
                f"{peak(c) / 2**20:.0f}",
                f"{peak(c) / peak(base):.2f}",
                f"{max(run.disturbance for run in c.runs):.0%}",
            )
        )
    columns = ["", "minify s", "faster", "peak MiB", "of first", "disturbed up to"]
    harness.print_table(f"Speed and memory, {len(base.runs)} interleaved runs", columns, rows)


def make_contenders(batch: int, only: list[str] | None) -> list[Contender]:
    """The opponent in both dtypes, minisp with the paper's recipe, and minisp as it comes."""
    contenders = [
        Contender("naive bfloat16", {"dtype": "bfloat16", "batch": batch, "damping": naive.DAMPING}),
        Contender("naive float32", {"dtype": "float32", "batch": batch, "damping": naive.DAMPING}),
        Contender("ours, paper's recipe", {**PAPER, "dtype": "bfloat16"}),
        Contender("ours, the defaults", {"dtype": "bfloat16"}),
    ]
    return [c for c in contenders if only is None or any(part in c.name for part in only)]


def compare(args: argparse.Namespace) -> None:
    """The parent: floor, correctness, then the timed runs. It never loads a model (see `harness.ChildRun`)."""
    made_floor = floor(args)
    print_floor(made_floor)
    contenders = make_contenders(args.batch, args.only)
    dense = evaluate_folder(args.model, args)
    for contender in contenders:
        run = run_contender(contender, args, evaluate=True)
        contender.quality, contender.kept = {key: run.output[key] for key in dense}, run.output["kept"]
        contender.add(run)
    print_correctness(contenders, dense)
    for repeat in range(1, args.repeats):
        for contender in contenders if repeat % 2 == 0 else reversed(contenders):
            contender.add(run_contender(contender, args, evaluate=False))
    print_speed(contenders)
    settings = {key: getattr(args, key) for key in ("keep", "windows", "window", "batch", "repeats")}
    content = {
        "settings": {**settings, "model": Path(args.model).name, "calibration": args.calibration.name},
        "evaluation": {
            "text": args.evaluation.name,
            "foreign text": "Python's documentation",
            "windows": naive.EVALUATION[0],
            "window": naive.EVALUATION[1],
        },
        **{f"dense_{key}": value for key, value in dense.items()},
        "floor": made_floor,
        "contenders": [
            {**c.summary(), "units_kept_as_first": agreement(c.kept, contenders[0].kept)} for c in contenders
        ],
    }
    print(harness.write_json(harness.result_name("minify_cpu", args.label), content))


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
    parser.add_argument("--label", help="appended to the result file's name")
    parser.add_argument("--foreign", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        from minisp.demo_model import smollm2_135m

        args.model = str(smollm2_135m())
    if args.child or args.evaluate:
        output = child_minify(args) if args.child else child_evaluate(args)
        args.result.write_text(json.dumps(output), "utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        from minisp.measure import builtin_texts

        args.foreign = Path(folder) / "documentation.txt"
        args.foreign.write_text(builtin_texts()["documentation"], "utf-8")
        args.forward = ["--model", args.model, "--calibration", args.calibration, "--evaluation", args.evaluation]
        args.forward += ["--keep", str(args.keep), "--windows", str(args.windows), "--window", str(args.window)]
        args.forward += ["--foreign", args.foreign]
        compare(args)


if __name__ == "__main__":
    main()
