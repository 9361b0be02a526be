"""Streams that clients read one after the other: `stream_load.py URL METHOD CLIENTS SECONDS`.

Counts chunks by their last byte, `~`, and not by the chunks of HTTP, which servers join. After so many seconds no client asks for another
stream, and those under way are read to their end. Prints JSON: `chunks` that came in those seconds, `all_chunks`, `streams` and `failed`
in all, `first_s` with the time to the first chunk of each stream, `late_s` with the age of each chunk that says when it was made, and
`cpu_s` that this process used for it.
"""

import asyncio
import json
import re
import sys
import time
from urllib.parse import urlsplit

END_BUDGET_S = 60.0  # for the streams that are under way when the time is over
LAST_CHUNK = b"\r\n0\r\n\r\n"
MADE_AT = re.compile(rb"(\d+\.\d{6})~")


class Load:
    """What all clients count."""

    def __init__(self, url: str, method: str) -> None:
        parts = urlsplit(url)
        body = "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" if method == "POST" else "\r\n"
        self.request = f"{method} {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{body}".encode()
        self.address = parts.hostname, parts.port
        self.until = 0.0
        self.under_way = 0
        self.chunks = self.all_chunks = self.streams = self.failed = 0
        self.first_s: list[float] = []
        self.late_s: list[float] = []

    async def run(self, clients: int, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(lambda: Client(self), *self.address) for _ in range(clients)]
        self.until = time.monotonic() + seconds
        for _, client in made:
            client.ask()
        end = self.until + END_BUDGET_S
        while self.under_way and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.failed += self.under_way


class Client(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self._load = load
        self._asked = 0.0
        self._head: bytes | None = None  # what came of it; None once it is over
        self._tail = b""
        self._is_first = self._is_asking = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def ask(self) -> None:
        self._head, self._tail, self._is_first, self._is_asking = b"", b"", True, True
        self._load.under_way += 1
        self._asked = time.monotonic()
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        load, now = self._load, time.monotonic()
        if self._head is not None:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 200") or b"chunked" not in head.lower():
                return self._transport.abort()
            self._head = None
        if count := data.count(b"~"):
            load.all_chunks += count
            load.chunks += count if now < load.until else 0
            if self._is_first:
                self._is_first = False
                load.first_s.append(now - self._asked)
        data = self._tail + data
        load.late_s += [now - float(made) for made in MADE_AT.findall(data)]
        self._tail = data[data.rfind(b"~") + 1 :]
        if data.endswith(LAST_CHUNK):
            self._over()

    def _over(self) -> None:
        load = self._load
        load.streams += 1
        load.under_way -= 1
        self._is_asking = False
        if time.monotonic() < load.until:
            self.ask()
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._is_asking:
            self._load.failed += 1
            self._load.under_way -= 1


def main() -> None:
    url, method, clients, seconds = sys.argv[1:]
    load = Load(url, method)
    started_s = time.process_time()
    asyncio.run(load.run(int(clients), float(seconds)))
    told = {name: getattr(load, name) for name in ("chunks", "all_chunks", "streams", "failed", "first_s", "late_s")}
    print(json.dumps({**told, "cpu_s": time.process_time() - started_s}))


if __name__ == "__main__":
    main()
