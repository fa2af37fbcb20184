"""README and docs: tables say what the result files hold, links lead somewhere, and what a page names exists."""

import ast
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import typer

from minisp import errors, fast
from minisp.cli.app import app
from minisp.config import MinifyConfig, split_options
from tests.pages import ROOT, Table, differences, tables
from tests.test_imports import ROWS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Pages of arithmetic: nothing on them was measured.
DERIVED = ("derived-solver", "gpu_budgets", "surgeon-math")
BY_HAND = "by hand"


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
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-a-family.md").read_text("utf-8"), re.DOTALL)
    rows = (ROOT / "minisp/models/families.py").read_text("utf-8")
    assert len(shown) == 2 and indent(shown[0].rstrip(), "    ") in rows and shown[1].rstrip() in rows


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    folders = "benchmarks|csrc|docs|kernels|minisp|tests"
    for piece in code(page):
        for path in re.findall(rf"(?:^|\s)((?:{folders})/[\w./-]*)", piece):
            assert (ROOT / path).exists(), path


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
