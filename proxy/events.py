"""Server-sent events: how a streamed answer becomes one, and how a client goes on with it, on any proxy.

The id of an event is `<request id>:<number of the chunk>`. A client that was cut off sends the last one that it has as `Last-Event-ID`.
"""

from __future__ import annotations

import asyncio
import re
import time
from asyncio.events import TimerHandle
from collections.abc import Sequence
from typing import NamedTuple

from ..broker.calls.incoming import IncomingStream
from ..broker.calls.incoming_streams import IncomingStreams
from ..broker.envelope import is_minted
from ..broker.results import Result
from ..broker.streams import Chunk, End, Ending, Form
from .responses import Reply, from_result, problem
from .routes import Target
from .streaming import Flow, head_reply

RETRY_MS = 1000  # after which a client that was cut off comes back
RECONNECT_MS = 100  # while this proxy ends
SILENCE_S = 10.0  # after which a comment shows that the connection lives; it is looked for every five seconds
_LOOK_EVERY_S = 5.0

_PLACE = re.compile(rb"([0-9a-f]{32}):(\d{1,15})")
_LINE_END = re.compile(rb"\r\n|\r|\n")
EVENT_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
COMMENT = b":\n"  # without an empty line: some clients take a block without data for an event
_OURS = frozenset(name for name, _ in EVENT_HEADERS)


class EventId(NamedTuple):
    """Where a client stopped: it has all events of this request up to `seq`."""

    future_id: str
    seq: int


def read_event_id(raw: bytes) -> EventId | None:
    """Returns the place that a Last-Event-ID names, or None if it is not one of ours."""
    found = _PLACE.fullmatch(raw)
    return None if found is None else EventId(found[1].decode(), int(found[2]))


class EventBody:
    """A streamed answer as server-sent events, behind the event `after`. `gap` is the first number that is there, if others should be."""

    between = COMMENT

    def __init__(self, stream: IncomingStream, owner: EventStreams, after: int = 0, gap: int = 0, *, debug: bool = False) -> None:
        self.stream = stream
        self._owner = owner
        self._after = after
        self._gap = gap
        self._debug = debug
        self._id = b"%b:" % stream.id.encode()
        self._is_resumable = stream.head is not None and stream.head.resumable
        self._reconnects = self.is_over = False
        self._sent_at = time.monotonic()

    def __repr__(self) -> str:
        return f"<EventBody of {self.stream!r}>"

    def begin(self) -> bytes:
        self._owner.add(self)
        if not self._is_resumable:
            return COMMENT
        first = b"id: %b%d\nretry: %d\n\n" % (self._id, self._after, RETRY_MS)
        return first + b'event: gap\ndata: {"first":%d}\n\n' % self._gap if self._gap else first

    def of(self, chunks: Sequence[Chunk]) -> list[bytes]:
        now = time.monotonic()
        if self._reconnects:
            self.is_over = True
            return [b"retry: %d\n\n" % RECONNECT_MS]
        if not chunks and now - self._sent_at < SILENCE_S:
            return []
        self._sent_at = now
        return [self._event(chunk) for chunk in chunks] if chunks else [COMMENT]

    def last(self, end: End) -> bytes:
        if end.outcome is Ending.DONE:
            return b"event: end\ndata: {}\n\n"
        _, _, told = from_result(Result(status=end.status, error=end.error), self.stream.id, debug=self._debug)
        # with the number behind the last one, a client that comes back has all; one that only this reader failed gets the rest
        number = b"id: %b%d\n" % (self._id, end.frames + 1) if self._is_resumable and self.stream.is_recorded else b""
        return b"%bevent: failure\ndata: %b\n\n" % (number, told)

    def close(self) -> None:
        self._owner.remove(self)

    def reconnect(self) -> None:
        """Lets the client come back to another proxy."""
        if self._is_resumable:
            self._reconnects = True
            self.stream.nudge()

    def look(self, now: float) -> None:
        if now - self._sent_at >= SILENCE_S:
            self.stream.nudge()

    def _event(self, chunk: Chunk) -> bytes:
        number = [b"id: %b%d" % (self._id, chunk.seq)] if self._is_resumable else []
        return b"\n".join([*number, *(b"data: " + line for line in _LINE_END.split(chunk.data)), b"\n"])


class EventStreams:
    """All server-sent events of a proxy, with one timer for their silences."""

    def __init__(self, streams: IncomingStreams, *, debug: bool) -> None:
        self._streams = streams
        self._debug = debug
        self._bodies: set[EventBody] = set()
        self._timer: TimerHandle | None = None
        self._ending = False

    def __repr__(self) -> str:
        return f"<EventStreams, {len(self._bodies)} open>"

    def flow(self, stream: IncomingStream, backend: str, route: str | None, *, after: int = 0, gap: int = 0) -> Flow:
        """Returns the answer that sends a stream as events."""
        assert stream.head is not None, "a stream is shown with its head"
        status, headers, _ = head_reply(stream.head, backend, stream.id)
        kept = [(name, value) for name, value in headers if name.lower() not in _OURS and name != b"content-length"]
        return Flow((status, [*EVENT_HEADERS, *kept], b""), stream, EventBody(stream, self, after, gap, debug=self._debug), route)

    async def resume(self, place: EventId, target: Target | None = None) -> Reply | Flow:
        """Returns the answer that goes on behind a place; where a target is given, only for requests to its endpoint. Raises
        MQServeError."""
        owner = await self._streams.owner(place.future_id) if is_minted(place.future_id) else None
        if owner is None or not owner.resumable or (target is not None and owner.endpoint != target.endpoint.name):
            detail = (
                "There is no answer to go on with: its id is unknown here, or nothing of it is kept any more. Send the request again "
                "without Last-Event-ID."
            )
            return problem(404, detail, place.future_id)
        if (found := await self._streams.resume(place.future_id, owner, place.seq, Form.ITEMS)) is None:
            return problem(404, "This answer is not a stream of events.", place.future_id)
        stream, first = found
        if (end := stream.heard_end) is not None and (end.outcome is Ending.DONE or place.seq > end.frames):
            return 204, [(b"x-request-id", place.future_id.encode())], b""
        route = target.pattern if target is not None else None
        return self.flow(stream, owner.backend, route, after=place.seq, gap=first if first > place.seq + 1 else 0)

    def add(self, body: EventBody) -> None:
        self._bodies.add(body)
        if self._ending:
            body.reconnect()
        if self._timer is None:
            self._set_timer()

    def remove(self, body: EventBody) -> None:
        self._bodies.discard(body)

    def reconnect(self) -> None:
        """Lets all clients that can come back do that, and those that come from now on."""
        self._ending = True
        for body in self._bodies:
            body.reconnect()

    def _set_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        for body in self._bodies:
            body.look(now)
        if self._bodies:
            self._set_timer()
