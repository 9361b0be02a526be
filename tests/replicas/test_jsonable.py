"""Results to JSON: one rule, wherever a value stands."""

import collections
import dataclasses
import datetime
import decimal
import enum
import http
import json
import uuid
from typing import Any

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqserve.replicas.jsonable import to_json


class Name(str):
    pass


class Count(int):
    pass


class Score(float):
    pass


class Table(dict[Any, Any]):
    pass


class Stamp(datetime.datetime):
    pass


class Amount(decimal.Decimal):
    pass


class Color(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    LARGE = 3


@dataclasses.dataclass
class Row:
    value: Any


class Struct(msgspec.Struct, rename="camel"):
    the_value: Any


class Model(pydantic.BaseModel):
    value: Any


Pair = collections.namedtuple("Pair", "one two")
UTC = datetime.UTC
ONE = uuid.UUID(int=1)

CASES: list[tuple[Any, Any]] = [
    (Name("a"), "a"),
    (Count(3), 3),
    (Score(2.5), 2.5),
    (Table(a=1), {"a": 1}),
    (collections.OrderedDict(a=1), {"a": 1}),
    (http.HTTPStatus.OK, 200),
    (Color.RED, "red"),
    (Size.LARGE, 3),
    (Stamp(2020, 1, 1), "2020-01-01T00:00:00"),
    (datetime.datetime(2020, 1, 1, tzinfo=UTC), "2020-01-01T00:00:00Z"),
    (datetime.date(2020, 1, 1), "2020-01-01"),
    (datetime.timedelta(days=1), "P1D"),
    (Amount("1.50"), "1.50"),
    (ONE, str(ONE)),
    (b"abc", "abc"),
    (bytearray(b"abc"), "abc"),
    (memoryview(b"abc"), "abc"),
    ((1, 2), [1, 2]),
    ({3}, [3]),
    (frozenset({3}), [3]),
    (collections.deque([1]), [1]),
    (range(3), [0, 1, 2]),
    ({"a": 1}.keys(), ["a"]),
    (Pair(1, 2), [1, 2]),
    (Row(b"abc"), {"value": "abc"}),
    (Struct(b"abc"), {"theValue": "abc"}),
    (Model(value=datetime.datetime(2020, 1, 1)), {"value": "2020-01-01T00:00:00"}),
    (np.array([[1.5, 2.0]]), [[1.5, 2.0]]),
    (np.array([b"abc"]), ["abc"]),
    (np.array(["abc"]), ["abc"]),
    (np.array([Row(1), None]), [{"value": 1}, None]),
    (np.int64(3), 3),
    (np.float32(0.5), 0.5),
    (np.bool_(True), True),
    (np.datetime64("2020-01-01T00:00:00", "ns"), "2020-01-01T00:00:00"),
    (np.array(["2020-01-01", "NaT"], dtype="datetime64[D]"), ["2020-01-01T00:00:00", None]),
    (np.timedelta64(1, "D"), "P1D"),
    (ValueError("no such digit"), "no such digit"),
    (2**70, 2**70),
    (float("nan"), None),
    (float("-inf"), None),
    (np.array([np.nan, 1.0]), [None, 1.0]),
]


def case_name(value: Any) -> str:
    """Without an address, which differs in each worker of pytest-xdist."""
    return f"{type(value).__name__}-{value!s:.20}".partition(" at 0x")[0]


@pytest.mark.parametrize(("value", "plain"), CASES, ids=case_name)
def test_a_value_is_the_same_json_wherever_it_stands(value: Any, plain: Any) -> None:
    for stands_in, expected in (
        (value, plain),
        ([value], [plain]),
        ({"key": value}, {"key": plain}),
        (({"key": [value]},), [{"key": [plain]}]),
        (Row(value), {"value": plain}),
        (Row({"key": (value,)}), {"value": {"key": [plain]}}),
        (Struct(value), {"theValue": plain}),
        (collections.deque([value]), [plain]),
    ):
        assert json.loads(to_json(stands_in)) == expected


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("a", "a"), (Name("a"), "a"), (None, "null"), (True, "true"), (False, "false"), (1, "1"), (Count(1), "1"), (1.5, "1.5"),
        (b"a", "a"), (Color.RED, "red"), (Size.LARGE, "3"), (ONE, str(ONE)), (datetime.date(2020, 1, 1), "2020-01-01"), (np.int64(1), "1"),
    ],
)  # fmt: skip
def test_keys_are_text_as_json_dumps_has_it(key: Any, text: str) -> None:
    assert json.loads(to_json({key: 1})) == {text: 1}
    assert json.loads(to_json(Row([{key: 1}]))) == {"value": [{text: 1}]}


@pytest.mark.parametrize("value", [object(), 1j, {(1, 2): 3}, len, Row, np.array([1j])], ids=case_name)
def test_what_has_no_json_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="there is no JSON for"):
        to_json([value])


def test_bytes_that_are_no_text_are_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="return them alone, or as base64"):
        to_json({"image": b"\xff"})


def test_a_cycle_is_an_error_and_not_for_ever() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(RecursionError):
        to_json(cycle)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4),
    max_leaves=20,
)


@given(value=plain)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    assert json.loads(to_json(value)) == value
    assert json.loads(to_json([value, b""])) == [value, ""]  # by the long way, which bytes need
