"""Measurements as a person sees them: a table, and lines that say how its figures came about."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from minisp.evaluate.measure import Comparison, Measurement
from minisp.evaluate.speed import Ratio
from minisp.units import megabytes, millions


def measurement_table(name: str, measured: Measurement) -> Table:
    """One model."""
    table = Table(title="Measured", title_justify="left")
    table.add_column("")
    table.add_column(escape(name), justify="right")
    for label, (value,), shown in _rows([measured]):
        table.add_row(label, shown(value))
    for kind, (words,) in _speeds([measured]):
        table.add_row(f"{kind} tokens/s", words)
    return table


def comparison_table(title: str, names: Sequence[str], *compared: Comparison) -> Table:
    """Models side by side, with ratios of each to the first: of speed, medians with their intervals.

    Args:
        names: of the first model, and of the second one of each comparison.
        compared: one model beside each of the others.
    """
    table = Table(title=title, title_justify="left")
    for name in ("", names[0], *(column for other in names[1:] for column in (other, "ratio"))):
        table.add_column(escape(name), justify="right" if name else "left")
    every = [compared[0].first, *(one.second for one in compared)]
    for label, (first, *others), shown in _rows(every):
        cells = [(shown(other), f"{other / first:.3f}" if first else "") for other in others]
        table.add_row(label, shown(first), *(cell for pair in cells for cell in pair))
    if len(texts := compared[0].first.perplexity) > 1:
        means = [cell for one in compared for cell in ("", f"{one.perplexity_ratio():.3f}")]
        table.add_row(f"perplexity ratio, geometric mean of {len(texts)} texts", "", *means)
    for kind, (first, *others) in _speeds(every):
        ratios = [ratio_words(one.ratios[kind]) for one in compared]
        table.add_row(f"{kind} tokens/s", first, *(x for pair in zip(others, ratios, strict=True) for x in pair))
    return table


def ratio_words(ratio: Ratio) -> str:
    """A ratio of speeds in a cell: ×1.12 (1.05–1.18), or that it is within noise."""
    found = f"×{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
    return f"{found}\nwithin noise" if ratio.within_noise else found


def protocol_lines(measured: Measurement) -> list[str]:
    """How the figures came about, as run: one line per text, one for the speed."""
    lines = [
        f"perplexity, {name}: {p.num_tokens:,} tokens scored in {p.num_windows} windows of {p.window}, stride "
        f"{p.stride}, from the start of the text, computed in {measured.dtype}, loss in float32"
        for name, p in measured.perplexity.items()
    ]
    lines += [
        f"right continuations, {name}: {c.num_questions} questions, {c.num_answers} answers of {c.continuation} tokens "
        f"after {c.context}; chance gives {1 / c.num_answers:.0%}, standard error {c.standard_error:.1%}"
        for name, c in measured.choices.items()
    ]
    if (speed := measured.throughput) is not None:
        lines.append(
            f"tokens/s: median (slowest–fastest) of {speed.turns} turns, batch {speed.batch}, prompt of "
            f"{speed.prompt_tokens} tokens, {speed.new_tokens} new ones, {measured.dtype} on {measured.device}"
        )
    return lines


def comparison_lines(*compared: Comparison) -> list[str]:
    """How the figures of several models came about."""
    last = compared[-1]
    lines = protocol_lines(last.second)
    if last.ratios:
        where = f"{'all' if len(compared) > 1 else 'both'} in memory"
        if not last.together:
            where = f"each loaded anew for its turn, for {'all' if len(compared) > 1 else 'both'} do not fit"
        pairs = last.ratios["decode"].pairs
        lines.append(
            f"speed ratio: median of {pairs} pairs of neighbouring turns, {where} (95 % interval of that median, by "
            "the sign test); within noise where 1 lies inside"
        )
    return lines


def _rows(measured: Sequence[Measurement]) -> Iterator[tuple[str, list[Any], Callable[[Any], str]]]:
    """Label, the value of each model, and how it is shown."""
    yield "parameters", [m.parameters for m in measured], millions
    yield "bytes on disk", [m.bytes for m in measured], megabytes
    for text in measured[0].perplexity:
        yield escape(f"perplexity, {text}"), [m.perplexity[text].value for m in measured], "{:.2f}".format
    for text in measured[0].choices:
        label = escape(f"right continuations, {text}")
        yield label, [m.choices[text].accuracy for m in measured], "{:.0%}".format


def _speeds(measured: Sequence[Measurement]) -> Iterator[tuple[str, list[str]]]:
    """Prefill and decode, and each model's tokens per second in words."""
    speeds = [m.throughput for m in measured if m.throughput is not None]
    if len(speeds) == len(measured):
        yield "prefill", [_speed_words(s.prefill_tokens_per_second, s.prefill_range) for s in speeds]
        yield "decode", [_speed_words(s.decode_tokens_per_second, s.decode_range) for s in speeds]


def _speed_words(median: float, reach: tuple[float, float]) -> str:
    digits = 1 if median < 100 else 0
    return f"{median:,.{digits}f} ({reach[0]:,.{digits}f}–{reach[1]:,.{digits}f})"
