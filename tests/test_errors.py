"""What users may catch is exported, and stands in one table: docs/guide/errors.md."""

import re
from pathlib import Path

import pytest

import mqserve as serve

PAGE = (Path(__file__).parent.parent / "docs" / "guide" / "errors.md").read_text()
ROWS = re.findall(r"^\| (· )?`(\w+)` \| (\d+) \| .+? \| (?:`(\w+)` )?\|$", PAGE, re.MULTILINE)
CLASSES = {name: getattr(serve, name) for name in serve.__all__ if isinstance(getattr(serve, name), type)}
EXPORTED = {name for name, kind in CLASSES.items() if issubclass(kind, serve.MQServeError)}
PYTHONS = {"ValueError": ValueError, "TypeError": TypeError, "KeyError": KeyError, "TimeoutError": TimeoutError}


def test_every_error_that_is_exported_is_in_the_table_and_the_other_way_round() -> None:
    assert {name for _, name, _, _ in ROWS} == EXPORTED
    assert len(ROWS) == len(EXPORTED)


@pytest.mark.parametrize(("indented", "name", "status", "also"), ROWS, ids=[name for _, name, _, _ in ROWS])
def test_the_table_says_what_a_class_is(indented: str, name: str, status: str, also: str) -> None:
    kind = getattr(serve, name)
    error = kind("words")
    assert error.status == int(status)
    pythons = [python for python in PYTHONS.values() if issubclass(kind, python) and not (python is ValueError and indented)]
    assert also in ("", *PYTHONS) and (not also or issubclass(kind, PYTHONS[also]))
    assert indented or bool(also) == bool(pythons), pythons


def test_what_is_indented_is_of_the_class_above_it() -> None:
    above = serve.MQServeError
    for indented, name, _, _ in ROWS[1:]:
        kind = getattr(serve, name)
        assert kind.__mro__[1] is (above if indented else serve.MQServeError), name
        above = above if indented else kind
