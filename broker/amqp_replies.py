"""Sends a result as a plain AMQP reply, the way every RPC tutorial teaches; of a streamed answer a message for each chunk, and the end."""

from __future__ import annotations

import logging
from functools import partial

import msgspec

from .envelope import NO_HEADER, Envelope, EventReply, StreamReply
from .errors import BadEnvelope, Overloaded
from .jobs import EventKind, JobEvent
from .process.printable import printable
from .queue import Queue, fate_of
from .results import ErrorInfo, Result
from .streams import Frame
from .values.codecs import JSON, TEXT

logger = logging.getLogger(__name__)

MAX_REPLY_BYTES = 8 * 1024 * 1024  # RabbitMQ 4.x takes 16 MiB, and closes the channel above it
_BINARY = "application/octet-stream"


async def send_reply(queue: Queue, backend: str, request: Envelope, result: Result, budget_s: float, chunks: int | None = None) -> None:
    """Sends the result, or the end of an answer that was streamed in so many `chunks`. Returns once the broker has taken the reply. It is
    dropped if the caller's queue is gone or full, or if AMQP cannot carry the answer (a content type of 300 bytes): a retry would end the
    same way.

    Raises BrokerUnavailable.
    """
    try:
        error = await fate_of(partial(queue.reply, _reply(backend, request, result, chunks), request.reply_to), budget_s)
    except BadEnvelope as bad:
        error = bad
    if isinstance(error, Overloaded):
        logger.warning("a reply of %s is dropped: the caller's queue %r is full, give it room or a consumer", backend, request.reply_to)
    elif isinstance(error, BadEnvelope):
        logger.warning("a reply of %s is dropped: AMQP cannot carry what the handler returned (%s)", backend, printable(str(error)))
    elif error is not None:
        raise error


def _reply(backend: str, request: Envelope, result: Result, chunks: int | None) -> Envelope:
    size = len(result.body) if result.file is None else result.file.size
    if size > MAX_REPLY_BYTES:
        where = (
            f"read it under {request.id!r} in the store" if request.id else "send the request with a message_id and read it in the store"
        )
        message = f"the result has {size} bytes, and a reply carries {MAX_REPLY_BYTES}: {where}"
        result = Result(status=500, backend=backend, error=ErrorInfo(type="mqserve.TooLarge", message=message))
    body, content_type = result.body, result.content_type
    if result.error is not None:
        body, content_type = msgspec.json.encode({"error": {"type": result.error.type, "message": result.error.message}}), JSON
    correlation_id, status = request.correlation_id, result.status
    if chunks is not None:
        return StreamReply(request.id, body, content_type, correlation_id=correlation_id, status=status, seq=chunks + 1, ends=True)
    return Envelope(request.id, body, content_type, NO_HEADER, correlation_id=correlation_id, status=status)


def reply_of_chunk(request: Envelope, seq: int, chunk: Frame) -> Envelope:
    return StreamReply(request.id, chunk.data, chunk.content_type, correlation_id=request.correlation_id, seq=seq)


def reply_of_event(request: Envelope, event: JobEvent) -> Envelope:
    """Returns what the caller is told: progress, a line of the log, or a chunk."""
    body, content_type = (event.data, _BINARY) if event.data else (event.text.encode(), TEXT)
    offset = event.offset if event.kind is EventKind.CHUNK else None
    return EventReply(
        request.id, body, content_type, correlation_id=request.correlation_id, kind=event.kind, fraction=event.fraction, offset=offset,
        cut=event.cut,
    )  # fmt: skip
