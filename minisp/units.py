"""Counts, sizes and tables as people read them."""

from collections.abc import Sequence
from fractions import Fraction
from io import StringIO
from textwrap import wrap

from rich.console import Console
from rich.table import Table

TEXT_COLUMNS = 100


def millions(count: int) -> str:
    """A count of parameters for people: 134.5M, 7.24B."""
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"


def megabytes(size: int) -> str:
    """A size in bytes for people: 269 MB, 14.5 GB (decimal units)."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e3:,.0f} kB"


def as_text(table: Table, lines: Sequence[str] = ()) -> str:
    """A table and the lines below it as plain text of at most `TEXT_COLUMNS` columns, for `str` and `print`.

    A path longer than that keeps its line to itself, so that it can be copied.
    """
    stream = StringIO()
    # Colours and a notebook's HTML are for a console that shows itself; this one fills a string.
    console = Console(file=stream, width=TEXT_COLUMNS, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(table)
    shown = [line.rstrip() for line in stream.getvalue().splitlines()]
    for line in lines:
        shown += wrap(line, TEXT_COLUMNS, break_long_words=False, break_on_hyphens=False)
    return "\n".join(shown)


def spread(counts: Sequence[int]) -> str:
    """The range of some counts: 1,536, or 672 to 1,536."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def parse_size(text: str | int) -> int:
    """Bytes of a size such as 16GB (decimal) or 2GiB (binary); an integer is bytes already.

    Raises:
        ValueError: it is no such size.
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    # A small b would mean bits there.
    return text if isinstance(text, int) else int(convert_file_size_to_int(text.upper()))


def parse_count(text: str | int) -> int:
    """A count such as 110M, 1.1B or 350k; an integer is one already.

    Raises:
        ValueError: it is no such count.
    """
    if isinstance(text, int):
        return text
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    return round(Fraction(text[:-1] if scale > 1 else text) * scale)
