"""Several proxies on one port: connections spread, a killed one costs only its own connections, one that drains costs none."""

import http.client
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pika
import psutil

import mqserve as serve
from mqserve.broker.queue_names import requests_exchange, routing_key
from tests.faults.load import Load
from tests.faults.members import Members
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, distributed_only, is_alive, wait_until
from tests.ports import free_port

pytestmark = distributed_only

NO_HEADERS: Mapping[str, str] = {}
HTTP_OPTIONS = {"workers": 2}


def well(request: Any) -> str:
    return "well"


def path_of(url: str) -> str:
    return "/" + url.split("/", 3)[3]


def both(members: Members) -> Callable[[], set[int]]:
    """The processes of the two workers, once both are ready."""

    def ready() -> set[int]:
        pids = members.pids("proxy")
        return pids if len(pids) == 2 else set()

    return ready


class Connection:
    """A connection of its own to the proxies' port, kept open."""

    def __init__(self, url: str) -> None:
        self._http = http.client.HTTPConnection(url.split("/")[2], timeout=30)
        self._http.connect()
        self._http.auto_open = False  # otherwise it would mend itself
        self._local_port = self._http.sock.getsockname()[1]

    def get(self, path: str, method: str = "GET", headers: Mapping[str, str] = NO_HEADERS) -> int:
        """The status of the answer. Raises OSError or HTTPException if the connection is broken."""
        self._http.request(method, path, headers=dict(headers))
        response = self._http.getresponse()
        response.read()
        return response.status

    def breaks(self, path: str) -> bool:
        try:
            return self.get(path) != 200
        except (OSError, http.client.HTTPException):
            return True

    def worker(self, pids: set[int]) -> int:
        """The process that accepted it."""
        return next(pid for pid in pids if any(c.raddr and c.raddr.port == self._local_port for c in psutil.Process(pid).net_connections()))

    def close(self) -> None:
        self._http.close()


@contextmanager
def connections_to_all(url: str, pids: set[int]) -> Iterator[dict[int, list[Connection]]]:
    """Open connections, of which each worker has at least two."""
    with ExitStack() as opened:
        held: dict[int, list[Connection]] = {pid: [] for pid in pids}
        while min(map(len, held.values())) < 2:
            assert sum(map(len, held.values())) < 300, f"connections do not spread: {held}"
            connection = Connection(url)
            opened.callback(connection.close)
            assert connection.get("/-/healthz") == 200
            held[connection.worker(pids)].append(connection)
        yield held


def test_the_workers_share_one_port(deploy: Deploy, members: Members) -> None:
    url = deploy.at(well)
    pids = wait_until(both(members))
    assert {beat.url for beat in members.beats("proxy")} == {deploy.url}
    with connections_to_all(url, pids) as held:
        assert {connection.get(path_of(url)) for connections in held.values() for connection in connections} == {200}


def test_a_new_route_is_served_by_all_workers_when_the_call_returns(deploy: Deploy, members: Members) -> None:
    with connections_to_all(deploy.url, wait_until(both(members))) as held:
        for _ in range(5):
            path = path_of(deploy.at(well))
            assert {connections[0].get(path) for connections in held.values()} == {200}


def requests_counted(url: str) -> int:
    """As any one of the workers shows it."""
    response = httpx.get(f"{url.rpartition('/')[0]}/-/metrics", timeout=30)
    found = re.search(rf'mqserve_num_http_requests_total{{route="{path_of(url)}"}} (\d+)', response.text)
    return int(found[1]) if found else 0


def test_each_worker_shows_the_metrics_of_all_also_of_one_that_was_killed(deploy: Deploy, members: Members) -> None:
    url, sent, last = deploy.at(well), 0, 0
    killed, kept = wait_until(both(members))
    with connections_to_all(url, {killed, kept}) as held:
        for connection in (connections[0] for connections in held.values()):
            for _ in range(10):
                assert connection.get(path_of(url)) == 200
                sent += 1
                now = requests_counted(url)
                assert last <= now <= sent
                last = now
        wait_until(lambda: requests_counted(url) == sent)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(members.pids("proxy") - {killed}) == 2)
        assert [requests_counted(url) for _ in range(10)] == [sent] * 10


def test_whoever_knows_a_requests_id_may_cancel_it_at_any_worker(deploy: Deploy, members: Members, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def wait(request: serve.Request) -> str:
        await gate.pass_through_async(request.id)
        return "late"

    url, stranger = deploy.at(wait), {"Via": "1.1 a-proxy-in-front"}
    pids = wait_until(both(members))
    with connections_to_all(deploy.url, pids) as held, ThreadPoolExecutor() as background:
        asking = [background.submit(connections[0].get, path_of(url)) for connections in held.values()]
        wait_until(lambda: len(gate.names) == 2)
        cancelled, _ = gate.names
        askers = [connections[1] for connections in held.values()]
        assert [asker.get(f"/-/futures/{'0' * 32}", "DELETE", stranger) for asker in askers] == [403, 403]
        assert {asker.get(f"/-/futures/{cancelled}", "DELETE", stranger) for asker in askers} == {200}
        wait_until(lambda: sum(asked.done() for asked in asking) == 1)
        gate.open()
        assert sorted(asked.result() for asked in asking) == [200, 499]


def test_a_request_that_waits_at_one_worker_is_answered_at_once_when_another_cancels_it(
    deploy: Deploy, members: Members, tmp_path: Path, broker_url: str, shared_namespace: str
) -> None:
    gate = Gate(tmp_path)

    def wait(request: serve.Request) -> str:
        gate.pass_through(request.id)
        return "late"

    (url, name), stranger = deploy.named(wait), {"Via": "1.1 a-proxy-in-front"}
    with (
        connections_to_all(deploy.url, wait_until(both(members))) as held,
        pika.BlockingConnection(pika.URLParameters(broker_url)) as broker,
        ThreadPoolExecutor() as background,
    ):
        (at_one, _), (at_other, _) = (connections[:2] for connections in held.values())
        running = background.submit(httpx.get, url, timeout=30)
        wait_until(lambda: gate.came == 1)
        channel = broker.channel()
        copies = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(copies, requests_exchange(shared_namespace), routing_key(name))
        for _ in range(3):
            asked = background.submit(at_one.get, path_of(url))
            _, copy, _ = next(channel.consume(copies, auto_ack=True, inactivity_timeout=30))
            assert copy is not None, "nothing was sent"
            assert at_other.get(f"/-/futures/{copy.message_id}", "DELETE", stranger) == 200
            assert asked.result(timeout=30) == 499
        assert gate.came == 1, "the slow call still keeps the replica busy"
        gate.open()
        assert running.result().status_code == 200


def test_a_killed_worker_costs_only_its_own_connections_and_is_replaced(deploy: Deploy, members: Members) -> None:
    url = deploy.at(well)
    killed, kept = wait_until(both(members))
    with connections_to_all(url, {killed, kept}) as held, Load(url) as load:
        load.wait_for(20)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(killed) or not is_alive(psutil.Process(killed)))
        assert [httpx.get(url, timeout=30).status_code for _ in range(20)] == [200] * 20
        assert not any(connection.breaks(path_of(url)) for connection in held[kept])
        assert all(connection.breaks(path_of(url)) for connection in held[killed])
        wait_until(lambda: len(members.pids("proxy") - {killed}) == 2)
        load.wait_for(20)
    assert sum(load.failed.values()) <= 5, "each of its five connections broke once, at most"
    assert {status for status, _ in load.failed} <= {0}, load
    wait_until(lambda: killed not in {beat.pid for beat in members.last_beats()}, 20)


def test_external_workers_share_a_port_and_are_replaced_and_leave_together(deploy: Deploy, members: Members, joining: CommandLine) -> None:
    url, port = deploy.at(well), free_port()
    nodes = wait_until(both(members))
    started = joining.start("proxy", "--port", str(port), "--http-workers", "2")
    wait_until(lambda: len(members.pids("proxy") - nodes) == 2, told=lambda: started.output)
    external = members.pids("proxy") - nodes
    theirs = f"http://127.0.0.1:{port}{path_of(url)}"
    with connections_to_all(theirs, external) as held, Load(theirs) as load:
        killed, kept = external
        os.kill(killed, signal.SIGKILL)
        assert not any(connection.breaks(path_of(url)) for connection in held[kept])
        wait_until(lambda: len(members.pids("proxy") - nodes - {killed}) == 2)
        assert {status for status, _ in load.failed} <= {0}, load
    pids = members.pids("proxy") - nodes - {killed}
    started.signal(signal.SIGTERM)
    assert started.wait() == 0, started.output
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_that_drain_one_after_another_fail_no_request(deploy: Deploy, members: Members) -> None:
    url = deploy.at(well)
    old = wait_until(both(members))
    with Load(url) as load:
        for pid in old:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda pid=pid: not psutil.pid_exists(pid))  # type: ignore[misc]
            wait_until(both(members))
    assert not load.failed
    assert not old & members.pids("proxy")
