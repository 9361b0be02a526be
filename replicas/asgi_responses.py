"""What a response sends when it runs as an ASGI app: collected where it comes at once or its caller takes one piece, else streamed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

from starlette.responses import Response

from ..broker.errors import TooLarge
from ..broker.values.codecs import JSON, media_type
from .chunks import NDJSON
from .stages import KeptJob

Message = MutableMapping[str, Any]

_UTF_8 = ("utf-8", "utf8", "us-ascii")


def is_whole(response: Response) -> bool:
    """Whether the response is complete without being run: a plain Response without a background task."""
    return type(response).__call__ is Response.__call__ and response.background is None


def is_text(headers: Mapping[str, str]) -> bool:
    """Whether a body with these headers should be text in UTF-8."""
    content_type = headers.get("content-type", "")
    kind, charset = media_type(content_type), re.search(r"charset=\W*([\w-]+)", content_type, re.IGNORECASE)
    if headers.get("content-encoding", "identity") != "identity" or (charset is not None and charset[1].lower() not in _UTF_8):
        return False
    return kind.startswith("text/") or kind in (JSON, NDJSON) or kind.endswith("+json")


class Stream(Protocol):
    """See `sinks.ResponseStream`."""

    async def send(self, data: bytes) -> None: ...

    def end(self) -> None: ...


class Left(OSError):
    """Nobody reads the rest of the response. Starlette takes an OSError of `send` as a client that has gone."""


class Collected:
    """Collects the parts of one response. `on_whole` is called once, with the whole response, as soon as the last part has come.

    If a first part comes that is not the last, `begin` is called with the head: it returns the stream that takes the parts, or None. Then
    `followed`, a job, has the parts for those who follow it. Of an answer to HEAD the head alone is the whole.
    """

    def __init__(
        self,
        on_whole: Callable[[Response], None],
        begin: Callable[[Response], Stream | None],
        *,
        head_only: bool,
        at_most: int,
        followed: KeptJob | None = None,
    ) -> None:
        self._on_whole = on_whole
        self._begin = begin
        self._head_only = head_only
        self._at_most = at_most
        self._followed = followed
        self._status = 0  # 0 until the response begins
        self._headers: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self._size = 0
        self._parts = 0
        self._stream: Stream | None = None
        self._filled_parts = 0  # those that are not empty
        self._is_text = False
        self.is_whole = False

    def __repr__(self) -> str:
        return f"<Collected {self._size} bytes of a {self._status or 'response that has not begun'}>"

    @property
    def is_too_large(self) -> bool:
        return self._stream is None and self._size > self._at_most

    async def send(self, message: Message) -> None:
        """ASGI's `send`. Raises TooLarge for a body above the limit, which also ends an endless response in one piece."""
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            if self.is_whole:
                return self._check_is_read()
            await self._take(bytes(message.get("body", b"")), more=bool(message.get("more_body")))

    async def _take(self, chunk: bytes, *, more: bool) -> None:
        self._parts += 1
        if self._head_only:
            return self._end(b"")
        if more and self._parts == 1:
            head = self._response(b"")
            self._stream = self._begin(head)
            self._is_text = self._followed is not None and is_text(head.headers)
        if self._stream is None:
            self._collect(chunk)
            if self._followed is not None and chunk:
                self._tell(self._followed, chunk)
        elif chunk or self._parts == 1:
            await self._stream.send(chunk)
        if not more:
            if self._stream is not None:
                self._stream.end()
            self._end(b"".join(self._chunks))

    def _tell(self, job: KeptJob, part: bytes) -> None:
        """Tells the parts once there are two. Middlewares send each response as one part with an empty one behind it: its result comes at
        once."""
        self._filled_parts += 1
        if self._filled_parts > 1:
            for one in self._chunks if self._filled_parts == 2 else (part,):
                job.chunks.put(one, is_text=self._is_text)

    def _end(self, body: bytes) -> None:
        self.is_whole = True
        self._chunks.clear()
        self._on_whole(self._response(body))

    def _response(self, body: bytes) -> Response:
        response = Response(body, status_code=self._status)
        response.raw_headers = self._headers
        return response

    def _check_is_read(self) -> None:
        if self._head_only:
            raise Left("an answer to HEAD has no body")

    def _collect(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self.is_too_large:
            self._chunks.clear()
            raise TooLarge(f"the answer has more than {self._at_most} bytes")
        self._chunks.append(chunk)
