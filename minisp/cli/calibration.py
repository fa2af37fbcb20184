"""The option that names calibration text."""

from collections.abc import Sequence
from typing import Annotated

import typer

CALIBRATION_HELP = (
    "Text to calibrate on: FILE.txt, FILE.jsonl, hf:NAME, or what is at hand: builtin:code, builtin:documentation, "
    "builtin:model (written by the model itself); with a weight as FILE:0.3. Repeat it to mix sources. A share of "
    "generic text (--generic) joins it, unless it names builtin: sources. Default: generic text alone."
)
Sources = Annotated[list[str] | None, typer.Option("--calibration", "-c", help=CALIBRATION_HELP, metavar="<source>")]


def sources_of(calibration: Sequence[str] | None) -> list[tuple[str, float]] | None:
    """(name, weight) of every source that the command line names; CalibrationError where a file is not there."""
    from minisp.text.corpora import parse_source
    from minisp.text.mixture import check_sources

    if not calibration:
        return None
    sources = [parse_source(source) for source in calibration]
    check_sources(name for name, _ in sources)
    return sources
