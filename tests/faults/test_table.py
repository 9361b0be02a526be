"""Every row of docs/reliability.md has its tests: those that carry its number as a marker."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.instances import ROOT

DOCUMENTED = [int(number) for number in re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)]


def rows_of(source: str) -> Iterator[int]:
    """The numbers of a file's `pytest.mark.row(number)`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="mark"), attr="row"), args=[ast.Constant(value=int(number))]):
                yield number


def test_the_table_numbers_its_rows_without_a_gap() -> None:
    assert list(range(1, len(DOCUMENTED) + 1)) == DOCUMENTED


def test_each_row_has_its_tests_and_each_marker_its_row() -> None:
    tested = {row for path in (ROOT / "tests").rglob("test_*.py") for row in rows_of(path.read_text())}
    assert tested == set(DOCUMENTED)


@pytest.mark.parametrize("source", ["@pytest.mark.row(9)\ndef test_it(): ...", "pytestmark = [distributed_only, pytest.mark.row(9)]"])
def test_a_marker_is_found_on_a_test_and_on_a_module(source: str) -> None:
    assert list(rows_of(source)) == [9]
