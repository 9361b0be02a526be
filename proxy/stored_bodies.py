"""Answers whose bodies are files: they go out in pieces, so that no proxy holds one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from ..broker.result_files import OpenBody, ResultFiles
from ..broker.results import Result
from .responses import NO_BODY, from_result

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

AnyReply = tuple[int, list[tuple[bytes, bytes]], bytes | OpenBody]
"""A `Reply`, or one whose body is open. Whoever has it sends it."""


async def reply_of(files: ResultFiles, future_id: str, result: Result, request_id: str, *, debug: bool, to_head: bool = False) -> AnyReply:
    """Does the same as `from_result`, also for a result whose body is a file. Raises BodyGone."""
    status, headers, body = reply = from_result(result, request_id, debug=debug, to_head=to_head)
    if result.file is None or status in NO_BODY:
        return reply
    if to_head:
        return status, [*headers, (b"content-length", b"%d" % result.file.size)], body
    return status, headers, await files.open(future_id, result.file)


class Download:
    """A body on its way to a client, by ASGI."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: OpenBody) -> None:
        self._head = {"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", b"%d" % body.size)]}
        self._body = body
        self.has_left = False  # the client, so the rest is not read

    def __repr__(self) -> str:
        return f"<Download of {self._body!r}>"

    async def send(self, send: Send) -> None:
        try:
            await send(self._head)
            async with aclosing(self._body.pieces()) as pieces:
                async for piece in pieces:
                    if self.has_left:
                        return
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._body.close()
