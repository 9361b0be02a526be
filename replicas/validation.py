"""Finds out whether a validation error is about the request's own data: then the caller gets 422, as from FastAPI, rather than 500.

A handler may validate anything, its own configuration too, and pydantic and msgspec do not say whose data they refused. But both
name the place of the error, and pydantic also the value there, so this module looks for that place in the request's data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import pydantic

MAX_PLACES = 10_000  # searched at most: a body may have millions
MAX_ERRORS = 20  # shown to the caller at most
_ANY = "..."  # msgspec does not name the key of a dict
_AT = re.compile(r" - at `\$(.*)`$")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_GOT, _MISSING = re.compile(r"got `(\w+)`"), re.compile(r"missing required field `(.+?)`")

Data = Callable[[], Mapping[str, Any]]
"""Returns the request's data by the name under which a caller knows it: body, query parameters, path parameters."""


class Invalid(NamedTuple):
    """One error in the data: its place, its message, and the library's name for its kind."""

    loc: tuple[str | int, ...]
    msg: str
    type: str


def find_invalid(error: BaseException, data: Data) -> list[Invalid]:
    """Returns the errors in the request's own data. Returns none if `error` is no validation error, or is about other data."""
    if isinstance(error, pydantic.ValidationError):
        return _from_pydantic(error, data())
    if isinstance(error, msgspec.ValidationError):
        return _from_msgspec(str(error), data())
    return []


def _from_pydantic(error: pydantic.ValidationError, data: Mapping[str, Any]) -> list[Invalid]:
    found = error.errors(include_url=False, include_context=False)
    for name, root in data.items():
        if all(_is_pydantics(one["loc"], one["type"], one["input"], root) for one in found[:MAX_ERRORS]):
            return [Invalid((name, *one["loc"]), one["msg"], one["type"]) for one in found[:MAX_ERRORS]]
    return []


def _is_pydantics(loc: Sequence[str | int], kind: str, refused: Any, root: Any) -> bool:
    steps = loc[:-1] if kind == "missing" else loc  # for a missing field pydantic shows its parent
    return any(_equal(value, refused) for place in _places(root) for value in _at(place, steps))


def _from_msgspec(message: str, data: Mapping[str, Any]) -> list[Invalid]:
    at = _AT.search(message)
    steps = [int(index) if index.isdigit() else name or _ANY for name, index in _STEP.findall(at[1])] if at else []
    for name, root in data.items():
        if any(_is_msgspecs(message, value) for place in _places(root) for value in _at(place, steps)):
            return [Invalid((name, *steps), message.partition(" - at ")[0], "validation_error")]
    return []


def _is_msgspecs(message: str, value: Any) -> bool:
    if missing := _MISSING.search(message):
        return isinstance(value, dict) and missing[1] not in value
    if got := _GOT.search(message):
        return _type_name(value) == got[1]
    return True


def _type_name(value: Any) -> str:
    names = ((bool, "bool"), (int, "int"), (float, "float"), (str, "str"), (bytes, "bytes"), (Mapping, "object"), (list | tuple, "array"))
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def _places(root: Any) -> Iterator[Any]:
    """Iterates over the root and every dict and list in it, since a handler may have validated a part."""
    return islice(_all_places(root), MAX_PLACES)


def _all_places(root: Any) -> Iterator[Any]:
    waiting = [root]
    while waiting:
        place = waiting.pop()
        yield place
        inner: Iterable[Any] = place.values() if isinstance(place, Mapping) else place if isinstance(place, list) else ()
        waiting.extend(value for value in inner if isinstance(value, Mapping | list))


def _at(place: Any, steps: Sequence[str | int]) -> list[Any]:
    """Returns the values at the end of the steps; several if a step may be any key. pydantic's steps also name members of unions, so a
    named step that leads nowhere is skipped: the caller still compares the value found with the refused one."""
    values = [place]
    for step in steps:
        values = [inner for value in values for inner in _step(value, step)]
    return values


def _step(value: Any, step: str | int) -> list[Any]:
    if step == _ANY:
        return list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, list) else []
    try:
        return [value[step]] if isinstance(value, Mapping | list) else []  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return [value] if isinstance(step, str) else []


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
