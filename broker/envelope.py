"""A request on its way to a replica, with both directions of its AMQP form."""

from __future__ import annotations

import os
import re
import struct
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, Self

import msgspec
from msgspec.structs import replace
from pamqp.commands import Basic

from .errors import UNPARSABLE, BadEnvelope, TooLarge
from .values.header_seals import SEAL_BYTES, BackendSeals, Seal

VERSION = 1
MAX_HEAD_BYTES = 64 * 1024  # request line and headers: a content header must fit one frame (128 KiB), or it kills the connection
MINTED_ID_LENGTH = 32
SEALED_BODY_BYTES = 256  # the seal covers bodies up to this size; of larger ones it covers only the length

Whole = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Pairs = tuple[tuple[bytes, bytes], ...]


class RequestHead(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of a request beside its body, in HTTP's terms.

    `params` are (name, convertor, matched text): the text travels, and the reader applies the convertor, so values are exact.
    """

    method: str = "GET"
    path: str = ""
    raw_path: bytes = b""  # the path as the client sent it; empty if it equals `path`, without percent-encoding
    query: bytes = b""
    headers: Pairs = ()
    params: tuple[tuple[str, str, str], ...] = ()
    route: str = ""
    root_path: str = ""  # the route, if it is a prefix: the part of the path that is not the app's
    endpoint: str = ""
    call: str = ""  # a method of the user's class, empty for __call__
    http_version: str = "1.1"
    scheme: str = "http"
    client: tuple[str, int] | None = None
    server: tuple[str, int | None] | None = None
    state: dict[str, Any] | None = None  # `request.state`: the plain data that middlewares of the proxy set
    lost_state: dict[str, str] | None = None  # name -> type of the values that are not plain data and stayed behind


class Member(msgspec.Struct, frozen=True, array_like=True):
    """The place of a job in a group (`job_groups.py`)."""

    group: str
    number: Whole  # from 0


class Stage(msgspec.Struct, frozen=True, array_like=True):
    """The place of a job in a pipeline. `plan` is what all its stages have in common (`pipelines.py`), sealed where there is a key."""

    plan: bytes
    index: Whole


class JobHead(msgspec.Struct, frozen=True, omit_defaults=True):
    """The header field `job`: the request is one that nobody waits for (`jobs.py`). Times are store time in ms."""

    created_ms: Whole = 0
    result_ttl_s: Whole = 0  # 0: as the backend says
    tries: Whole = 0  # runs of it that have failed and were to be tried again
    not_before_ms: Whole = 0
    tag: str = ""
    retry_of: str = ""
    callback: str = ""  # the URL that is told of its end
    reply_to: str = ""  # of one that was published to an endpoint: the queue that gets the answer
    tells: bool = False  # likewise: it had the header mq-events
    carried: bool = False  # its body holds results of other jobs (`values/carried.py`)
    stage: Stage | None = None  # of a pipeline
    member: Member | None = None


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """Our AMQP header `mq`. Direct publishers do not send it, so every field has a default.

    The last two fields may change on the way, so the seal leaves them out: they have to stay the last ones, in this order.
    """

    v: int = VERSION
    origin: str = ""  # "http" or "handle" decides the form of the result; empty for a direct publisher
    inbox: str = ""
    ref: str = ""  # store key of a body that travels by reference
    shadow: bool = False  # a shadow copy: nobody waits for it, and its result is not stored
    once: bool = False  # never published twice (at-most-once delivery)
    stream: Annotated[int, msgspec.Meta(ge=0, le=2)] = 0  # of a handle: 1, it takes chunks; 2, and may come back for them
    job: JobHead | None = None
    meta: RequestHead = RequestHead()
    deadline: Whole = 0  # store time in ms, 0 for none; an int, since pamqp packs header floats in 32 bits, a minute off
    again: bool = False  # the message was published before, and may have been delivered: look for a result first

    @property
    def claims(self) -> bool:
        """Whether the header uses rights that need trust. Any publisher may set a deadline, a method to call, and a job's callback URL;
        every other field needs trust."""
        says = self.origin or self.inbox or self.ref or self.shadow or self.once or self.stream or self.again
        if says or (self.job is not None and self.job != JobHead(callback=self.job.callback)):
            return True
        return self.meta != RequestHead(call=self.meta.call)


NO_HEADER = Header()
_encode = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(Header).decode


def mint_id() -> str:
    """Returns 128 random bits as 32 hex digits. The id is unguessable, so knowing it is the right to read the result."""
    try:
        return _minted.pop()  # list.pop is atomic across threads
    except IndexError:
        # one system call for many ids: a call for each would cost as much as encoding a request
        page = os.urandom(16 * _MINTED_AT_ONCE).hex()
        _minted.extend(page[start : start + 32] for start in range(32, len(page), 32))
        return page[:32]


def is_minted(text: str) -> bool:
    """Whether `text` has the form of a minted id."""
    return _MINTED.fullmatch(text) is not None


def endpoint_key(endpoint: str, message_id: str) -> str:
    """The id under which the result of a message is stored that was published to an endpoint. No name has an `@`, so no other id is the
    same."""
    return f"@{endpoint}@{message_id}"


def is_endpoint_key(future_id: str) -> bool:
    return future_id.startswith("@")


_MINTED = re.compile(f"[0-9a-f]{{{MINTED_ID_LENGTH}}}")
_MINTED_AT_ONCE = 64
_minted: list[str] = []
os.register_at_fork(after_in_child=_minted.clear)  # a forked child must not hand out ids that its parent also has


class UnreadableProperties(Basic.Properties):
    """The AMQP properties of a message whose header frame could not be parsed, and why."""

    why = ""


class Envelope(msgspec.Struct, frozen=True):
    """One request. `id` is empty for fire and forget. A Struct, since a frozen dataclass of this size is twenty times slower to make."""

    id: str
    body: bytes
    content_type: str
    header: Header = NO_HEADER
    reply_to: str = ""
    correlation_id: str = ""
    priority: int = 0
    expiration_ms: int = 0
    persistent: bool = False
    status: int = 0  # in replies only: the HTTP status of the outcome, in the header `mq-status`
    attempt: int = 1  # the number of this run; the store counts runs, the wire does not carry this
    user_id: str = ""  # in deliveries only: the sender's AMQP user, which RabbitMQ has verified
    seal: Seal = Seal.NONE  # in deliveries only: the result of checking the header's seal

    def __eq__(self, other: object) -> bool:
        """Whether both are the same message. What is known of one delivery or one run does not count."""
        return isinstance(other, Envelope) and bool(_message(self) == _message(other))

    @property
    def minted(self) -> bool:
        """Whether the id was minted by us (and so is globally unique) rather than chosen by the caller."""
        return bool(self.header.origin) and len(self.id) == MINTED_ID_LENGTH

    @property
    def carries(self) -> bool:
        """Whether the body holds results of other jobs."""
        return self.header.job is not None and self.header.job.carried

    def future_id(self, backend: str) -> str:
        """The id under which the result is stored. A minted id is used as it is; a caller's own key is scoped to the backend, or to the
        endpoint if it was published to that: then its sender does not know the backend."""
        if self.minted or not self.id:
            return self.id
        if not self.header.origin and self.header.meta.endpoint:
            return endpoint_key(self.header.meta.endpoint, self.id)
        return f"{backend}/{self.id}"

    def without_header(self) -> Self:
        """Returns a copy without the header, as if a direct publisher had sent it, because the header is not trusted."""
        return replace(self, header=NO_HEADER)

    def due_at(self, deadline_ms: int) -> Self:
        """Returns the envelope with another deadline, in store time."""
        return replace(self, header=replace(self.header, deadline=deadline_ms))

    def check_head(self) -> None:
        """Raises TooLarge for a head that no broker could carry."""
        meta = self.header.meta
        size = len(meta.path) + len(meta.query) + sum([len(name) + len(value) + 4 for name, value in meta.headers])
        if size > MAX_HEAD_BYTES:
            raise TooLarge(f"the request's head takes {size} bytes, more than {MAX_HEAD_BYTES}: send less in headers and URL", status=431)

    def to_amqp(self, user_id: str = "", seals: BackendSeals | None = None) -> bytes:
        """Packs the property flags and list of an AMQP content header by hand: pamqp's generic encoder takes longer than all the rest of
        a publish. `user_id` is the connection's AMQP user, `seals` are those of the target backend.

        Raises TooLarge over the head limit, and BadEnvelope for values that AMQP cannot encode.
        """
        table = self._table(seals)
        flags = _HEADERS | _DELIVERY_MODE
        content_type = priority = correlation_id = reply_to = expiration = message_id = user = b""
        if self.content_type:
            flags |= _CONTENT_TYPE
            content_type = _often(self.content_type)
        if self.priority:
            flags |= _PRIORITY
            priority = bytes((self.priority,))
        if self.correlation_id:
            flags |= _CORRELATION_ID
            correlation_id = _short(self.correlation_id)
        if self.reply_to:
            flags |= _REPLY_TO
            reply_to = _short(self.reply_to)
        if self.expiration_ms:
            flags |= _EXPIRATION
            expiration = _often(str(self.expiration_ms))
        if self.id:
            flags |= _MESSAGE_ID
            message_id = _short(self.id)
        if user_id:
            flags |= _USER_ID
            user = _often(user_id)
        mode = b"\x02" if self.persistent else b"\x01"
        before = (_pack_flags(flags), content_type, _pack_length(len(table)), table, mode)
        return b"".join((*before, priority, correlation_id, reply_to, expiration, message_id, user))

    def _table(self, seals: BackendSeals | None) -> bytes:
        """Packs the entries of the AMQP table `headers`."""
        if self.status:
            return b"\x09mq-statusI" + struct.pack(">i", self.status)
        try:
            header = _encode(self.header)
        except (UnicodeEncodeError, OverflowError) as error:
            raise BadEnvelope(f"the request's header cannot be encoded ({error})") from error
        if len(header) > MAX_HEAD_BYTES + 4096:
            raise TooLarge(
                f"the request's head takes {len(header)} bytes, more than {MAX_HEAD_BYTES}: send less in headers and URL", status=431
            )
        entry = b"\x02mqx" + _pack_length(len(header)) + header
        if seals is None:
            return entry
        covered = covered_by_seal(self.id, self.content_type, self.header, header, self.body)
        return entry + _SEAL_ENTRY + seals.make(covered)

    @classmethod
    def from_amqp(cls, properties: Any, body: bytes, seals: BackendSeals | None = None) -> Self:
        """Builds an envelope from pamqp's `Basic.Properties`. `seals` are those of the backend that received the message.

        Raises BadEnvelope when the header does not parse or has another version.
        """
        if isinstance(properties, UnreadableProperties):
            raise BadEnvelope(f"its AMQP properties cannot be read ({properties.why}): write strings in UTF-8, and times as times")
        headers = properties.headers or {}
        message_id, content_type = properties.message_id or "", properties.content_type or _ANY_TYPE
        header, seal = NO_HEADER, Seal.NONE
        if "mq" in headers:
            header = parse_header(raw := headers["mq"])
            if seals is not None and "mq-seal" in headers:
                seal = seals.check(headers["mq-seal"], covered_by_seal(message_id, content_type, header, raw, body))
        return cls(
            id=message_id,
            body=body,
            content_type=content_type,
            header=header,
            reply_to=properties.reply_to or "",
            correlation_id=properties.correlation_id or "",
            priority=properties.priority or 0,
            expiration_ms=_milliseconds(properties.expiration),
            persistent=properties.delivery_mode == 2,
            user_id=properties.user_id or "",
            seal=seal,
        )


def persistent(envelope: Envelope) -> Envelope:
    """Returns the envelope as a message that survives a restart of the broker."""
    return envelope if envelope.persistent else replace(envelope, persistent=True)


class StreamReply(Envelope, frozen=True):
    """A message of a streamed reply, with the header `mq-seq`: the chunk of that number, or behind all chunks the end, with the headers
    `mq-end` and `mq-status`."""

    seq: int = 0
    ends: bool = False

    def _table(self, seals: BackendSeals | None) -> bytes:
        entries = b"\x06mq-seqI" + struct.pack(">i", self.seq)
        if self.ends:
            entries += b"\x06mq-endt\x01\x09mq-statusI" + struct.pack(">i", self.status)
        return entries


class EventReply(Envelope, frozen=True):
    """What a handler says of its job before the reply comes: with the header `mq-event` and, for progress, `mq-fraction`. That is a text,
    since pika reads AMQP's floats as whole numbers. A chunk has `mq-offset`, and `mq-cut` if no more of them come."""

    kind: str = ""
    fraction: float | None = None
    offset: int | None = None
    cut: bool = False

    def _table(self, seals: BackendSeals | None) -> bytes:
        entries = b"\x08mq-eventS" + _long(self.kind)
        if self.fraction is not None:
            entries += b"\x0bmq-fractionS" + _long(f"{self.fraction:.6g}")
        if self.offset is not None:
            entries += b"\x09mq-offsetI" + struct.pack(">i", self.offset)
        if self.cut:
            entries += b"\x06mq-cutt\x01"
        return entries


def covered_by_seal(message_id: str, content_type: str, header: Header, raw: bytes, body: bytes) -> bytes:
    """Returns the bytes that a seal covers besides the namespace and the backend. `raw` is the header as it stands in the message.

    The first byte of the header, its number of fields, is left out because the last two fields change it. With a wrong number the header
    would not parse.
    """
    tail = b""
    if header.deadline:
        tail = _DEADLINE + _encode(header.deadline)
    if header.again:
        tail += _AGAIN
    sealed = raw[1 : len(raw) - len(tail)] if raw.endswith(tail) else raw[1:]
    sizes = struct.pack(">II", len(sealed), len(body))
    shown = body if len(body) <= SEALED_BODY_BYTES else b""
    return b"".join((_short(message_id), _short(content_type or _ANY_TYPE), sizes, sealed, shown))


_message = attrgetter(*Envelope.__struct_fields__[: Envelope.__struct_fields__.index("attempt")])
_pack_flags, _pack_length = struct.Struct(">H").pack, struct.Struct(">I").pack
_DEADLINE, _AGAIN = b"\xa8deadline", b"\xa5again\xc3"  # MessagePack: the key of `deadline`; the whole entry of `again`
_SEAL_ENTRY = b"\x07mq-sealx" + struct.pack(">I", SEAL_BYTES)
_ANY_TYPE = "application/octet-stream"  # the default when a message names no content type

_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE, _PRIORITY = 1 << 15, 1 << 13, 1 << 12, 1 << 11
_CORRELATION_ID, _REPLY_TO, _EXPIRATION, _MESSAGE_ID, _USER_ID = 1 << 10, 1 << 9, 1 << 8, 1 << 7, 1 << 4


def _short(text: str) -> bytes:
    """Encodes an AMQP shortstr: at most 255 bytes of UTF-8."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise BadEnvelope(f"{text[:40]!r} is no text that AMQP can carry ({error})") from error
    if len(raw) > 255:
        raise BadEnvelope(f"{raw[:40]!r}… has {len(raw)} bytes, and an AMQP property holds 255")
    return bytes((len(raw),)) + raw


def _long(text: str) -> bytes:
    """Encodes an AMQP longstr."""
    raw = text.encode()
    return _pack_length(len(raw)) + raw


_often = lru_cache(maxsize=256)(_short)  # for texts that come again: content types, times, users


def parse_header(raw: object) -> Header:
    """Parses an `mq` header. Raises BadEnvelope, with the way out, for bytes that are no header of this version."""
    if not isinstance(raw, bytes | bytearray):
        raise BadEnvelope(f"the mq header is a {type(raw).__name__}, not bytes: leave it out, or see docs/protocol.md")
    try:
        header = _decode_header(raw)
    except UNPARSABLE as error:
        raise BadEnvelope(f"the mq header does not parse ({error}): leave it out, or see docs/protocol.md") from error
    if header.v != VERSION:
        raise BadEnvelope(f"the mq header has version {header.v}, and this replica reads {VERSION}: update it, or send the older form")
    return header


def _milliseconds(expiration: str | None) -> int:
    return int(expiration) if expiration and expiration.isascii() and expiration.isdigit() else 0
