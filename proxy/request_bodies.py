"""Reads the body of a request that comes by ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.errors import Cancelled, TooLarge
from ..broker.overload import HeldBytes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


async def read_body(receive: Receive, held: HeldBytes) -> bytes:
    """Returns the whole body. What is read of it counts as held until it is whole; then its sending does. Raises TooLarge, Overloaded if
    this process holds too much already, and Cancelled if the client goes away meanwhile."""
    message = await _next_part(receive)
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return body
    chunks, size = [body], 0
    try:
        held.take(len(body))
        size = len(body)
        while message.get("more_body"):
            message = await _next_part(receive)
            body = message.get("body", b"")
            held.take(len(body))
            size += len(body)
            chunks.append(body)
            if size > MAX_BODY_BYTES:
                raise TooLarge(f"the body has more than {MAX_BODY_BYTES} bytes, the limit: send less, or a reference to it")
        return b"".join(chunks)
    finally:
        held.give(size)


async def _next_part(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Cancelled("the client went away before its request was complete")
    return message
