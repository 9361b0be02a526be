"""Rows of docs/reliability.md in which a server says nothing: frozen, cut off, or too short of memory or disk to take a message."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.crowd import Crowd
from tests.faults.servers_say import messages_of
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import NOISE_S, CommandLine, Deploy, answers, distributed_only, wait_until
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ, PrivateRedis, PrivateServer

pytestmark = distributed_only

NOTICED_WITHIN_S = 5.0
SOME_REQUESTS = 20


def is_ready(deploy: Deploy) -> bool:
    return answers(f"{deploy.url}/-/readyz")


def refused_at_once(url: str) -> None:
    """A 503 with a Retry-After, long before its deadline."""
    began = time.monotonic()
    response = httpx.get(url, timeout=60)
    assert response.status_code == 503 and "retry-after" in response.headers, response.text
    assert time.monotonic() - began < NOTICED_WITHIN_S + NOISE_S


def is_noticed_and_over_by_itself(deploy: Deploy, server: PrivateServer) -> None:
    """A frozen server turns readiness red and requests into 503; once it goes on, everything does, and no replica was replaced."""
    url = deploy.at(lambda request: os.getpid(), request_timeout_s=30)
    pid = httpx.get(url, timeout=30).json()
    server.freeze()
    try:
        wait_until(lambda: not is_ready(deploy), NOTICED_WITHIN_S + NOISE_S)
        for _ in range(3):
            refused_at_once(url)
    finally:
        server.thaw()
    wait_until(lambda: is_ready(deploy))
    wait_until(lambda: httpx.get(url, timeout=60).status_code == 200)
    assert httpx.get(url, timeout=30).json() == pid


@pytest.mark.row(6)
def test_a_frozen_broker_is_noticed_in_seconds_and_requests_are_refused_until_it_goes_on(
    deploy: Deploy, broker_server: PrivateRabbitMQ
) -> None:
    is_noticed_and_over_by_itself(deploy, broker_server)


@pytest.mark.row(6)
def test_requests_under_way_while_the_broker_freezes_end_in_time_and_are_answered_once(
    deploy: Deploy, broker_server: PrivateRabbitMQ
) -> None:
    url = deploy.at(lambda request: "well", request_timeout_s=8)
    with Crowd(url) as load:
        load.wait_for(20)
        broker_server.freeze()
        load.wait_for(12)
        broker_server.thaw()
        wait_until(lambda: load.statuses[-10:] == [200] * 10, told=lambda: load)
    assert set(load.statuses) <= {200, 503, 504} and not load.failures, load
    assert load.slowest_s < 8 + NOISE_S, load


@pytest.mark.row(8)
def test_a_frozen_redis_is_noticed_in_seconds_and_requests_are_refused_until_it_goes_on(deploy: Deploy, store_server: PrivateRedis) -> None:
    is_noticed_and_over_by_itself(deploy, store_server)


@pytest.mark.row(8)
def test_a_slow_redis_makes_requests_slow_and_fails_none(deploy: Deploy, wired_proxy: str, store_wire: Wire) -> None:
    url = deploy.at(lambda request: "well").replace(deploy.url, wired_proxy)
    wait_until(lambda: httpx.get(url, timeout=30).status_code == 200)
    with Crowd(url) as load:
        store_wire.delay(0.2)
        load.wait_for(40)
    assert set(load.statuses) == {200} and not load.failures, load


@pytest.fixture
def wired_proxy(joining: CommandLine, store_wire: Wire) -> Iterator[str]:
    """The URL of a proxy whose Redis is at the end of a wire."""
    port = free_port()
    proxy = joining.with_variables(MQSERVE_STORE_URL=store_wire.url).start("proxy", "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/readyz"), told=lambda: proxy.output)
    yield f"http://127.0.0.1:{port}"
    joining.close()  # before the wire is: who can say goodbye ends sooner


@pytest.mark.row(24)
@pytest.mark.parametrize("short_of", ["memory", "disk"])
def test_under_an_alarm_requests_are_refused_at_once_and_the_queue_drains(
    deploy: Deploy, broker_server: PrivateRabbitMQ, tmp_path: Path, short_of: str
) -> None:
    gate = Gate(tmp_path)

    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through()
        return os.getpid()

    url, name = deploy.named(work, request_timeout_s=90)
    with ThreadPoolExecutor(SOME_REQUESTS) as threads:
        asked = [threads.submit(httpx.post, url, timeout=90) for _ in range(SOME_REQUESTS)]
        wait_until(lambda: messages_of(broker_server, name) == SOME_REQUESTS)
        broker_server.alarm(short_of)
        wait_until(lambda: not is_ready(deploy))  # a request before that is still read, or told after a few seconds
        refused_at_once(url)
        gate.open()
        assert [future.result().status_code for future in asked] == [200] * SOME_REQUESTS
        refused_at_once(url)
    broker_server.calm()
    wait_until(lambda: httpx.get(url, timeout=90).status_code == 200)
    wait_until(lambda: is_ready(deploy))
