"""README and docs: tables say what the result files hold, links lead somewhere, and what a page names exists.

A table that shows measurements has a comment above it that names its result files:

    <!-- FILE: DETAIL -->        or        <!-- FILE, FILE -->        or        <!-- by hand -->

Labels of rows and columns are the keys of the result file, where "minisp" stands for the file's "ours". Every cell is
computed from the file and compared.
"""

import ast
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer

from minisp import errors, fast
from minisp.cli.app import app
from minisp.config import MinifyConfig, split_options
from tests.test_imports import ROWS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Pages of arithmetic: nothing on them was measured.
DERIVED = ("derived-solver", "gpu_budgets")
BY_HAND = "by hand"
# Keys of minify_cpu's contenders by the domain that they were measured on.
MEASURED_ON = {"text": "perplexity", "documentation": "foreign_perplexity"}

Data = dict[str, Any]
Cells = dict[tuple[str, str], str]
"""(label of the row, label of the column) → what the cell has to say."""


@dataclass(frozen=True)
class Table:
    """A Markdown table: the comment above it, labels of columns, and rows, each of which begins with its label."""

    marker: str | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(text: str) -> Iterator[Table]:
    """The tables of a page, in order."""
    lines = text.splitlines()
    for place, line in enumerate(lines):
        if re.fullmatch(r"\|(:?-+:?\|)+", line.replace(" ", "")):
            above = next((past for past in reversed(lines[: place - 1]) if past.strip()), "")
            marker = re.fullmatch(r"<!-- (.*) -->", above)
            end = next((i for i in range(place, len(lines)) if not lines[i].startswith("|")), len(lines))
            columns, *rows = (_cells(row) for row in [lines[place - 1], *lines[place + 1 : end]])
            yield Table(marker[1] if marker else None, columns, rows)


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|").strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def expected(table: Table) -> Cells:
    """What the cells of a marked table have to say, by the result files that its marker names."""
    names, _, detail = (table.marker or "").partition(": ")
    files = [json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8")) for name in names.split(", ")]
    makers: dict[str, Callable[..., Cells]] = {
        "quality": _by_method,
        "peers": _by_method,
        "ablation": _ideas,
        "blend": _ideas,
        "minify_cpu": _contenders,
        "memory": _limits,
        "crash": _kills,
        "ridge": _solves,
    }
    maker = next(maker for kind, maker in makers.items() if names.startswith(f"{kind}_"))
    return maker(table, files, detail)


def differences(table: Table) -> list[str]:
    """The cells of a marked table that say something else than its result files."""
    known = expected(table)
    found = []
    for label, *cells in table.rows:
        for column, cell in zip(table.columns[1:], cells, strict=True):
            wanted = known.get((label, column), "nothing")
            if cell != wanted:
                found.append(f"{label}, {column}: {cell}, but {table.marker} holds {wanted}")
    return found


def _by_method(table: Table, files: Sequence[Data], detail: str) -> Cells:
    """Methods against the share kept, a ratio for each domain of `detail`; or, of one method, that share by domain."""
    (data,) = files
    dense = data["dense"].get("perplexity", data["dense"])
    rows = {tuple(key.split("% ", 1)): row["perplexity"] for key, row in data["rows"].items() if "error" not in row}
    if any(method == detail for _, method in rows):
        named = {column.lower().replace(" ", "_"): column for column in table.columns[1:]}
        return {
            (f"{keep} %", named[domain]): _ratio(found[domain] / dense[domain])
            for (keep, method), found in rows.items()
            for domain in named
            if method == detail
        }
    return {
        (method, f"{keep} %"): " · ".join(_ratio(found[domain] / dense[domain]) for domain in detail.split(" · "))
        for (keep, method), found in rows.items()
    }


def _ideas(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    share, domains = re.match(r"\d+ %", table.columns[0])[0], table.columns[1]  # type: ignore[index]
    return {
        (key.removeprefix(f"{share.replace(' ', '')} "), domains): " · ".join(
            _ratio(row[domain] / data["dense"][domain]) for domain in domains.split(" · ")
        )
        for key, row in data["rows"].items()
    }


def _contenders(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    middle = statistics.median
    base = min(
        (one for one in data["contenders"] if one["name"].startswith("naive")),
        key=lambda one: middle(one["minify_seconds"]),
        default=None,
    )
    cells: Cells = {}
    for one in data["contenders"]:
        seconds, peak = one["minify_seconds"], middle(one["peak_rss_bytes"])
        shown = {"minify, seconds": _spread(seconds, 1), "peak of the process": f"{peak / 1e9:.2f} GB"}
        domains = table.columns[1].split(" · ")
        keys = [MEASURED_ON[domain] for domain in domains]
        shown[table.columns[1]] = " · ".join(_ratio(one[key] / data[f"dense_{key}"]) for key in keys)
        if base is not None:
            shown["speed"] = f"×{middle(base['minify_seconds']) / middle(seconds):.2f}"
            shown["memory"] = f"{peak / middle(base['peak_rss_bytes']):.2f}"
        cells |= {(one["name"].replace("ours", "minisp"), column): cell for column, cell in shown.items()}
    return cells


def _limits(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    if detail:
        return {(name, table.columns[1]): _spread(found, 1) for name, found in data[detail]["seconds"].items()}
    cells: Cells = {}
    for run in data["limits"]:
        shown = {
            "planned": f"{run['planned_bytes'] / 1e9:.2f} GB",
            "peak of the process": f"{run['peak_bytes'] / 1e9:.2f} GB",
            "segments": f"{run['segments']}",
            "seconds": f"{run['wall_seconds']:.0f}",
        }
        cells |= {(run["limit"] if run["limit_bytes"] else "none", column): cell for column, cell in shown.items()}
    return cells


def _kills(table: Table, files: Sequence[Data], detail: str) -> Cells:
    (data,) = files
    parts = {name: part for name, part in data.items() if isinstance(part, dict) and "kills" in part}
    columns = {"killed": "kills", "of these, resumed from records": "resumed"}
    return {(name, column): str(part[key]) for name, part in parts.items() for column, key in columns.items()}


def _solves(table: Table, files: Sequence[Data], detail: str) -> Cells:
    found = {
        (f"{solve['n']}, {solve['d']}, {solve['dtype']}", solve["name"].replace("ours", "minisp")): solve
        for data in files
        for solve in data["solves"]
    }
    cells: Cells = {}
    for (size, name), solve in found.items():
        base = statistics.median(found[size, "torch cholesky"]["seconds"])
        cells[size, f"speed, {name}"] = f"×{base / statistics.median(solve['seconds']):.2f}"
        cells[size, f"memory, {name}"] = f"{solve['extra_bytes'] / solve['gram_bytes']:.2f}"
    return cells


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def marked() -> list[Any]:
    """Every table that names its result files, with the page that it stands on."""
    found = [(page, table) for page in PAGES for table in tables(page.read_text("utf-8")) if table.marker]
    return [pytest.param(table, id=f"{page.name}: {table.marker}") for page, table in found if table.marker != BY_HAND]


@pytest.mark.parametrize("table", marked())
def test_a_table_says_what_its_result_file_holds(table: Table) -> None:
    assert table.rows and not differences(table)


@pytest.mark.parametrize("table", marked())
def test_whoever_edits_a_figure_is_told(table: Table) -> None:
    def bumped(cells: Sequence[str], place: int) -> list[str]:
        edited = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), cells[place], count=1)
        return [*cells[:place], edited, *cells[place + 1 :]]

    places = [(i, j) for i, row in enumerate(table.rows) for j, cell in enumerate(row) if re.search(r"\d", cell)]
    assert places
    for i, j in places:
        rows = [*table.rows[:i], bumped(table.rows[i], j), *table.rows[i + 1 :]]
        assert differences(replace(table, rows=rows)), (table.rows[i], j)


def test_the_tables_are_found() -> None:
    assert len(marked()) >= 10
    (table,) = tables("text\n\n<!-- a_b: c -->\n\n| x | y |\n|---|---:|\n| **1** | a \\| b |\n\ntext\n")
    assert table == Table("a_b: c", ["x", "y"], [["1", "a | b"]])


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in DERIVED], ids=lambda page: page.name)
def test_figures_stand_only_in_tables_that_name_their_source(page: Path) -> None:
    for table in tables(page.read_text("utf-8")):
        measured = any(re.search(r"\d\.\d", cell) for row in table.rows for cell in row)
        assert table.marker or not measured, table.rows[0]


def test_the_readme_is_for_newcomers() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 120
    assert text.count("](benchmarks/results/") == 1 and len([t for t in tables(text) if t.marker]) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.is_file() and ROOT in file.parents, target
        assert not anchor or anchor in _anchors(file), f"{target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_map_names_every_folder() -> None:
    rows = next(table for table in tables(README.read_text("utf-8")) if table.columns[0] == "folder").rows
    named = [folder.strip("`") for folder, _ in rows]
    package = {f"minisp/{path.parent.name}/" for path in (ROOT / "minisp").glob("*/__init__.py")}
    assert len(named) == len(set(named))
    assert set(named) == {"minisp/", "benchmarks/", "csrc/", "docs/", "kernels/", "tests/"} | package


def test_the_design_page_has_the_rows_of_the_import_test() -> None:
    text = (ROOT / "docs/design.md").read_text("utf-8")
    rows = next(table for table in tables(text) if table.columns[1] == "in `minisp/`").rows
    assert tuple(tuple(re.findall(r"`(\w+)`", row[1])) for row in rows) == ROWS


def test_the_family_page_shows_a_row_as_it_is() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-a-family.md").read_text("utf-8"), re.DOTALL)
    assert shown in (ROOT / "minisp/models/families.py").read_text("utf-8")


def test_the_exit_codes_are_those_that_are_returned() -> None:
    text = (ROOT / "docs/running.md").read_text("utf-8")
    rows = next(table for table in tables(text) if table.columns[0] == "exit code").rows
    raised = {error.exit_code for error in vars(errors).values() if isinstance(error, type)}
    assert {int(code) for code, _ in rows} == raised | {0, 1, 2, 130}


def code(page: Path) -> list[str]:
    """The pieces of a page that are set as code: lines of blocks, and what stands between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`]+)`", rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    of = {
        name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        for name, command in COMMANDS.items()
    }
    every = {"--help"}.union(*of.values())
    for piece in code(page):
        called = re.search(rf"\bminisp ({'|'.join(COMMANDS)})\b(.*)", piece.partition("#")[0])
        if called:
            assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", called[2])) <= of[called[1]] | {"--help"}, piece
        elif re.match(r"--?[a-z]", piece):
            assert piece.split()[0] in every, piece
        elif option := re.fullmatch(r"(\w+)=(\"[^\"]*\"|-?[\d.e-]+)", piece):
            split_options(**{option[1]: ast.literal_eval(option[2])})


def test_the_pages_name_options_to_check() -> None:
    pieces = [piece for page in PAGES for piece in code(page)]
    assert any(piece.startswith("minisp minify ") for piece in pieces)
    assert "--resume" in pieces and 'widths="uniform"' in pieces
    names = {field.name for field in fields(MinifyConfig)}
    assert names >= {piece.partition("=")[0] for piece in pieces if re.fullmatch(r"(\w+)=\"[^\"]*\"", piece)}


@pytest.mark.parametrize("page", [README, ROOT / "docs/running.md"], ids=lambda page: page.name)
def test_python_that_a_page_shows_can_be_read_and_imported(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "minisp.fast":
                assert {alias.name for alias in node.names} <= set(fast.__all__)
