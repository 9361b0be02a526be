"""More than can be carried: refused at once, with the time to come back, and in bounded memory."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import mqserve as serve
from mqserve.broker.overload import MAX_HELD_BYTES
from tests.broker.traffic import until
from tests.gates import Gate
from tests.instances import Deploy, new_namespace, started, wait_until
from tests.servers import PrivateRabbitMQ, PrivateRedis

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def client(session_broker: PrivateRabbitMQ, session_store: PrivateRedis) -> Iterator[serve.Client]:
    with started(broker_url=session_broker.url, store_url=session_store.url, namespace=new_namespace("overload")) as client:
        yield client


def proxy_of(client: serve.Client) -> psutil.Process:
    children = psutil.Process(os.getpid()).children(recursive=True)
    (proxy,) = [child for child in children if {"--proxy-id", client.http_url().rpartition(":")[2]} <= set(command_of(child))]
    return proxy


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


async def burst(url: str, requests: int, body: bytes) -> list[int]:
    """The statuses of that many at once; 0 for a connection that was closed on us."""

    async def one(http: httpx.AsyncClient) -> int:
        try:
            return (await http.post(url, content=body)).status_code
        except httpx.TransportError:
            return 0

    limits = httpx.Limits(max_connections=requests)
    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        return await asyncio.gather(*[one(http) for _ in range(requests)])


@pytest.mark.row(23)
def test_a_full_queue_is_said_at_once_and_nothing_accepted_is_lost(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def handler(request: Any) -> str:
        gate.pass_through()
        return "done"

    url = deploy.at(handler, max_queued_requests=10, max_concurrent_queries=1)

    async def overflow() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=100)) as http:
            sending = [asyncio.create_task(http.post(url, content=b"x")) for _ in range(100)]
            await until(lambda: sum(task.done() for task in sending) >= 89, 60)
            gate.open()
            return await asyncio.gather(*sending)

    answers = asyncio.run(overflow())
    by_status = {status: [answer for answer in answers if answer.status_code == status] for status in (200, 429)}
    assert (len(by_status[200]), len(by_status[429])) == (11, 89)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in by_status[429])


@pytest.mark.row(23)
def test_the_time_to_come_back_follows_what_the_backend_takes(client: serve.Client, deploy: Deploy) -> None:
    def handler(request: Any) -> str:
        time.sleep(2)
        return "done"

    url = deploy.at(handler, max_queued_requests=1, max_concurrent_queries=1)
    assert httpx.post(url, content=b"x", timeout=30).status_code == 200

    async def overflow() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as http:
            return await asyncio.gather(*[http.post(url, content=b"x") for _ in range(10)])

    refused = [answer for answer in asyncio.run(overflow()) if answer.status_code == 429]
    assert refused and all(2 <= int(answer.headers["retry-after"]) <= 10 for answer in refused)


def test_a_burst_of_large_bodies_on_a_hanging_broker_is_bounded(
    client: serve.Client, deploy: Deploy, broker_server: PrivateRabbitMQ
) -> None:
    url = deploy.at(lambda request: "done")
    assert httpx.post(url, content=b"x", timeout=30).status_code == 200
    proxy = proxy_of(client)
    before = proxy.memory_info().rss
    peak = before
    broker_server.freeze()

    async def watched() -> list[int]:
        nonlocal peak
        sending = asyncio.create_task(burst(url, 600, b"x" * MIB))
        while not sending.done():
            peak = max(peak, proxy.memory_info().rss)
            await asyncio.sleep(0.02)
        return sending.result()

    statuses = asyncio.run(watched())
    broker_server.thaw()
    print(f"{(peak - before) / MIB:.0f} MiB more for {len(statuses)} MiB of requests, {[(s, statuses.count(s)) for s in set(statuses)]}")
    assert set(statuses) <= {0, 429, 503}
    # A body is there up to three times for a moment: in parts, whole, and in the frames on their way.
    assert peak - before < 3 * MAX_HELD_BYTES
    wait_until(lambda: httpx.post(url, content=b"x", timeout=30).status_code == 200)
