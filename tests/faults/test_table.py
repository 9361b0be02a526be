"""Every row of docs/reliability.md has its test: one that begins with `test_row_<number>_`, or a file of its own."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROWS = range(1, 30)
OWN_FILES = {13: "test_controllers.py", 26: "test_drain.py"}  # two controllers; rolling updates


@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_its_test(row: int) -> None:
    name = OWN_FILES.get(row)
    files = [FOLDER / name] if name else FOLDER.glob("test_*.py")
    definition = "def test_" if name else f"def test_row_{row:02}_"
    assert any(definition in path.read_text() for path in files)
