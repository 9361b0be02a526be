"""The tables of commands, in terminals of several widths."""

from io import StringIO

import pytest
from rich.console import Console

from mqserve.broker.jobs import JobFacts, JobRecord, JobState
from mqserve.commands.jobs import table_of
from mqserve.commands.status_table import print_table

IDS = ["0123456789abcdef0123456789abcdef", "order-" + "7" * 60]


def shown(width: int, *, is_terminal: bool = True) -> str:
    console = Console(width=width, force_terminal=is_terminal, color_system=None, file=StringIO())
    facts = JobFacts("resize", "pictures-of-the-whole-year", created_ms=1_700_000_000_000, tag="a long tag of several words")
    print_table(
        console, table_of(console, [JobRecord(job_id, facts, JobState.SUCCEEDED) for job_id in IDS[: 1 if width < 100 else 2]], 100)
    )
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 240])
def test_ids_and_states_stand_in_one_piece(width: int) -> None:
    text = shown(width)
    assert IDS[0] in text and "succeeded" in text
    if width >= 100:
        assert IDS[1] in text


def test_a_narrow_terminal_shows_fewer_columns_and_no_longer_lines() -> None:
    narrow, wide = shown(80), shown(240)
    assert "created" in wide and "runs" in wide and "runs" not in narrow
    assert all(len(line.rstrip()) <= 80 for line in narrow.splitlines())


def test_a_pipe_gets_every_column_and_a_line_for_each_row() -> None:
    text = shown(60, is_terminal=False)
    assert "created" in text and "runs" in text and "2023-11-14 22:13:20 UTC" in text
