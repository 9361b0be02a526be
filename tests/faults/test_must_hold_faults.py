"""What the third part of the project must hold: replicas that die every second, and a Redis that hangs."""

import asyncio
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.faults.crowd import paced
from tests.faults.members import Members
from tests.instances import Deploy, distributed_only, wait_until
from tests.servers import PrivateRedis

pytestmark = distributed_only

RATE = 100
KILLED_FOR_S = 30.0
FEWEST_KILLED = 10  # where they take long to start


def test_a_replica_killed_every_second_for_30_s_at_100_requests_a_second_fails_none(deploy: Deploy, members: Members) -> None:
    def work(request: Any) -> int:
        time.sleep(0.003)
        return os.getpid()

    url, name = deploy.named(work, num_replicas=3)
    wanted, begun, ended = int(RATE * KILLED_FOR_S), itertools.count(), threading.Event()

    def is_over() -> bool:
        """Asked before each request. All that were wanted are sent, though a slow machine takes longer."""
        return next(begun) >= wanted and ended.is_set()

    limits = httpx.Limits(max_connections=None, keepalive_expiry=1)  # below the server's, which else may close one that is just used
    with httpx.Client(timeout=90, limits=limits) as http, ThreadPoolExecutor(1) as background:
        asking = background.submit(paced, lambda: http.get(url), RATE, is_over, threads=100)
        began, killed = time.monotonic(), set[int]()
        try:
            while time.monotonic() - began < KILLED_FOR_S or len(killed) < FEWEST_KILLED:
                time.sleep(1)
                if ready := members.pids("replica", name) - killed:  # not those that start: they serve nobody yet
                    killed.add(victim := random.choice(sorted(ready)))
                    os.kill(victim, signal.SIGKILL)
        finally:
            ended.set()
        responses = asking.result()
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200}, (statuses, [response.text for response in responses if response.status_code != 200][:3])
    assert len(responses) >= wanted, statuses
    assert len({response.json() for response in responses}) >= len(killed) / 2


def test_100_requests_to_a_frozen_redis_end_each_by_its_own_deadline_plus_a_second(deploy: Deploy, store_server: PrivateRedis) -> None:
    timeout_s = 4
    url = deploy.at(lambda request: "well", request_timeout_s=timeout_s)
    assert httpx.get(url, timeout=30).status_code == 200

    async def asked() -> list[tuple[int, float]]:
        """What 100 requests get, and after how long, on connections that are there already."""
        where = httpx.URL(url)
        connections = [await asyncio.open_connection(where.host, where.port) for _ in range(100)]

        async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, float]:
            """By hand: httpx needs 2 s for 100 at once."""
            began = time.monotonic()
            writer.write(b"GET %s HTTP/1.1\r\nHost: here\r\n\r\n" % where.raw_path)
            head = await reader.readuntil(b"\r\n\r\n")
            took_s = time.monotonic() - began
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
            return int(head.split()[1]), took_s

        try:
            assert {status for status, _ in await asyncio.gather(*(ask(*connection) for connection in connections))} == {200}
            store_server.freeze()
            return await asyncio.gather(*(ask(*connection) for connection in connections))
        finally:
            store_server.thaw()
            for _, writer in connections:
                writer.close()

    slowest: list[float] = []  # of each round: the machine's own noise is as large as what is measured at times
    while len(slowest) < 3 and min(slowest, default=9.0) >= timeout_s + 1:
        answers = asyncio.run(asked())
        assert {status for status, _ in answers} <= {503, 504}, answers
        slowest.append(max(took_s for _, took_s in answers))
        wait_until(lambda: httpx.get(url, timeout=30).status_code == 200)
    assert min(slowest) < timeout_s + 1, slowest
