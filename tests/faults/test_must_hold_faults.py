"""What the third part of the project must hold: replicas that die every second, and a Redis that hangs."""

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

from tests.faults.crowd import paced
from tests.instances import Deploy, distributed_only, wait_until
from tests.servers import PrivateRedis

pytestmark = distributed_only

RATE = 100
KILLED_FOR_S = 30.0


def replica_pids(backend: str) -> list[int]:
    """Of those that this process's instance runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[1:5] == ["-m", "mqserve", "replica", backend]:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_replica_killed_every_second_for_30_s_at_100_requests_a_second_fails_none(deploy: Deploy) -> None:
    def work(request: Any) -> int:
        time.sleep(0.003)
        return os.getpid()

    url, name = deploy.named(work, num_replicas=3)
    ended = threading.Event()
    limits = httpx.Limits(max_connections=None, keepalive_expiry=1)  # below the server's, which else may close one that is just used
    with httpx.Client(timeout=90, limits=limits) as http, ThreadPoolExecutor(1) as background:
        asking = background.submit(paced, lambda: http.get(url), RATE, ended.is_set, threads=100)
        began, killed = time.monotonic(), 0
        try:
            while time.monotonic() - began < KILLED_FOR_S:
                time.sleep(1)
                if pids := replica_pids(name):
                    os.kill(random.choice(pids), signal.SIGKILL)
                    killed += 1
        finally:
            ended.set()
        responses = asking.result()
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200}, (statuses, [response.text for response in responses if response.status_code != 200][:3])
    assert killed >= 20 and len(responses) > 0.8 * RATE * KILLED_FOR_S, (killed, statuses)
    assert len({response.json() for response in responses}) > 10


def test_100_requests_to_a_frozen_redis_end_each_by_its_own_deadline_plus_a_second(deploy: Deploy, store_server: PrivateRedis) -> None:
    timeout_s = 4
    url = deploy.at(lambda request: "well", request_timeout_s=timeout_s)
    assert httpx.get(url, timeout=30).status_code == 200
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None)) as http, ThreadPoolExecutor(100) as threads:

        def ask(number: int) -> tuple[int, float]:
            began = time.monotonic()
            return http.get(url).status_code, time.monotonic() - began

        store_server.freeze()
        answers = list(threads.map(ask, range(100)))
        store_server.thaw()
    assert {status for status, _ in answers} <= {503, 504}, answers
    slowest = sorted((round(took_s, 2) for _, took_s in answers), reverse=True)
    assert slowest[0] < timeout_s + 1, slowest
    wait_until(lambda: httpx.get(url, timeout=30).status_code == 200)
