"""How every command ends: results on standard output, expected failures as one paragraph and an exit code."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minisp.errors import MinispError


def show(values: dict[str, Any], as_json: bool, quiet: bool, table: Table, lines: Sequence[str]) -> None:
    """Results go to standard output: JSON for programs, or a table and a few lines for people."""
    if as_json:
        print(json.dumps(_finite(values), indent=2, default=str, allow_nan=False))
    elif not quiet:
        console = Console()
        console.print(table)
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _finite(value: Any) -> Any:
    """JSON has no word for infinity and NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def errors(interrupted: Callable[[], str] = str) -> Iterator[None]:
    """Expected failures become one paragraph on standard error and an exit code; warnings lose their source line.

    Args:
        interrupted: gives what to say after "Interrupted.".
    """
    console = Console(stderr=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: console.print(
            f"[yellow]note:[/] {escape(printable(str(message)))}", highlight=False
        )
        try:
            yield
        except MinispError as error:
            # Of the processes that torchrun starts, each may fail for a reason of its own.
            where = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
            console.print(f"[bold red]{type(error).__name__}[/]{where}", highlight=False)
            console.print(printable(str(error)), markup=False, highlight=False)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            lost = "Another process of the run was lost, or someone ended it. " if "RANK" in os.environ else ""
            console.print(f"Interrupted. {lost}{interrupted()}".strip(), highlight=False)
            raise typer.Exit(130) from None


def printable(text: str) -> str:
    """Control characters written out: a message quotes names from files that may be hostile to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
