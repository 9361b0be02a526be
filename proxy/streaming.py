"""Streamed answers over HTTP: what of an answer is a body, and how it goes out by ASGI (`plain_edge.py` has the way without)."""

from __future__ import annotations

import math
import socket
import struct
from asyncio import Transport
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from ..broker.calls.incoming import IncomingStream
from ..broker.results import Result
from ..broker.streams import Chunk, End, Ending, Head
from .responses import Reply, from_result

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CUT = "mqserve.cut"
"""Where the scope of a request has a function that cuts its connection."""

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closed at once, without a FIN


class FlowEnd(StrEnum):
    """How a streamed answer ended for its client, as the metrics count it."""

    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"  # the client left, or the request was cancelled
    MOVED = "moved"  # this proxy ends, and the client goes on by another one

    @classmethod
    def of(cls, end: End | None) -> FlowEnd:
        """What an answer that was sent up to here ended in; None where its body was over before the answer."""
        if end is None:
            return cls.MOVED
        match end.outcome:
            case Ending.DONE:
                return cls.COMPLETE
            case Ending.CANCELLED:
                return cls.CANCELLED
            case _:
                return cls.FAILED


class CutShort(Exception):
    """An answer whose head is out stays incomplete, and its client has to see that."""

    def __init__(self, why: str, end: FlowEnd = FlowEnd.FAILED) -> None:
        super().__init__(why)
        self.end = end


class Body(Protocol):
    """What the chunks of one answer are in its body. Each method may raise CutShort."""

    @property
    def is_over(self) -> bool:
        """Whether the body ends here, though the answer goes on."""
        ...

    @property
    def between(self) -> bytes:
        """What may be sent between two parts and means nothing."""
        ...

    def begin(self) -> bytes:
        """What comes before the first chunk."""
        ...

    def of(self, chunks: Sequence[Chunk]) -> list[bytes]:
        """What is sent for these; there are none when the stream was nudged."""
        ...

    def last(self, end: End) -> bytes:
        """What comes behind the last chunk."""
        ...

    def close(self) -> None:
        """Nothing more is sent."""
        ...


@dataclass(frozen=True, slots=True)
class Flow:
    """An answer that flows: its status and headers in `reply`. `route` is the pattern of the route that counts it, if one does."""

    reply: Reply
    stream: IncomingStream
    body: Body
    route: str | None


class RawBody:
    """The chunks, one behind the other. `length` is that of all, if the handler has said it."""

    is_over = False
    between = b""

    def __init__(self, length: int | None) -> None:
        self._left = length

    def __repr__(self) -> str:
        return f"<RawBody, {self._left} bytes left>"

    def begin(self) -> bytes:
        return b""

    def of(self, chunks: Sequence[Chunk]) -> list[bytes]:
        parts = [chunk.data for chunk in chunks if chunk.data]
        if self._left is not None:
            self._left -= sum(map(len, parts))
            if self._left < 0:
                raise CutShort("the handler made more than the Content-Length that it gave")
        return parts

    def last(self, end: End) -> bytes:
        if end.outcome is not Ending.DONE:
            raise CutShort(end.error.message if end.error is not None else end.outcome.value, FlowEnd.of(end))
        if self._left:
            raise CutShort(f"the handler made {self._left} bytes less than the Content-Length that it gave")
        return b""

    def close(self) -> None:
        pass


def head_reply(head: Head, backend: str, request_id: str, *, to_head: bool = False) -> Reply:
    """Status and headers of a streamed answer."""
    result = Result(status=head.status, backend=backend, content_type=head.content_type, headers=head.headers)
    status, headers, _ = from_result(result, request_id, debug=False)
    if head.length is not None and (to_head or status not in (204, 205, 304)):
        headers.append((b"content-length", b"%d" % head.length))
    return status, headers, b""


async def send_flow(flow: Flow, send: Send) -> FlowEnd:
    """Sends it by ASGI, and returns how it ended. Raises CutShort for an answer that stays incomplete: the connection has to be cut before
    a middleware ends it."""
    status, headers, _ = flow.reply
    stream, body = flow.stream, flow.body
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await _send_part(send, [body.begin()])
    while (end := stream.end) is None and not body.is_over:
        await _send_part(send, body.of(await stream.more()))
    await send({"type": "http.response.body", "body": b"" if end is None else body.last(end)})
    return FlowEnd.of(end)


async def _send_part(send: Send, parts: list[bytes]) -> None:
    if data := b"".join(parts):
        await send({"type": "http.response.body", "body": data, "more_body": True})


# HTTP/1.0 has no chunks: a body of unknown length ends with the connection, and uvicorn would send chunks all the same.


def until_the_end(cycle: Any) -> Send:
    """Returns the `send` of a uvicorn cycle for HTTP/1.0."""

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                cycle.chunked_encoding, cycle.expected_content_length = False, math.inf
        elif ends_with_connection(cycle) and not message.get("more_body"):
            cycle.expected_content_length = len(message.get("body", b""))
        await cycle.send(message)

    return send


def ends_with_connection(cycle: Any) -> bool:
    """Whether the body that is being sent ends with the connection."""
    return bool(cycle.expected_content_length == math.inf)


def cut(cycle: Any, transport: Transport) -> None:
    """Ends the connection in the middle of an answer. Where the end of the connection would be that of the body, it is a reset."""
    cycle.disconnected = cycle.response_complete = True
    cycle.message_event.set()
    if ends_with_connection(cycle):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()
    else:
        transport.close()
