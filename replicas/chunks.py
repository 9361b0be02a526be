"""What a generator yields, as the bytes of a streamed answer or of one piece."""

from __future__ import annotations

from enum import Enum

import msgspec

from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.envelope import Pairs
from ..broker.errors import BadType, NotEncodable, TooLarge
from ..broker.values.codecs import TEXT
from .jsonable import to_json

NDJSON = "application/x-ndjson"
BINARY = "application/octet-stream"
EVENTS = "text/event-stream"


class _Kind(Enum):
    TEXT = TEXT
    BINARY = BINARY
    LINES = NDJSON


class BodyChunks:
    """Encodes the chunks of one body. The first one decides what it is: text, bytes, or one JSON value a line."""

    def __init__(self) -> None:
        self._kind: _Kind | None = None

    def __repr__(self) -> str:
        return f"<BodyChunks of {self.content_type}>"

    @property
    def is_text(self) -> bool:
        """Whether the body is text; lines of JSON are."""
        return self._kind is not _Kind.BINARY

    @property
    def content_type(self) -> str:
        """That of the body; of text while nothing was yielded, as for a handler that returns None."""
        return "text/plain" if self._kind is None else self._kind.value

    def encode(self, value: object) -> bytes:
        """Raises NotEncodable or BadType for a value that has no place in this body."""
        if self._kind is None:
            self._kind = _kind_of(value)
        if self._kind is _Kind.LINES:
            return checked(_json(value) + b"\n")
        if isinstance(value, str):
            return checked(str.encode(value))
        if isinstance(value, bytes | bytearray | memoryview):
            return checked(bytes(value))
        raise BadType(
            f"a handler that began with {'text' if self._kind is _Kind.TEXT else 'bytes'} yielded a {type(value).__name__}: yield only str "
            "and bytes, or begin with what is sent as JSON"
        )


def encode_item(value: object) -> bytes:
    """Returns the data of one server-sent event: text as it is, other values as JSON. Raises NotEncodable."""
    if isinstance(value, str):
        return checked(str.encode(value))
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise NotEncodable(f"the handler yielded bytes that are no UTF-8 ({error}), and events carry text: encode them") from error
        return checked(data)
    return checked(_json(value))


def checked(data: bytes) -> bytes:
    """Returns the data. Raises TooLarge for a chunk above the limit of a body."""
    if len(data) > MAX_BODY_BYTES:
        raise TooLarge(
            f"the handler yielded a chunk of {len(data)} bytes, and the limit is {MAX_BODY_BYTES}: yield smaller ones", status=500
        )
    return data


def takes_events(headers: Pairs) -> bool:
    """Whether the request's Accept header names server-sent events, with any weight but 0."""
    for name, value in headers:
        if name == b"accept" and EVENTS.encode() in value.lower():
            for part in value.lower().split(b","):
                kind, *parameters = [piece.strip() for piece in part.split(b";")]
                if kind == EVENTS.encode() and not any(_is_zero(parameter) for parameter in parameters):
                    return True
    return False


def _is_zero(parameter: bytes) -> bool:
    name, _, weight = parameter.partition(b"=")
    try:
        return name.strip() == b"q" and float(weight) <= 0
    except ValueError:
        return False


def _kind_of(value: object) -> _Kind:
    if isinstance(value, str):
        return _Kind.TEXT
    return _Kind.BINARY if isinstance(value, bytes | bytearray | memoryview) else _Kind.LINES


def _json(value: object) -> bytes:
    try:
        return to_json(value)
    except (TypeError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise NotEncodable(f"the handler yielded a {type(value).__name__} that is no JSON ({error}): yield plain data") from error
