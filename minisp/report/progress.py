"""What is said while something runs: bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from minisp.phases.run import Progress as ProgressFunction

SECONDS_PER_LINE = 30.0


@contextmanager
def progress_bar(quiet: bool = False, *, lines: bool = False) -> Iterator[ProgressFunction]:
    """A progress function that draws one bar per phase on standard error, where that is a terminal.

    Args:
        quiet: show nothing.
        lines: where standard error is no terminal, print a line when a phase begins and every `SECONDS_PER_LINE`.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if quiet or not sys.stderr.isatty():
        yield _print_lines(console) if lines and not quiet else lambda phase, done, total: None
        return
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            name, _, detail = phase.partition(", ")
            if name not in tasks:
                tasks[name] = progress.add_task(escape(name), total=total)
            progress.update(tasks[name], completed=done, total=total, description=escape(f"{name} {detail}".strip()))

        yield show


def _print_lines(console: Console) -> ProgressFunction:
    """A progress function that prints plain lines; a phase is named by what stands before its first comma."""
    begun: set[str] = set()
    printed = -SECONDS_PER_LINE

    def show(phase: str, done: int, total: int) -> None:
        nonlocal printed
        name, now = phase.partition(", ")[0], time.monotonic()
        if name in begun and now - printed < SECONDS_PER_LINE:
            return
        begun.add(name)
        printed = now
        console.print(f"{phase}: {done} of {total}", markup=False, highlight=False, soft_wrap=True)

    return show
