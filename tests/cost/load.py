"""Requests for the measurement of their cost: always so many under way, each connection kept alive. It needs no program beside Python."""

import asyncio
import re
from urllib.parse import urlsplit

CLIENTS = 64
GIVEN_S = 60.0


def load(url: str, count: int, clients: int = CLIENTS) -> None:
    """Returns when so many requests were answered with 200. Raises on any other answer, and when a connection ends."""
    asyncio.run(asyncio.wait_for(_load(url, count, clients), GIVEN_S))


async def _load(url: str, count: int, clients: int) -> None:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    host, port = parts.hostname, parts.port
    remaining = Remaining(count)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    connections = [await loop.create_connection(lambda: Client(request, remaining), host, port) for _ in range(clients)]
    try:
        await asyncio.gather(*(client.ended for _, client in connections))
    finally:
        for transport, _ in connections:
            transport.abort()


class Remaining:
    """The requests that none of the clients has sent yet."""

    def __init__(self, count: int) -> None:
        self._count = count

    def take(self) -> bool:
        self._count -= 1
        return self._count >= 0


class Client(asyncio.Protocol):
    """One connection; it sends its next request when the last one is answered."""

    def __init__(self, request: bytes, remaining: Remaining) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._remaining = remaining
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or len(body) < _content_length(head):
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            self._end(AssertionError(self._received.decode(errors="replace")))
            return
        self._received = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionResetError("the server closed the connection"))

    def _send(self) -> None:
        if self._remaining.take():
            self._transport.write(self._request)
        else:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def _content_length(head: bytes) -> int:
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    assert found is not None, head
    return int(found[1])
