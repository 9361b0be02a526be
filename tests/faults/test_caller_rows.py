"""Rows of docs/reliability.md in which the one who waits fails, or there are too many of them: what nobody waits for does not run."""

import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import mqserve as serve
from mqserve.controller.loop import LOST_PROXY_AFTER_S
from tests.faults.members import Members
from tests.faults.servers_say import messages_of, words_said
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, answers, distributed_only, wait_until
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ
from tests.tallies import Tally

pytestmark = distributed_only

MANY = 20


def behind(gate: Gate) -> Callable[[Any], str]:
    def work(request: Any) -> str:
        gate.pass_through()
        return "passed"

    return work


@pytest.mark.row(11)
def test_what_a_killed_proxy_had_queued_never_starts_and_nothing_of_it_stays(
    deploy: Deploy, joining: CommandLine, broker_server: PrivateRabbitMQ, environment: dict[str, str], members: Members, tmp_path: Path
) -> None:
    gate, port = Gate(tmp_path), free_port()
    url, name = deploy.named(behind(gate))
    proxy = joining.start("proxy", "--port", str(port))
    mine = url.replace(deploy.url, f"http://127.0.0.1:{port}")
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/readyz"), told=lambda: proxy.output)
    with ThreadPoolExecutor(MANY) as threads:
        asked = [threads.submit(httpx.get, mine, timeout=90) for _ in range(MANY)]
        wait_until(lambda: gate.came == 1 and messages_of(broker_server, name) == MANY)
        proxy.kill()
        words = words_said(environment)
        assert all(isinstance(future.exception(), httpx.TransportError) for future in asked)
    members.age(proxy.pid, LOST_PROXY_AFTER_S)  # nobody saw it end, and one that beat a moment ago may live
    wait_until(lambda: words_said(environment) > words)
    gate.open()
    wait_until(lambda: messages_of(broker_server, name) == 0)
    assert gate.came == 1
    assert httpx.get(url, timeout=30).text == "passed"
    with redis.Redis.from_url(environment["MQSERVE_STORE_URL"]) as store:
        left = [key for key in store.scan_iter(f"mqserve:{environment['MQSERVE_NAMESPACE']}:*:{{*") if store.ttl(key) == -1]
        assert not left, "these never expire"


@pytest.mark.row(22)
def test_a_request_whose_client_went_while_it_waited_never_starts(
    deploy: Deploy, broker_server: PrivateRabbitMQ, environment: dict[str, str], tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    url, name = deploy.named(behind(gate))
    with ThreadPoolExecutor(1) as background:
        first = background.submit(httpx.get, url, timeout=60)
        wait_until(lambda: gate.came == 1)
        clients = [sent(url) for _ in range(MANY)]
        wait_until(lambda: messages_of(broker_server, name) == MANY + 1)
        words = words_said(environment)
        for client in clients:
            client.close()
        wait_until(lambda: words_said(environment) == words + MANY)
        gate.open()
        assert first.result().text == "passed"
    wait_until(lambda: messages_of(broker_server, name) == 0)
    assert gate.came == 1


@pytest.mark.row(22)
def test_a_request_whose_client_went_while_it_ran_is_told_so_and_frees_its_slot(deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    def work(request: Any) -> str:
        if request.query_params.get("long"):
            tally.note("running")
            while not serve.cancelled():
                time.sleep(0.01)
            tally.note("cancelled")
        return "free"

    url = deploy.at(work)
    client = sent(f"{url}?long=yes")
    wait_until(lambda: tally.lines == ["running"])
    client.close()
    assert httpx.get(url, timeout=30).text == "free"
    assert tally.lines == ["running", "cancelled"]


@pytest.mark.row(23)
def test_beyond_a_full_queue_requests_are_refused_at_once_and_what_was_taken_is_answered(
    deploy: Deploy, broker_server: PrivateRabbitMQ, tmp_path: Path
) -> None:
    gate, limit, count = Gate(tmp_path), 10, 100
    url, name = deploy.named(behind(gate), max_queued_requests=limit)

    def done(asked: list[Future[httpx.Response]]) -> list[httpx.Response]:
        return [future.result() for future in asked if future.done()]

    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None)) as http, ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(http.get, url) for _ in range(count)]
        wait_until(lambda: len(done(asked)) >= count - limit - 1)
        refused = done(asked)
        assert {response.status_code for response in refused} == {429}
        assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
        assert max(response.elapsed.total_seconds() for response in refused) < 30, "their own time is 60 s"
        taken = messages_of(broker_server, name)
        gate.open()
        statuses = Counter(future.result().status_code for future in asked)
    assert statuses == {429: count - taken, 200: taken} and gate.came == taken


def sent(url: str) -> socket.socket:
    """A client that has sent a request and waits."""
    where = httpx.URL(url)
    client = socket.create_connection((where.host, where.port or 80), timeout=10)
    client.sendall(b"GET " + where.raw_path + b" HTTP/1.1\r\nHost: here\r\n\r\n")
    return client
