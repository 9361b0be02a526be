"""A dead letter: a message that was set aside, and why, with both directions of its AMQP form.

A dead letter is the message as it came (body, properties, headers) plus headers of ours, so that it can be published again unchanged.
Anybody with the right to publish to the exchange can write one, so reading trusts no field and raises nothing.
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
_NOT_KEPT = ("CC", "mq-job", "mq-endpoint")
_OURS = ("mq-reason", "mq-traceback", "mq-attempts", "mq-backend", "mq-died-at", "mq-user", "mq-job", "mq-endpoint")


class Attempt(msgspec.Struct, frozen=True):
    """One run that left no result: the replica, the start (store time in ms), and how the run ended (empty: it may be under way).

    `run` is a unique name of the run.
    """

    replica: str
    started_ms: int
    ended: str = ""
    run: str = ""


class Death(msgspec.Struct, frozen=True):
    """Why a message was set aside. `died_at_ms` is store time; this process's clock fills it in where the broker did not."""

    reason: str
    traceback: str = ""
    attempts: tuple[Attempt, ...] = ()
    died_at_ms: int = 0

    def to_headers(self, backend: str) -> dict[str, Any]:
        """Returns the headers, cut to the room that a content header has: the end of the traceback and the last attempts are kept."""
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
    """A letter read from the dead letter queue: the death, and the message without the headers that describe the death.

    `sender` is the AMQP user who sent the message, as RabbitMQ told the process that set it aside. `is_job`: it waited among the jobs.
    `endpoint` is the one that it was published to, if it got no further.
    """

    backend: str
    death: Death
    properties: Basic.Properties
    body: bytes
    sender: str = ""
    is_job: bool = False
    endpoint: str = ""

    @classmethod
    def from_amqp(cls, backend: str, properties: Basic.Properties, body: bytes) -> DeadLetter:
        headers: dict[str, Any] = properties.headers or {}
        theirs = {name: value for name, value in headers.items() if name not in _OURS}
        sender, is_job = _text(headers.get("mq-user")), headers.get("mq-job") is True
        endpoint = _text(headers.get("mq-endpoint"))
        return cls(backend, Death.from_headers(headers), _with_headers(properties, theirs), body, sender, is_job, endpoint)

    @property
    def id(self) -> str:
        """The message id; empty if the message had none."""
        return self.properties.message_id or ""

    @property
    def name(self) -> str:
        """The name that operators use for this letter."""
        return self.id or digest_of(self.backend, self.body)

    @property
    def has_seal(self) -> bool:
        """Whether the message carries a seal; says nothing about whether the seal is valid."""
        return "mq-seal" in (self.properties.headers or {})

    def envelope(self, seals: BackendSeals | None = None) -> Envelope:
        """The envelope as a replica would read it. Raises BadEnvelope, which may be the reason why the message died."""
        return msgspec.structs.replace(Envelope.from_amqp(self.properties, self.body, seals), user_id=self.sender)

    def renewed(self, deadline_ms: int, seals: BackendSeals | None = None) -> DeadLetter:
        """Returns a copy to publish again: without an inbox, since nobody waits any more, with a new deadline, and with `again`, since it
        may have run before. A job may begin at any time from now on, and has all its tries once more.

        A valid seal is made anew with the current key. An invalid one is not: a new seal would vouch for what a stranger wrote.
        """
        headers: dict[str, Any] = dict(self.properties.headers or {})
        try:
            envelope = self.envelope(seals)
        except BadEnvelope:
            return self  # a header that does not parse is published as it came
        if "mq" not in headers:
            return self
        fields = msgspec.msgpack.decode(headers["mq"])  # keep fields that only a newer version knows
        kept = {name: value for name, value in fields.items() if name not in ("inbox", "deadline", "again")}
        if isinstance(kept.get("job"), dict):
            kept["job"] = {name: value for name, value in kept["job"].items() if name not in ("tries", "not_before_ms")}
        deadline = {"deadline": deadline_ms} if envelope.header.deadline and not self.is_job else {}
        again = {"again": True} if envelope.header.claims else {}  # the id of a direct publisher is looked up in any case
        raw = msgspec.msgpack.encode({**kept, **deadline, **again})  # these two stay the last fields, as the seal requires
        headers["mq"] = bytearray(raw)
        if seals is not None and envelope.seal is Seal.VALID:
            covered = covered_by_seal(envelope.id, envelope.content_type, parse_header(raw), raw, self.body)
            headers["mq-seal"] = bytearray(seals.make(covered))
        return replace(self, properties=_with_headers(self.properties, headers))

    def to_amqp(self, user: str = "") -> bytes:
        """Packs the message's property flags and list, without the headers about its death. `user` is the AMQP user that publishes it
        now."""
        properties = copy.copy(self.properties)
        properties.user_id = user or None
        return pack_properties(properties)


def digest_of(backend: str, body: bytes) -> str:
    """A name for a message without an id: used to count its deliveries and to list it."""
    return hashlib.sha256(backend.encode() + b"\0" + body).hexdigest()[:32]


def dead_letter_to_amqp(
    backend: str, properties: Basic.Properties, death: Death, *, is_job: bool = False, endpoint: str | None = None
) -> bytes:
    """Packs the property flags and list of a dead letter. Headers of the sender are dropped if they do not fit or cannot be encoded
    again. `endpoint` is the one that it was published to."""
    ours = death.to_headers(backend)
    ours["mq-user"] = properties.user_id or ""  # always set, so that a sender's own header of that name cannot pass for it
    if is_job:
        ours["mq-job"] = True
    if endpoint is not None:
        ours["mq-endpoint"] = endpoint
    # CC would route a copy to another queue, and a sender's own header of these names would pass for ours
    theirs: dict[str, Any] = {name: value for name, value in (properties.headers or {}).items() if name not in _NOT_KEPT}
    for kept in (theirs, {name: value for name, value in theirs.items() if name in ("mq", "mq-seal")}):
        with suppress(Exception):
            packed = pack_properties(_as_dead(properties, {**kept, **ours}))
            if len(packed) <= _MAX_HEAD_BYTES:
                return packed
    return pack_properties(_as_dead(properties, ours))


def read_properties(packed: bytes) -> Basic.Properties:
    """Parses packed property flags and list as RabbitMQ would deliver them; the in-memory queue uses it, since it has no wire."""
    header = ContentHeader()
    header.unmarshal(b"\x00\x3c\x00\x00" + bytes(8) + packed)
    return header.properties


def _as_dead(properties: Basic.Properties, headers: dict[str, Any]) -> Basic.Properties:
    dead = _with_headers(properties, headers)
    dead.expiration = None  # a dead letter outlives the request
    dead.delivery_mode = 2
    dead.user_id = None  # RabbitMQ closes the channel if the user_id is not the connection's user
    return dead


def _with_headers(properties: Basic.Properties, headers: dict[str, Any]) -> Basic.Properties:
    other = copy.copy(properties)
    other.headers = headers or None
    return other


def pack_properties(properties: Basic.Properties) -> bytes:
    """Packs the property flags and list of any message."""
    return ContentHeader(0, 0, properties).marshal()[12:]


def _text(value: object) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace") if isinstance(value, bytes | bytearray) else ""
