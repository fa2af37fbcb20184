"""minisp beside published pruners: `python benchmarks/peers.py MODEL --calibration a --text b [--neutral FOLDER]`.

Each peer runs in an environment of its own (peer_environments.py builds it, and says which packages cannot take part),
by a worker script of its own, with the best settings that its documentation gives. All get the same calibration windows
and the same budget: a share of all MLP units, to within one step of minisp's alignment per layer. Every result is
saved, read again by a fresh process of minisp's environment, and evaluated alike (peer_evaluate.py): windows of 1024
tokens of the text given, of Python's documentation and of source code, and of every file in --neutral.

`loads` is `stock` where plain transformers loads the result, `own code` where the folder brings a modelling file, `no`
where it does not load. Seconds are those of pruning, without imports, loading and saving; memory is the peak of the
whole process, and peers compute in float32. Every finished row is in benchmarks/results/peers_MACHINE.json at once, and
a run that is repeated goes on from there; a row that failed says why, and is tried again.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import peer_environments
from naive import EVALUATION
from quality import load_dense
from safetensors.torch import save_file
from texts import calibration_windows, data_arguments, evaluation_texts, measured_on
from torch import Tensor
from transformers import AutoTokenizer

from minisp.evaluate.perplexity import perplexity
from minisp.methods.selection import default_alignment

HERE = Path(__file__).parent
KEEPS = (0.9, 0.8, 0.7)
# Nats between the losses of the first window: float32 beside float32, by two versions of transformers.
SAME_LOSS = 1e-3

# Row → environment (None is minisp's own), worker, variant.
PEERS: dict[str, tuple[str | None, str, str]] = {
    "OptiPFair: static": ("optipfair", "peer_optipfair.py", "static"),
    "OptiPFair: data-driven": ("optipfair", "peer_optipfair.py", "data-driven"),
    "Torch-Pruning: Taylor, local": ("torch-pruning", "peer_torch_pruning.py", "local"),
    "Torch-Pruning: Taylor, global": ("torch-pruning", "peer_torch_pruning.py", "global"),
    "fmchisel: OSSCAR": ("fmchisel", "peer_fmchisel.py", "one by one"),
    "minisp: uniform widths": (None, "peer_minisp.py", "uniform"),
    "minisp: defaults": (None, "peer_minisp.py", "defaults"),
}


def domains(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, tuple[Tensor, int]]:
    """Domain → (tokens, windows of 1024 that are evaluated)."""
    texts = evaluation_texts(arguments, tokenizer)
    return {name: (ids, min(count, arguments.eval_windows or count)) for name, (ids, count) in texts.items()}


def check_budget(widths: list[int], keep: float, full: int) -> None:
    """Raise `SystemExit` unless the units kept are `keep` of all, to within one alignment step per layer."""
    wanted, room = keep * full * len(widths), default_alignment(full) * len(widths)
    if not abs(sum(widths) - wanted) <= room:
        raise SystemExit(
            f"Expected {wanted:.0f} ± {room} MLP units over all layers, got {sum(widths)}: rows of different budgets "
            "do not compare. Correct the worker's ratio."
        )


def dense_loss(model: Any, window: Tensor) -> float:
    """Mean loss in nats of one window (L,), which every worker reports too."""
    return math.log(perplexity(model.float(), window, window=len(window)).value)


def check_same_model(found: float | None, expected: float) -> None:
    """Raise `SystemExit` where a worker's dense model has another loss; minisp's own has none to report."""
    if found is not None and not abs(found - expected) <= SAME_LOSS:
        raise SystemExit(
            f"Expected a loss of {expected:.4f} on the first calibration window from the dense model, got {found:.4f}: "
            "the peer's version of transformers reads another model from this folder."
        )


def evaluate(folder: Path, work: Path) -> dict[str, Any]:
    """What a fresh process finds of a folder: how it loads, its parameters, its perplexity on every domain."""
    command = [HERE / "peer_evaluate.py", folder, "--texts", work / "texts.safetensors"]
    result = work / "evaluation.json"
    return harness.run_child([*command, "--window", EVALUATION[1], "--result", result], result).output


def prune(spec: dict[str, Any], python: Path | str, model: str, work: Path) -> dict[str, Any]:
    """What a peer's worker reports, its pruned model in `work`/pruned, and what its process took."""
    out, result = work / "pruned", work / "worker.json"
    shutil.rmtree(out, ignore_errors=True)
    command = [HERE / spec["worker"], "--model", model, "--windows", work / "windows.safetensors"]
    command += ["--keep", spec["keep"], "--variant", spec["variant"], "--out", out, "--scratch", work]
    run = harness.run_child([*command, "--result", result], result, python)
    # The peak of an earlier process, where its work was used again.
    peak = max(run.peak_rss, run.output.get("peak_bytes", 0))
    return {**run.output, "process_seconds": run.seconds, "peak_bytes": peak, "disturbance": run.disturbance}


def show(result: dict[str, Any]) -> None:
    """The table: ratios to the dense model by domain, cost, and whether the result loads."""
    dense = result["dense"]["perplexity"]
    rows = []
    for key, row in sorted(result["rows"].items(), key=lambda item: (-item[1]["keep"], item[1]["place"])):
        if "error" in row:
            rows.append([key, *("" for _ in dense), "", "", "", f"failed: {row['error']}"])
            continue
        ratios = [f"{row['perplexity'][domain] / value:.3f}" for domain, value in dense.items()]
        millions = f"{row['parameters'] / 1e6:.1f}"
        rows.append([key, *ratios, f"{row['seconds']:.0f}", row["peak_bytes"] >> 20, millions, row["loads"]])
    title = "Perplexity / dense (" + ", ".join(f"{domain} {value:.3f}" for domain, value in dense.items()) + ")"
    columns = ["kept, peer", *dense, "seconds", "peak MiB", "million parameters", "loads"]
    harness.print_table(title, columns, rows)


def rows_wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """(peer, keep) of everything that was asked for."""
    for keep in arguments.keep:
        for name in PEERS:
            if arguments.only is None or any(part.lower() in name.lower() for part in arguments.only):
                yield name, keep


def measure_row(
    result: dict[str, Any], spec: dict[str, Any], environment: str | None, arguments: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """One row of `result`: the worker's process, the checks, the evaluation's process."""
    try:
        python = sys.executable if environment is None else peer_environments.build(environment, arguments.cache)
        row = prune(spec, python, arguments.model, work)
        check_same_model(row.pop("first_loss", None), result["first_loss"])
        check_budget(row["widths"], spec["keep"], result["full_width"])
        row |= evaluate(work / "pruned", work)
        if environment is not None:
            result["environments"][environment] = peer_environments.versions(python)
    # What a child printed: the others go on without it, and its last line stands in the table.
    except SystemExit as failure:
        print(failure, flush=True)
        return {"error": str(failure).strip().splitlines()[-1].replace(str(Path.home()), "~")}
    shutil.rmtree(work / "pruned")
    return row


def fill(result: dict[str, Any], arguments: argparse.Namespace, work: Path, name: str) -> None:
    """Measure what is missing of the rows asked for, and write the result after each."""
    for peer, keep in rows_wanted(arguments):
        environment, worker, variant = PEERS[peer]
        packages = None if environment is None else peer_environments.described(environment)
        spec = {"keep": keep, "worker": worker, "variant": variant, "packages": packages}
        key = f"{100 * keep:.4g}% {peer}"
        before = result["rows"].get(key, {})
        if before.get("spec") == spec and "error" not in before:
            continue
        print(key, flush=True)
        row = measure_row(result, spec, environment, arguments, work)
        result["rows"][key] = {"spec": spec, "keep": keep, "place": list(PEERS).index(peer), **row}
        harness.write_json(name, result)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.set_defaults(windows=128, cache=Path.home() / ".cache/minisp/peers")
    parser.add_argument("--generic", type=float, default=0.25, help="share of generic text in them, as minify's")
    parser.add_argument("--eval-windows", type=int, help="evaluated windows of every domain at most")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS, help="shares of the units, 0.9 0.8 0.7")
    parser.add_argument("--only", nargs="+", help="parts of row names")
    return parser.parse_args()


def main() -> None:
    """Prepare what all rows share, measure the rows, print the table."""
    arguments = parse()
    name = harness.result_name("peers", arguments.label)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_dense(arguments.model)
    windows, texts = calibration_windows(arguments, tokenizer, model), domains(arguments, tokenizer)
    identity = measured_on(model, windows, texts)
    result = harness.resume_json(name, identity)
    work = arguments.cache / "work" / harness.digest([windows, *model.parameters()])
    work.mkdir(parents=True, exist_ok=True)
    save_file({"windows": windows}, work / "windows.safetensors")
    save_file(
        {domain: ids[: n * EVALUATION[1]].clone() for domain, (ids, n) in texts.items()}, work / "texts.safetensors"
    )
    if not result:
        result = {"measured on": identity, "tokens": windows.numel(), "environments": {}, "rows": {}}
        result |= {"first_loss": dense_loss(model, windows[0]), "full_width": model.config.intermediate_size}
        result["dense"] = evaluate(Path(arguments.model), work)
        harness.write_json(name, result)
    # The workers have the machine to themselves.
    del model
    fill(result, arguments, work, name)
    show(result)


if __name__ == "__main__":
    main()
