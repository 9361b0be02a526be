"""Many jobs over HTTP: clients that wait cost Redis nothing meanwhile, and a proxy keeps nothing of the jobs that it has sent."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
import pytest
import redis

import mqserve as serve
from tests.gates import Gate, work_behind
from tests.instances import Deploy, new_namespace, started, wait_until

pytestmark = pytest.mark.long

JOBS, POLLS = 1_000, 10_000
QUEUED, FIRST = 50_000, 10_000
BODY = b"x" * 1000

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def alone(broker_url: str, store_url: str) -> Iterator[serve.Client]:
    """An instance of its own, whose proxy is measured."""
    with started(broker_url=broker_url, store_url=store_url, namespace=new_namespace("many-jobs")) as client:
        yield client


class Connections:
    """Keeps connections to a proxy open, and sends requests over them, one at a time over each."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)

    async def ask(self, streams: Streams, line: str, *headers: str, body: bytes = b"") -> tuple[int, bytes]:
        reader, writer = streams
        lines = [f"{line} HTTP/1.1", f"Host: {self._address.netloc}", f"Content-Length: {len(body)}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(int(line[16:]) for line in answered.splitlines() if line.lower().startswith("content-length: "))
        return int(answered.split(" ", 2)[1]), await reader.readexactly(length)

    async def open(self) -> Streams:
        return await asyncio.open_connection(self._address.hostname, self._address.port)

    async def submit(self, count: int, at_once: int = 64) -> list[str]:
        """The ids of so many jobs."""
        ids: list[str] = []

        async def some() -> None:
            streams = await self.open()
            while len(ids) < count:
                ids.append("")
                at = len(ids) - 1
                status, body = await self.ask(streams, f"POST {self._address.path}", "Prefer: respond-async", body=BODY)
                assert status == 202, body
                ids[at] = json.loads(body)["id"]
            streams[1].close()

        await asyncio.gather(*(some() for _ in range(at_once)))
        return ids


def commands(store: redis.Redis) -> int:
    stats = store.info("commandstats")
    return sum(entry["calls"] for name, entry in stats.items() if name != "cmdstat_info")


async def commands_a_second(store: redis.Redis, seconds: float = 5.0) -> float:
    before = commands(store)
    await asyncio.sleep(seconds)
    return (commands(store) - before) / seconds


def memory_of_proxy() -> int:
    [proxy] = [child for child in psutil.Process().children(recursive=True) if "proxy" in child.cmdline()]
    return int(proxy.memory_info().rss)


def test_ten_thousand_clients_that_wait_ask_redis_nothing(alone: serve.Client, store_url: str, gate: Gate) -> None:
    url = Deploy(alone).at(work_behind(gate))
    with redis.Redis.from_url(store_url) as store:
        asyncio.run(poll_all(Connections(url), store, gate))


async def poll_all(site: Connections, store: redis.Redis, gate: Gate) -> None:
    ids = await site.submit(JOBS)
    idle = await commands_a_second(store)

    async def ask(number: int) -> str:
        streams = await site.open()
        try:
            status, body = await site.ask(streams, f"GET /-/futures/{ids[number % JOBS]}?wait=60")
            return str(json.loads(body)["status"]) if status == 200 else f"{status}"
        finally:
            streams[1].close()

    async def poll(number: int) -> str:
        """Asks again where a client would: a minute is over, or the proxy is too busy to reach Redis, which a loaded machine may cause."""
        while True:
            began = time.monotonic()
            found = await ask(number)
            if found == "503" and len(refused) < POLLS // 100:
                refused.append(number)
                await asyncio.sleep(1)
            elif found not in ("queued", "running") or time.monotonic() - began < 59:
                return found

    refused: list[int] = []
    polls: list[asyncio.Task[str]] = []
    for first in range(0, POLLS, 200):  # no faster than a listener's backlog takes them
        polls += [asyncio.create_task(poll(number)) for number in range(first, first + 200)]
        await asyncio.sleep(0.1)
    rates: list[float] = []
    while not rates or rates[-1] > idle + 20:
        assert len(rates) < 20, f"{idle:.0f} commands a second before the polls, then {rates}"
        rates.append(await commands_a_second(store, 3.0))
    ended = [poll for poll in polls if poll.done()]
    assert not ended, ended[:3]
    gate.open()
    async with asyncio.timeout(60):
        found = Counter(await asyncio.gather(*polls))
    assert set(found) == {"succeeded"}, found


def test_a_proxy_keeps_nothing_of_fifty_thousand_jobs_that_wait(alone: serve.Client, gate: Gate) -> None:
    backend = Deploy(alone)(work_behind(gate), route="/held")
    site = Connections(f"{alone.http_url()}/held")
    asyncio.run(site.submit(FIRST))
    before = memory_of_proxy()
    asyncio.run(site.submit(QUEUED - FIRST))
    after = memory_of_proxy()
    assert after - before < 8 * 1024 * 1024, f"{before / 2**20:.1f} MiB, then {after / 2**20:.1f}"
    alone.delete_endpoint(backend)
    gate.open()
    alone.delete_backend(backend, force=True)
    wait_until(lambda: backend not in alone.list_backends())
