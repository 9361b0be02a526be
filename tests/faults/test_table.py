"""Every row of docs/reliability.md has its test, by name."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROWS = range(1, 30)
NAMED = re.compile(r"def test_row_(\d\d)_", re.MULTILINE)


@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_a_test_that_names_it(row: int) -> None:
    assert row in {int(number) for path in FOLDER.glob("test_*.py") for number in NAMED.findall(path.read_text())}
