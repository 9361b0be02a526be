"""An answer that flows: its head, its chunks and its end, with both directions of their wire form.

A chunk travels as one or more frames of at most FRAME_BYTES. Frames are numbered from 1 through all runs of a request. A frame is an entry
`<attempt>-<seq>` of the Redis stream at `stream:{id}`, which is the truth; an inbox entry of kind CHUNK_KIND has the same bytes, and is a
hint. The first frame has the head with it. The end is the result at `future:{id}`, which says how many frames there are. docs/protocol.md
has the contract.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum, StrEnum
from typing import Annotated, NamedTuple

import msgspec

from .envelope import Pairs
from .errors import UNPARSABLE, BadEnvelope
from .results import CHUNK_KIND, ErrorInfo, InboxEntry, Outcome, Result

FRAME_BYTES = 64 * 1024
WINDOW_FRAMES = 64  # a replica makes no more than this, or WINDOW_BYTES, beyond what the reader has taken
WINDOW_BYTES = 1024 * 1024
IDLE_TIMEOUT_S = 60.0  # between chunks, and for how long a reader may take nothing
RESUME_GRACE_S = 30.0  # for how long a resumable stream waits for a reader
KEPT_FRAMES = 10_000  # of a resumable stream
KEPT_BYTES = 16 * 1024 * 1024
CREDIT_EVERY_S = 5.0  # a credit that was lost is repeated after this

REPLICA_LOST = "mqserve.ReplicaLost"


class Form(StrEnum):
    """What the chunks of a stream are."""

    BODY = "body"  # parts of an HTTP body, whose boundaries mean nothing
    ITEMS = "items"  # one chunk for each item that the handler yielded, for server-sent events: text as it is, other values as JSON
    VALUES = "values"  # one chunk for each item, each encoded as a result for a handle is


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """What comes before the first chunk. `replica` is the id of the replica that runs it, whose feed takes credit; `length` is that of the
    whole body, if it is known."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)] = 200
    content_type: str = "application/octet-stream"
    headers: Pairs = ()
    form: Form = Form.BODY
    replica: str = ""
    resumable: bool = False
    idle_s: float = IDLE_TIMEOUT_S  # the backend's `stream_idle_timeout_s`
    length: int | None = None


class Frame(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """A part of a chunk, or all of it. `more` says that the chunk goes on in the next frame, `rest` that it began in an earlier one;
    `content_type` is that of a chunk which is a value or empty. A frame with a head but without data and type shows the head alone, and
    belongs to no chunk."""

    data: bytes
    more: bool = False
    content_type: str = ""
    head: Head | None = None
    rest: bool = False

    def to_bytes(self) -> bytes:
        return _encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Frame:
        """Raises BadEnvelope."""
        try:
            return _decode_frame(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(
                f"a part of a streamed answer does not parse ({error}): another program or version wrote it; send the request again"
            ) from error


class Chunk(NamedTuple):
    """What the handler yielded once; `seq` is that of its last frame."""

    seq: int
    data: bytes
    content_type: str = ""


class Ending(Enum):
    """How a streamed answer ended."""

    DONE = "done"
    FAILED = "failed"  # the handler raised
    CANCELLED = "cancelled"
    LATE = "late"
    GONE = "gone"  # the backend ended
    LOST = "lost"  # the replica died, or what it had made cannot be read any more


class End(NamedTuple):
    """The end of a streamed answer, after `frames` frames. `error` says why for all but DONE."""

    outcome: Ending
    frames: int
    error: ErrorInfo | None = None
    status: int = 200  # of the error

    @classmethod
    def of(cls, result: Result) -> End:
        """Reads the end from the recorded result."""
        if result.error is None:
            return cls(Ending.DONE, result.frames)
        if result.error.type == REPLICA_LOST:
            ending = Ending.LOST
        else:
            ending = Ending.FAILED if result.outcome is None else _ENDINGS[result.outcome]
        return cls(ending, result.frames, result.error, result.status)


class Owner(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which run writes a stream: what `owner:{id}` holds. A later run replaces it by compare-and-set, and the earlier one's writes are
    refused from then on."""

    replica: str
    attempt: int
    backend: str
    endpoint: str = ""
    resumable: bool = False
    token: bytes = b""
    head_alone: bool = False  # the head was shown before the first chunk, in a frame that another run does not make again
    replays: bool = False  # another replica goes on with the answer if this one dies

    @classmethod
    def new(cls, replica: str, attempt: int, backend: str, endpoint: str = "", *, resumable: bool = False, replays: bool = False) -> Owner:
        return cls(replica, attempt, backend, endpoint, resumable, os.urandom(8), replays=replays)

    def to_bytes(self) -> bytes:
        return _encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Owner:
        """Raises BadEnvelope."""
        try:
            return _decode_owner(raw)
        except UNPARSABLE as error:
            raise BadEnvelope(f"the owner of the stream does not parse ({error}): another program or version wrote it") from error


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """What a reader tells the replica, in the replica's feed: it has taken all frames up to `seq`, with `size` bytes of data in all since
    the first one it got. `left` says that it does not read on. Cumulative, so that one that was lost does not matter."""

    v: int
    id: str
    inbox: str  # where the reader wants to be told of frames
    seq: int
    size: int
    left: bool = False
    renews: bool = False  # it was told of frames before, and takes them from no later reader

    def to_bytes(self) -> bytes:
        return _encode(self)


def lost_result(backend: str, frames: int = 0) -> Result:
    """Returns the end of an answer of which a part was shown, and whose run does not go on."""
    message = "the replica that made this answer was lost before its end: send the request again, or have it run again by on_death='replay'"
    return Result(status=502, backend=backend, error=ErrorInfo(type=REPLICA_LOST, message=message), frames=frames)


def read_credit(raw: bytes) -> Credit | None:
    """Returns the credit, or None for what is none, or of a version that this process does not know."""
    try:
        credit = _decode_credit(raw)
    except UNPARSABLE:
        return None
    return credit if credit.v == 1 else None


def frames_of(data: bytes, content_type: str = "", head: Head | None = None) -> Iterator[Frame]:
    """Cuts one chunk into frames; the first one gets the head."""
    if len(data) <= FRAME_BYTES:
        yield Frame(data, False, content_type, head)
        return
    for start in range(0, len(data), FRAME_BYTES):
        has_more = start + FRAME_BYTES < len(data)
        yield Frame(data[start : start + FRAME_BYTES], has_more, content_type, None if start else head, rest=start > 0)


def note_of(future_id: str, seq: int, frame: bytes) -> bytes:
    """Returns the inbox entry that tells of a frame."""
    return InboxEntry(1, future_id, CHUNK_KIND, seq, frame).to_bytes()


_ENDINGS = {Outcome.CANCELLED: Ending.CANCELLED, Outcome.LATE: Ending.LATE, Outcome.GONE: Ending.GONE}
_encode = msgspec.msgpack.Encoder().encode
_decode_frame = msgspec.msgpack.Decoder(Frame).decode
_decode_owner = msgspec.msgpack.Decoder(Owner).decode
_decode_credit = msgspec.msgpack.Decoder(Credit).decode
