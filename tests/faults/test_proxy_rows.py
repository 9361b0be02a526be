"""Rows of docs/reliability.md at the edges: links that break between two of us, wrong clocks, sizes, limits of the machine."""

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pika
import psutil
import pytest
import redis

import mqserve as serve
from mqserve.broker.amqp_replies import MAX_REPLY_BYTES
from mqserve.broker.calls.sending import MAX_BODY_BYTES
from tests.faults import skewed_clock
from tests.faults.crowd import Crowd
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import NOISE_S, ROOT, CommandLine, Deploy, answers, distributed_only, wait_until
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ, PrivateRedis
from tests.tallies import Tally

pytestmark = distributed_only


def well(request: Any) -> str:
    return "well"


class OtherProxy:
    """A second proxy of the instance, started by hand: what is done to its links is done to nobody else's."""

    def __init__(self, shell: CommandLine, *before: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        before = before or (sys.executable, "-m", "mqserve")
        self.program = shell.start_program([*before, "proxy", "--port", str(self.port)], ROOT)
        wait_until(lambda: answers(f"{self.url}/-/readyz"), told=lambda: self.program.output)

    def at(self, deploy: Deploy, url: str) -> str:
        """The same route on this proxy, once it has it."""
        mine = url.replace(deploy.url, self.url)
        wait_until(lambda: httpx.get(mine, timeout=30).status_code == 200)
        return mine


@pytest.fixture
def wired(joining: CommandLine, broker_wire: Wire, store_wire: Wire) -> Iterator[CommandLine]:
    """A command line whose servers are at the end of wires."""
    yield joining.with_variables(MQSERVE_BROKER_URL=broker_wire.url, MQSERVE_STORE_URL=store_wire.url)
    joining.close()  # before the wires are: who can say goodbye ends sooner


# Partitions.

ENDINGS: list[Callable[[Wire], None]] = [Wire.reset, Wire.finish, Wire.half_close]


@pytest.mark.row(14)
def test_connections_of_a_proxy_that_end_in_any_way_fail_no_request(
    deploy: Deploy, wired: CommandLine, broker_wire: Wire, store_wire: Wire
) -> None:
    proxy = OtherProxy(wired)
    with Crowd(proxy.at(deploy, deploy.at(well))) as load:
        for end in ENDINGS:
            for wire in (broker_wire, store_wire):
                load.wait_for(20)
                end(wire)
        load.wait_for(40)
    assert set(load.statuses) == {200} and not load.failures, load


@pytest.mark.row(14)
def test_connections_of_a_replica_that_end_in_any_way_fail_no_request(
    deploy: Deploy, wired: CommandLine, broker_wire: Wire, store_wire: Wire
) -> None:
    url, name = deploy.named(lambda request: os.getpid())
    replica = wired.start("replica", name)
    wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)
    with Crowd(url) as load:
        for end in ENDINGS:
            for wire in (broker_wire, store_wire):
                load.wait_for(20)
                end(wire)
        load.wait_for(40)
    assert set(load.statuses) == {200} and not load.failures, load
    wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)


@pytest.mark.row(14)
@pytest.mark.parametrize("server", ["broker", "store"])
def test_a_proxy_cut_off_from_one_server_ends_each_request_in_time_and_others_serve(
    deploy: Deploy, wired: CommandLine, broker_wire: Wire, store_wire: Wire, server: str
) -> None:
    wire = broker_wire if server == "broker" else store_wire
    timeout_s = 2
    proxy, url = OtherProxy(wired), deploy.at(well, request_timeout_s=timeout_s)
    cut_off = proxy.at(deploy, url)
    with Crowd(url) as others:
        wire.blackhole()
        with Crowd(cut_off) as load:
            load.wait_for(4)
        assert set(load.statuses) <= {503, 504} and not load.failures, load
        assert load.slowest_s < timeout_s + NOISE_S, load
        wire.mend()
        wait_until(lambda: httpx.get(cut_off, timeout=30).status_code == 200)
    assert set(others.statuses) == {200} and not others.failures, others


@pytest.mark.row(11)
def test_a_proxy_that_ends_sends_a_job_whose_client_has_gone_once_the_broker_is_back(
    deploy: Deploy, wired: CommandLine, broker_wire: Wire, tally: Tally
) -> None:
    def handler(request: Any) -> None:
        tally.note(request.method)

    def sent() -> list[str]:
        """The proxy's counts of requests that it has begun to send."""
        lines = httpx.get(f"{proxy.url}/-/metrics").text.splitlines()
        return [line for line in lines if line.startswith("mqserve_num_router_requests_total")]

    proxy, url = OtherProxy(wired), deploy.at(handler)
    path = urlsplit(proxy.at(deploy, url)).path
    before = sent()
    broker_wire.refuse()
    broker_wire.reset()
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\nContent-Length: 0\r\n\r\n".encode())
        wait_until(lambda: sent() != before)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
    os.kill(proxy.program.pid, signal.SIGTERM)
    wait_until(lambda: not answers(f"{proxy.url}/-/healthz"))
    broker_wire.mend()
    wait_until(lambda: "POST" in tally.lines, told=lambda: proxy.program.output)


@pytest.mark.row(14)
def test_a_replica_that_cannot_store_stops_taking_requests_and_gives_back_what_it_has(
    deploy: Deploy, wired: CommandLine, store_wire: Wire
) -> None:
    url, name = deploy.named(lambda request: os.getpid(), request_timeout_s=30)
    replica = wired.start("replica", name)
    wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)
    with Crowd(url) as load:
        store_wire.blackhole()
        wait_until(lambda: len(load.responses) > 200 and replica.pid not in {response.json() for response in load.responses[-100:]})
    assert set(load.statuses) == {200} and not load.failures, load
    store_wire.mend()
    wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)


# Clocks.


@pytest.mark.row(15)
def test_processes_whose_clocks_jump_by_minutes_serve_and_keep_their_deadlines(
    deploy: Deploy, joining: CommandLine, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)

    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through()
        return os.getpid()

    url, name = deploy.named(work, request_timeout_s=3, sync_threads=2)
    replica = joining.start_program(skewed_clock.command(-300, "replica", name), ROOT)
    proxy = OtherProxy(joining, *skewed_clock.command(300))
    url = proxy.at(deploy, url)
    wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)
    with Crowd(url) as load:
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 2.5 * skewed_clock.JUMPS_EVERY_S)
    assert set(load.statuses) == {200} and not load.failures, load
    assert {response.json() for response in load.responses} > {replica.pid}
    began = time.monotonic()
    assert httpx.post(url, timeout=30).status_code == 504
    assert 2.9 < time.monotonic() - began < 3 + NOISE_S
    gate.open()


# Sizes.


@pytest.mark.row(20)
@pytest.mark.parametrize(("above_limit", "status"), [(-1, 200), (0, 200), (1, 413)])
def test_a_body_of_64_mib_passes_and_one_byte_more_is_a_413(measuring: str, above_limit: int, status: int) -> None:
    size = MAX_BODY_BYTES + above_limit
    response = httpx.post(measuring, content=bytes(size), timeout=60)
    assert response.status_code == status
    assert status != 200 or response.json() == size


@pytest.mark.row(20)
@pytest.mark.parametrize(("size", "status"), [(17 * 2**20, 200), (MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 500)])
def test_a_result_of_64_mib_passes_and_one_byte_more_is_a_500_that_says_so(measuring: str, size: int, status: int) -> None:
    response = httpx.get(measuring, params={"size": size}, timeout=60)
    assert response.status_code == status
    if status == 200:
        assert len(response.content) == size
    else:
        assert "is the limit" in response.json()["detail"], response.text
    assert len(httpx.get(measuring, params={"size": 3}, timeout=30).content) == 3


@pytest.mark.row(20)
def test_an_answer_too_large_for_amqp_says_so_and_the_next_one_arrives(measuring: str, broker_url: str, shared_namespace: str) -> None:
    name = backend_of(measuring)
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        replies = str(channel.queue_declare("", exclusive=True).method.queue)
        statuses = {}
        for size in (MAX_REPLY_BYTES + 1, 3):
            properties = pika.BasicProperties(content_type="application/json", reply_to=replies, correlation_id=str(size))
            channel.basic_publish(f"{shared_namespace}.requests", name, str(size).encode(), properties)
            _, answer, body = next(channel.consume(replies, auto_ack=True, inactivity_timeout=30))
            statuses[answer.correlation_id] = (answer.headers["mq-status"], b"mqserve.TooLarge" in body or len(body))
    assert statuses == {str(MAX_REPLY_BYTES + 1): (500, True), "3": (200, 3)}


@pytest.fixture(scope="module")
def measuring(client: serve.Client) -> Iterator[str]:
    """The URL of a backend that tells the size of a body, or returns so many bytes."""

    async def measure(request: Any) -> Any:
        if isinstance(request, serve.ServeRequest):
            return bytes(request.data)
        if request.method == "POST":
            return len(await request.body())
        return bytes(int(request.query_params["size"]))

    deploy = Deploy(client)
    yield deploy.at(measure)
    deploy.undo()


def backend_of(url: str) -> str:
    (traffic,) = [endpoint["traffic"] for endpoint in serve.list_endpoints().values() if endpoint["route"] == f"/{url.rpartition('/')[2]}"]
    return str(next(iter(traffic)))


# Limits of the machine and of the servers.


@pytest.mark.row(27)
def test_a_proxy_without_file_descriptors_keeps_the_connections_it_has_and_takes_new_ones_again_later(
    deploy: Deploy, joining: CommandLine
) -> None:
    proxy = OtherProxy(joining, "bash", "-c", 'ulimit -n 64; exec "$0" -m mqserve "$@"', sys.executable)
    url = proxy.at(deploy, deploy.at(well))
    with ExitStack() as crowd, httpx.Client(timeout=30) as early:
        assert early.get(url).text == "well"
        for _ in range(100):
            crowd.enter_context(socket.create_connection(("127.0.0.1", proxy.port), timeout=10))
        wait_until(lambda: psutil.Process(proxy.program.pid).num_fds() >= 60)
        assert {early.get(url).text for _ in range(20)} == {"well"}
    wait_until(lambda: answers(url))
    assert not proxy.program.ended


@pytest.fixture(params=["RabbitMQ", "Redis"])
def crowded(request: pytest.FixtureRequest, broker_server: PrivateRabbitMQ, store_server: PrivateRedis) -> Iterator[Callable[[bool], None]]:
    """Told True, a server takes no connection beyond those it has; told False, it does."""

    with redis.Redis.from_url(store_server.url, single_connection_client=True) as store:  # one of those that it has

        def limit(yes: bool) -> None:
            if request.param == "RabbitMQ":
                broker_server.ctl("set_vhost_limits", "-p", "/", '{"max-connections": 1}' if yes else "{}")
            else:
                store.config_set("maxclients", 1 if yes else 10_000)

        yield limit
        limit(False)


@pytest.mark.row(27)
def test_a_server_that_takes_no_more_connections_stops_nobody_who_has_one(deploy: Deploy, crowded: Callable[[bool], None]) -> None:
    url = deploy.at(lambda request: os.getpid(), num_replicas=2)
    with Crowd(url) as load:
        load.wait_for(200)
        before = {response.json() for response in load.responses}
        crowded(True)
        load.wait_for(20)
        os.kill(before.pop(), 9)  # its successor cannot connect
        load.wait_for(200)
        crowded(False)
        (kept,) = before
        wait_until(lambda: httpx.get(url, timeout=30).raise_for_status().json() != kept)
    assert set(load.statuses) == {200} and not load.failures, load


# Late.


@pytest.mark.row(21)
def test_what_waits_past_its_deadline_never_starts_and_each_caller_is_told_once_in_time(deploy: Deploy, tmp_path: Path) -> None:
    gate, timeout_s = Gate(tmp_path), 5

    def work(request: Any) -> str:
        gate.pass_through()
        return "late"

    url = deploy.at(work, request_timeout_s=timeout_s)
    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(20) as threads:

        def ask(number: int) -> tuple[int, float]:
            began = time.monotonic()
            return http.get(url).status_code, time.monotonic() - began

        answered = list(threads.map(ask, range(20)))
    assert {status for status, _ in answered} == {504}
    assert all(timeout_s - 0.1 < took_s < timeout_s + NOISE_S for _, took_s in answered), answered
    gate.open()
    assert httpx.get(url, timeout=30).text == "late"
    assert gate.came == 2, "late work was done"
