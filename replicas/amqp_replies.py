"""A result as a plain AMQP reply, as every RPC tutorial teaches."""

from __future__ import annotations

import asyncio

import msgspec

from ..broker.codecs import JSON
from ..broker.envelope import NO_HEADER, Envelope
from ..broker.errors import MQServeError
from ..broker.queue import Queue, telling
from ..broker.results import ErrorInfo, Result

MAX_REPLY_BYTES = 8 * 1024 * 1024  # RabbitMQ 4.x takes 16 MiB, and closes the channel above it


async def send_reply(queue: Queue, backend: str, request: Envelope, result: Result) -> None:
    """Returns once the broker has taken it; a queue of the caller's that is gone is no error. Raises BrokerUnavailable."""
    settled: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
    queue.reply(_reply(backend, request, result), request.reply_to, telling(settled))
    if error := await settled:
        raise error


def _reply(backend: str, request: Envelope, result: Result) -> Envelope:
    if len(result.body) > MAX_REPLY_BYTES:
        where = (
            f"read it under {request.id!r} in the store" if request.id else "send the request with a message_id and read it in the store"
        )
        message = f"the result has {len(result.body)} bytes, and a reply carries {MAX_REPLY_BYTES}: {where}"
        result = Result(status=500, backend=backend, error=ErrorInfo(type="mqserve.TooLarge", message=message))
    body, content_type = result.body, result.content_type
    if result.error is not None:
        body, content_type = msgspec.json.encode({"error": {"type": result.error.type, "message": result.error.message}}), JSON
    return Envelope(request.id, body, content_type, NO_HEADER, correlation_id=request.correlation_id, status=result.status)
