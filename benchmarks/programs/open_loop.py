"""Requests at a fixed rate, whether the earlier ones are answered or not: `open_loop.py URL RATE SECONDS`.

A latency counts from the time at which the request was due, so that a generator or a server that falls behind cannot hide it. Prints JSON:
for each status the latencies in seconds, as `sent_late_s` how much later than due each request was sent, and as `ended_s` when all were
answered.
"""

import asyncio
import json
import re
import sys
import time
from collections import defaultdict
from urllib.parse import urlsplit

TICK_S = 0.001
MAX_CONNECTIONS = 2000
ANSWER_BUDGET_S = 30.0


class Generator:
    """The requests of one run, and the connections that wait for their next one."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        self.idle: list[Connection] = []
        self.latencies_s: dict[str, list[float]] = defaultdict(list)
        self.sent_late_s: list[float] = []
        self.under_way = 0
        self._host, self._port = parts.hostname, parts.port
        self._connections = 0

    async def run(self, rate: float, seconds: float) -> float:
        """Sends all requests, and returns after how many seconds the last one was answered."""
        await self._connect(64)
        began = time.perf_counter()
        sent, count = 0, round(rate * seconds)
        while sent < count:
            now = time.perf_counter()
            due = min(count, int((now - began) * rate))
            while sent < due:
                if not self.idle:
                    await self._connect(16)
                intended = began + sent / rate
                self.sent_late_s.append(time.perf_counter() - intended)
                self.idle.pop().send(intended)
                sent += 1
            await asyncio.sleep(TICK_S)
        async with asyncio.timeout(ANSWER_BUDGET_S):
            while self.under_way:
                await asyncio.sleep(TICK_S)
        return time.perf_counter() - began

    async def _connect(self, count: int) -> None:
        self._connections += count
        if self._connections > MAX_CONNECTIONS:
            sys.exit(f"{self._connections} requests are under way: the server does not keep its queue short")
        loop = asyncio.get_running_loop()
        for _ in range(count):
            await loop.create_connection(lambda: Connection(self), self._host, self._port)


class Connection(asyncio.Protocol):
    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._intended: float | None = None  # when the request under way was due
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._generator.idle.append(self)

    def send(self, intended: float) -> None:
        self._intended = intended
        self._generator.under_way += 1
        self._transport.write(self._generator.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if found and (length is None or len(body) >= int(length[1])):
            self._received = b""
            self._end(head[9:12].decode())
            self._generator.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._generator.idle:
            self._generator.idle.remove(self)
        self._end("lost")

    def _end(self, outcome: str) -> None:
        if self._intended is not None:
            self._generator.latencies_s[outcome].append(time.perf_counter() - self._intended)
            self._generator.under_way -= 1
            self._intended = None


def main() -> None:
    generator = Generator(sys.argv[1])
    ended_s = asyncio.run(generator.run(float(sys.argv[2]), float(sys.argv[3])))
    print(json.dumps({"latencies_s": generator.latencies_s, "sent_late_s": generator.sent_late_s, "ended_s": ended_s}))


if __name__ == "__main__":
    main()
