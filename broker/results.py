"""The result of a request as the store holds it, and the inbox entry that announces it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec

from .envelope import Pairs
from .errors import UNPARSABLE, BadEnvelope, MembersFailed

VERSION = 1
INLINE_BYTES = 64 * 1024  # a result up to this size rides in the inbox entry; a larger one is read by its key
RESULT_KIND = 0
CHUNK_KIND = 1
SESSION_KIND = 2
EVENT_KIND = 3
MEMBERS_FAILED = "mqserve.MembersFailed"  # the type in an ErrorInfo


class Outcome(StrEnum):
    """Why mqserve ended a request without a result of its handler. The value is the type in the ErrorInfo."""

    CANCELLED = "mqserve.Cancelled"
    LATE = "mqserve.RequestTimeout"
    GONE = "mqserve.BackendGone"


class Phase(StrEnum):
    """Where a late request was when its deadline passed."""

    QUEUE = "queue"
    RUN = "run"


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An exception as plain data. `phase` is set for a late request. `sealed` is the signed pickle of the exception object, if there was a
    key and it is not too large; `members` is a JSON object that web clients get beside the message."""

    type: str
    message: str
    traceback: str = ""
    sealed: bytes = b""
    members: bytes = b""
    phase: Phase = Phase.QUEUE


class BodyFile(msgspec.Struct, frozen=True, array_like=True):
    """The body of a job's result that is a file of its own (`result_files.py`). It names no path: that is made of the id and the hash."""

    size: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class ResultLimit(NamedTuple):
    """How large a result may be, and what is said of one that is larger."""

    max_bytes: int
    refusal: str


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of one request. `status` is an HTTP status, also for callers that do not use HTTP."""

    v: int = VERSION
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] = 200
    backend: str = ""
    attempt: int = 1
    content_type: str = "application/octet-stream"
    headers: Pairs = ()
    body: bytes = b""
    ref: str = ""  # store key of a body that travels by reference
    error: ErrorInfo | None = None
    frames: int = 0  # of an answer that was streamed: how many there are in its stream (`streams.py`); its body is empty
    file: BodyFile | None = None  # a body that is a file; `ref` is set, too, or an older process would take it as empty

    @property
    def outcome(self) -> Outcome | None:
        """Why mqserve ended the request; None for a result or an error of its handler."""
        return None if self.error is None else _OUTCOMES.get(self.error.type)

    def to_bytes(self) -> bytes:
        return _encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Result:
        """Raises BadEnvelope for bytes that are not a result of this version."""
        try:
            result = _decode_result(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(f"the stored result does not parse ({error})") from error
        if result.v != VERSION:
            raise BadEnvelope(f"the stored result has version {result.v}, and this process reads {VERSION}: update it")
        return result


class InboxEntry(msgspec.Struct, frozen=True, array_like=True):
    """An inbox entry `[v, id, kind, seq, payload]`. Kind 0 carries the whole result, or nothing: then read the result by its key. Kind 1
    carries the frame `seq` of a streamed answer (`streams.py`), kind 2 a word of a WebSocket session (`sessions.py`), kind 3 the event
    `seq` of a job (`jobs.py`). Other kinds are reserved."""

    v: int
    id: str
    kind: int
    seq: int
    payload: bytes

    def to_bytes(self) -> bytes:
        return _encode(self)


def late_result(phase: Phase, unstored: str = "") -> Result:
    """Returns the result of a request whose deadline passed in `phase`. `unstored` says why the store takes no results, if it takes none;
    the message then gives that as the cause."""
    where = "was still waiting in the queue" if phase is Phase.QUEUE else "was still running"
    mend = "allow it more (its own timeout, and the backend's request_timeout_s), or add replicas"
    if unstored:
        where, mend = "had no result", f"none can be stored now, since the store takes no writes ({unstored})"
    message = f"the request {where} when its time was spent ({phase}): {mend}"
    return Result(status=504, error=ErrorInfo(type=Outcome.LATE, message=message, phase=phase))


def expired_result() -> Result:
    """Returns the result of a job that was not begun in time."""
    mend = "allow it more (`expires_s` of a handle, X-Request-Timeout-Seconds over HTTP, `deadline` of a message), or add replicas"
    message = f"the job was still waiting when its time to begin was over ({Phase.QUEUE}): {mend}"
    return Result(status=504, error=ErrorInfo(type=Outcome.LATE, message=message, phase=Phase.QUEUE))


def gone_result(backend: str, why: str) -> Result:
    """Returns the result of a request whose backend ended before it. `why` is a clause such as "backend 'a' was deleted"."""
    message = f"{why}, and the request had no result within graceful_shutdown_timeout_s: send it again once it is served again"
    return Result(status=503, backend=backend, error=ErrorInfo(type=Outcome.GONE, message=message))


def members_failed(why: str) -> Result:
    """Returns the result of a job that was to get the results of others, and does not. `why` is a sentence."""
    return Result(status=MembersFailed.status, error=ErrorInfo(type=MEMBERS_FAILED, message=why))


def entry_of(future_id: str, result: bytes) -> bytes:
    """Returns the inbox entry that announces a recorded result."""
    return InboxEntry(1, future_id, RESULT_KIND, 0, result if len(result) <= INLINE_BYTES else b"").to_bytes()


def read_entry(raw: bytes) -> InboxEntry | None:
    """Returns the entry, or None for a version or kind that this process does not know."""
    try:
        note = _decode_note(raw)
    except UNPARSABLE:
        return None
    return note if note.v == 1 and note.kind <= EVENT_KIND else None


_OUTCOMES: dict[str, Outcome] = {outcome.value: outcome for outcome in Outcome}
_encode = msgspec.msgpack.Encoder().encode
_decode_result = msgspec.msgpack.Decoder(Result).decode
_decode_note = msgspec.msgpack.Decoder(InboxEntry).decode
