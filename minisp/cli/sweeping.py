"""`minisp sweep`: several ratios from one calibration."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from minisp.cli.arguments import Json, Model, Quiet
from minisp.cli.calibration import Sources, sources_of
from minisp.cli.console import errors, show
from minisp.cli.options import with_config_options
from minisp.cli.results import TEXT_HELP, MaxWindows, Speed

OWN = ("keep", "target_size", "target_params", "method", "pattern", "shots", "gradient_damping", "scratch", "reuse")
GATE_HELP = (
    "Choose the smallest ratio whose perplexity over that of the dense model, the geometric mean over all texts, is at "
    "most this. The first half of each text chooses, the second has to confirm. Exit code 11 where none holds."
)


@partial(with_config_options, without=(*OWN, "resume"))
def sweep(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for all results; new, or that of a sweep that was stopped.")],
    text: Annotated[list[Path], typer.Option(help=TEXT_HELP, show_default=False)],
    keep: Annotated[
        list[float] | None,
        typer.Option(help="A share to keep, in (0, 1). Repeat it for the ladder. Default: 0.9, 0.8, 0.7, 0.6, 0.5."),
    ] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help=GATE_HELP)] = None,
    calibration: Sources = None,
    window_of_text: Annotated[int, typer.Option(min=2, help="Tokens per window that is measured.")] = 1024,
    max_windows: MaxWindows = 20,
    speed: Speed = False,
    as_json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Minify at several ratios from one calibration, and measure all of them: table, CSV, figure, JSON."""
    from minisp import frontier
    from minisp.evaluate.measure import Protocol
    from minisp.report.progress import progress_bar
    from minisp.text.corpora import load_texts

    console = Console(stderr=True, quiet=quiet or as_json)
    with errors(lambda: f"What was finished stays in {out}: the same command goes on from there."):
        keeps = keep or frontier.KEEPS
        ladder = ", ".join(f"{share:g}" for share in keeps)
        console.print(f"Plan: one sweep over the calibration text; for each of keep {ladder} a selection and a refit,")
        console.print(f"written to {out}/keep-…; then {len(keeps) + 1} models measured on {len(text)} text(s)")
        protocol = Protocol(window=window_of_text, max_windows=max_windows)
        with progress_bar(quiet, lines=not as_json) as progress:
            found = frontier.sweep(
                model,
                out=out,
                texts=load_texts(text),
                keeps=keeps,
                gate=max_ppl_ratio,
                calibration=sources_of(calibration),
                progress=progress,
                protocol=protocol,
                speed=speed,
                **options,
            )
    lines = [f"written to {out}: keep-… folders, {', '.join(frontier.FILES)}"]
    if found.chosen is not None:
        lines.append(f"chosen: {found.chosen.folder} ({found.chosen.ratio:.3f}; confirmed with {found.confirmed:.3f})")
    show(found.as_dict(), as_json, quiet, found.table(), lines)
