"""Collects what a Starlette response sends when it runs as an ASGI app, since results travel in one piece."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.errors import TooLarge

Message = MutableMapping[str, Any]


def is_whole(response: Response) -> bool:
    """Whether the response is complete without being run: a plain Response without a background task."""
    return type(response).__call__ is Response.__call__ and response.background is None


class Collected:
    """Collects the parts of one response. `on_whole` is called once, with the whole response, as soon as the last part has come."""

    def __init__(self, on_whole: Callable[[Response], None]) -> None:
        self._on_whole = on_whole
        self._status = 0  # 0 until the response begins
        self._headers: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self._size = 0
        self.is_whole = False

    def __repr__(self) -> str:
        return f"<Collected {self._size} bytes of a {self._status or 'response that has not begun'}>"

    @property
    def is_too_large(self) -> bool:
        return self._size > MAX_BODY_BYTES

    async def send(self, message: Message) -> None:
        """ASGI's `send`. Raises TooLarge for a body above the limit, which also ends an endless response."""
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body" and not self.is_whole:
            self._take(bytes(message.get("body", b"")))
            if not message.get("more_body"):
                self.is_whole = True
                whole = Response(b"".join(self._chunks), status_code=self._status)
                whole.raw_headers = self._headers
                self._chunks.clear()
                self._on_whole(whole)

    def _take(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self.is_too_large:
            self._chunks.clear()
            raise TooLarge(f"the answer has more than {MAX_BODY_BYTES} bytes")
        self._chunks.append(chunk)
