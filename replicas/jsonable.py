"""Converts results to JSON by the same rules at every depth: those of `json.dumps`, and some for types that it does not know.

Subclasses become their base type, sets become lists, keys become text. Bytes are UTF-8 text, as in the seed. NaN and infinity, which
JSON does not have, become null. Dates and times become ISO 8601, also those of numpy and pandas.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from collections import deque
from collections.abc import ItemsView, KeysView, Mapping, Set, ValuesView
from typing import Any

import msgspec
import pydantic

from ..broker.values.codecs import is_plain

_LISTS = (list, tuple, Set, deque, range, KeysView, ValuesView, ItemsView)
_TIMES = (datetime.datetime, datetime.date, datetime.time)
_LEFT = (bytes, bytearray, memoryview, *_TIMES)  # msgspec leaves fields of these types to the rules here
_encode = msgspec.json.Encoder().encode


def to_json(value: object) -> bytes:
    """Returns the value as JSON. Raises TypeError for a type that has no JSON, ValueError for bytes that are not UTF-8, RecursionError
    for too deep nesting."""
    if not is_plain(value) or _has_bytes(value):
        value = _plain(value)
    return _encode(value)


def _has_bytes(value: object) -> bool:
    """Whether a plain value contains bytes, which MessagePack has and JSON does not."""
    if type(value) is dict:
        return any(map(_has_bytes, value.values()))
    if type(value) is list:
        return any(map(_has_bytes, value))
    return type(value) is bytes


def _plain(value: Any) -> Any:
    """Converts the value to None, bool, int, float, str, lists and dicts."""
    match value:
        case None | bool():
            return value
        case enum.Enum():
            return _plain(value.value)
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case bytes() | bytearray() | memoryview():
            return _text(value)
        case dict() | Mapping():
            return {_key(key): _plain(item) for key, item in value.items()}
        case _ if isinstance(value, _LISTS):
            return [_plain(item) for item in value]
        case _ if isinstance(value, _TIMES):
            return value.isoformat().replace("+00:00", "Z") if value == value else None  # pandas' NaT is unequal to itself
        case decimal.Decimal() | uuid.UUID():
            return str(value)
        case _:
            return _plain_object(value)


def _plain_object(value: Any) -> Any:
    if isinstance(value, pydantic.BaseModel):
        return _plain(value.model_dump(mode="json"))
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype"):
        return _from_numpy(value)
    if hasattr(value, "tolist"):  # torch and array.array, without importing either
        return _plain(value.tolist())
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, BaseException):
        return str(value)
    return _from_msgspec(value)


def _from_msgspec(value: Any) -> Any:
    """Converts dataclasses, attrs classes, Structs and timedeltas by msgspec, and the values in them by the rules here."""

    def unknown(inner: Any) -> Any:
        if inner is value:
            raise TypeError(f"there is no JSON for {type(value).__qualname__}")
        return _plain(inner)

    return _plain(msgspec.to_builtins(value, builtin_types=_LEFT, enc_hook=unknown))


def _from_numpy(value: Any) -> Any:
    """Converts an array or a scalar. Numbers are not visited one by one, since there may be many. Times are cut to microseconds, since
    `tolist` returns finer ones as ints."""
    match value.dtype.kind:
        case "b" | "i" | "u" | "f":
            return value.tolist() if value.dtype.itemsize <= 8 else value.astype("float64").tolist()  # Python has no longdouble
        case "M":
            return _plain(value.astype("datetime64[us]").tolist())
        case "m":
            return _plain(value.astype("timedelta64[us]").tolist())
        case _:
            return _plain(value.tolist())


def _key(key: Any) -> str:
    """Returns a key as text, like `json.dumps` (true, null, 1). Raises TypeError for a key that has no text."""
    plain = _plain(key)
    if plain is None or isinstance(plain, bool | int | float):
        return _encode(plain).decode()
    if not isinstance(plain, str):
        raise TypeError(f"there is no JSON for a key of type {type(key).__qualname__}")
    return plain


def _text(value: bytes | bytearray | memoryview) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes inside JSON are UTF-8 text, and these are not ({error}): return them alone, or as base64") from error
