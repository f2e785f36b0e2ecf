"""docs/features.md: every row of the handbook once, with files and tests that exist."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features.md"
SECTIONS = {"A": 8, "B": 13, "C": 9, "D": 8, "E": 4, "F": 6, "G": 8, "H": 4}
ROWS = [f"{letter}{number}" for letter, last in SECTIONS.items() for number in range(1, last + 1)]
STATUSES = ("works", "partly", "missing")
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Row:
    name: str
    section: str
    what: str
    files: list[str]
    tests: list[str]
    status: str
    remark: str


def rows_of(page: str) -> list[Row]:
    """The lines of every table; a status is its word and, after a colon, what is there."""
    found = []
    section = ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if not re.match(r"\|\s*[A-H]\d+\s*\|", line):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == 5, line
        name, what, files, tests, status = cells
        word, _, remark = status.partition(":")
        found.append(Row(name, section, what, CODE.findall(files), CODE.findall(tests), word, remark.strip()))
    return found


def names_in(path: Path) -> set[str]:
    """Test functions and classes at the top of a file, and the methods of the classes as `Class::test`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


DOCUMENTED = rows_of(PAGE.read_text(encoding="utf-8"))
each_row = pytest.mark.parametrize("row", DOCUMENTED, ids=lambda row: row.name)


def test_every_row_appears_exactly_once_in_order():
    assert len(ROWS) == 60
    assert [row.name for row in DOCUMENTED] == ROWS


@each_row
def test_a_row_is_complete(row):
    assert row.section.startswith(f"{row.name[0]}."), f"{row.name} stands in section {row.section!r}"
    assert row.what
    assert row.status in STATUSES
    assert bool(row.remark) == (row.status == "partly"), "partly says what is there, the other two say nothing"
    if row.status == "missing":
        assert not row.files and not row.tests
    else:
        assert row.files and row.tests


@each_row
def test_named_files_exist(row):
    for name in row.files:
        assert name.startswith(("vlmtune/", "benchmarks/")), f"{name}: a path from the root of the repository"
        assert (ROOT / name).is_file(), f"{name} does not exist"


@each_row
def test_named_tests_exist(row):
    for name in row.tests:
        file, _, function = name.partition("::")
        path = ROOT / file
        assert re.fullmatch(r"tests/.*/test_\w+\.py", file) and path.is_file(), f"{file} is not a test file"
        names = names_in(path)
        if function:
            leaf = function.rpartition("::")[2]
            assert function in names and leaf.startswith(("test_", "Test")), f"{file} has no test {function}"
        else:
            assert any("test_" in name for name in names), f"{file} holds no test"
