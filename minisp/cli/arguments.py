"""Arguments and options that several commands have."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or a .gguf file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no tables.")]
