"""A message that was set aside, and why: both directions of its AMQP form.

A dead letter is the message as it came (body, properties, headers) with headers of ours beside its own, so that it can be
published again as it was. Whoever may publish to the exchange can write one: reading believes nothing and raises nothing.
"""

from __future__ import annotations

import copy
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from .envelope import Envelope, covered_by_seal, parse_header
from .errors import BadEnvelope
from .values.header_seals import BackendSeals, Seal

MAX_REASON = 2000  # characters
MAX_TRACEBACK_BYTES = 16 * 1024
MAX_ATTEMPTS_KEPT = 100
_MAX_HEAD_BYTES = 120 * 1024  # a content header must fit one frame (128 KiB), or it kills the connection
_OURS = ("mq-reason", "mq-traceback", "mq-attempts", "mq-backend", "mq-died-at", "mq-user")


class Attempt(msgspec.Struct, frozen=True):
    """A run that left no result: in which replica, since when (store ms), and how that ended (empty: it may be under way).

    `run` names it, so that no two are the same.
    """

    replica: str
    started_ms: int
    ended: str = ""
    run: str = ""


class Death(msgspec.Struct, frozen=True):
    """Why a message was set aside; `died_at_ms` is store time, and ours where it is not given."""

    reason: str
    traceback: str = ""
    attempts: tuple[Attempt, ...] = ()
    died_at_ms: int = 0

    def to_headers(self, backend: str) -> dict[str, Any]:
        """Cut to what a content header has room for: the end of the traceback, the last attempts."""
        headers: dict[str, Any] = {
            "mq-reason": self.reason[:MAX_REASON],
            "mq-backend": backend,
            "mq-died-at": self.died_at_ms or int(time.time() * 1000),
        }
        if self.traceback:
            headers["mq-traceback"] = self.traceback.encode(errors="replace")[-MAX_TRACEBACK_BYTES:].decode(errors="ignore")
        if self.attempts:
            headers["mq-attempts"] = msgspec.json.encode(self.attempts[-MAX_ATTEMPTS_KEPT:]).decode()
        return headers

    @classmethod
    def from_headers(cls, headers: dict[str, Any]) -> Death:
        died_at = headers.get("mq-died-at")
        attempts: tuple[Attempt, ...] = ()
        with suppress(msgspec.MsgspecError, UnicodeEncodeError):
            attempts = msgspec.json.decode(_text(headers.get("mq-attempts")), type=tuple[Attempt, ...])
        return cls(
            reason=_text(headers.get("mq-reason")),
            traceback=_text(headers.get("mq-traceback")),
            attempts=attempts,
            died_at_ms=died_at if isinstance(died_at, int) else 0,
        )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One read from the dead letters: the death, and the message without the headers that told of it.

    `sender` is its user as the replica that set it aside was told by RabbitMQ.
    """

    backend: str
    death: Death
    properties: Basic.Properties
    body: bytes
    sender: str = ""

    @classmethod
    def from_amqp(cls, backend: str, properties: Basic.Properties, body: bytes) -> DeadLetter:
        headers: dict[str, Any] = properties.headers or {}
        theirs = {name: value for name, value in headers.items() if name not in _OURS}
        return cls(backend, Death.from_headers(headers), _with_headers(properties, theirs), body, _text(headers.get("mq-user")))

    @property
    def id(self) -> str:
        """The message's own, empty for one that had none."""
        return self.properties.message_id or ""

    @property
    def name(self) -> str:
        """What operators call it by."""
        return self.id or digest_of(self.backend, self.body)

    @property
    def has_seal(self) -> bool:
        """Whatever it is worth."""
        return "mq-seal" in (self.properties.headers or {})

    def envelope(self, seals: BackendSeals | None = None) -> Envelope:
        """As a replica would read it. Raises BadEnvelope: that may be what it died of."""
        return replace(Envelope.from_amqp(self.properties, self.body, seals), user_id=self.sender)

    def renewed(self, deadline_ms: int, seals: BackendSeals | None = None) -> DeadLetter:
        """To be published again. Nobody waits in the inbox any more, the old deadline is over, and it may have run before.

        A seal that fits is made anew, of the current key. No other is: it would vouch for what a stranger wrote.
        """
        headers: dict[str, Any] = dict(self.properties.headers or {})
        try:
            envelope = self.envelope(seals)
        except BadEnvelope:
            return self  # whoever reads that header one day reads it as it came
        if "mq" not in headers:
            return self
        fields = msgspec.msgpack.decode(headers["mq"])  # with those that only a newer version knows
        kept = {name: value for name, value in fields.items() if name not in ("inbox", "deadline", "again")}
        deadline = {"deadline": deadline_ms} if envelope.header.deadline else {}
        again = {"again": True} if envelope.header.claims else {}  # a direct publisher's id is looked up in any case
        raw = msgspec.msgpack.encode({**kept, **deadline, **again})  # those two last, as a seal needs them
        headers["mq"] = bytearray(raw)
        if seals is not None and envelope.seal is Seal.VALID:
            covered = covered_by_seal(envelope.id, envelope.content_type, parse_header(raw), raw, self.body)
            headers["mq-seal"] = bytearray(seals.make(covered))
        return replace(self, properties=_with_headers(self.properties, headers))

    def to_amqp(self, user: str = "") -> bytes:
        """The property flags and list of the message, without those of its death; `user` vouches for it now."""
        properties = copy.copy(self.properties)
        properties.user_id = user or None
        return _pack(properties)


def digest_of(backend: str, body: bytes) -> str:
    """What a message without an id is counted and named by."""
    return hashlib.sha256(backend.encode() + b"\0" + body).hexdigest()[:32]


def dead_letter_to_amqp(backend: str, properties: Basic.Properties, death: Death) -> bytes:
    """The property flags and list of a dead letter: a stranger's headers go where they do not fit or cannot be written again."""
    ours = death.to_headers(backend)
    ours["mq-user"] = properties.user_id or ""  # always: a stranger's own header of that name must not pass for it
    theirs: dict[str, Any] = {name: value for name, value in (properties.headers or {}).items() if name != "CC"}  # or it goes there too
    for kept in (theirs, {name: value for name, value in theirs.items() if name in ("mq", "mq-seal")}):
        with suppress(Exception):
            packed = _pack(_as_dead(properties, {**kept, **ours}))
            if len(packed) <= _MAX_HEAD_BYTES:
                return packed
    return _pack(_as_dead(properties, ours))


def read_properties(packed: bytes) -> Basic.Properties:
    """Of flags and list, as they come from the wire: for the queue that has none."""
    header = ContentHeader()
    header.unmarshal(b"\x00\x3c\x00\x00" + bytes(8) + packed)
    return header.properties


def _as_dead(properties: Basic.Properties, headers: dict[str, Any]) -> Basic.Properties:
    dead = _with_headers(properties, headers)
    dead.expiration = None  # a dead letter outlives the request
    dead.delivery_mode = 2
    dead.user_id = None  # RabbitMQ closes the channel of whoever publishes under another's name
    return dead


def _with_headers(properties: Basic.Properties, headers: dict[str, Any]) -> Basic.Properties:
    other = copy.copy(properties)
    other.headers = headers or None
    return other


def _pack(properties: Basic.Properties) -> bytes:
    return ContentHeader(0, 0, properties).marshal()[12:]


def _text(value: object) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace") if isinstance(value, bytes | bytearray) else ""
