"""Rows of docs/reliability.md in which Redis fails: it restarts with and without its data, is full, hands over to a replica of its own.

The module has a Redis of its own, which keeps its data, at the end of a wire that can lead elsewhere.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from mqserve.controller.loop import SETTLE_S
from tests.conftest import running
from tests.faults.crowd import Crowd
from tests.faults.servers_say import messages_of
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import NOISE_S, Deploy, distributed_only, started, wait_until
from tests.servers import PrivateRabbitMQ, PrivateRedis

pytestmark = [distributed_only, pytest.mark.breaks_servers]


@pytest.fixture(scope="module")
def own_store() -> Iterator[PrivateRedis]:
    yield from running(lambda: PrivateRedis(keeps_data=True))


@pytest.fixture(scope="module")
def second_store() -> Iterator[PrivateRedis]:
    yield from running(PrivateRedis)


@pytest.fixture(scope="module")
def wire(own_store: PrivateRedis) -> Iterator[Wire]:
    with Wire(own_store.url) as wire:
        yield wire


@pytest.fixture(scope="module")
def client(form: str, broker_url: str, wire: Wire, second_store: PrivateRedis, shared_namespace: str) -> Iterator[serve.Client]:
    with started(broker_url=broker_url, store_url=wire.url, namespace=shared_namespace) as client:
        yield client


@pytest.fixture(autouse=True)
def mended(own_store: PrivateRedis) -> Iterator[None]:
    yield
    own_store.mend()


def work_behind(gate: Gate) -> Any:
    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through()
        return os.getpid()

    return work


@contextmanager
def asked_and_running(url: str, gate: Gate, count: int = 4) -> Iterator[list[Future[httpx.Response]]]:
    """So many requests that all run, until the gate opens."""
    with ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(httpx.post, url, timeout=90) for _ in range(count)]
        wait_until(lambda: gate.came == count, told=lambda: gate)
        yield asked


def epoch(store: PrivateRedis, namespace: str) -> int:
    return int(json.loads(store.say("GET", f"mqserve:{namespace}:desired"))["epoch"])


@pytest.mark.row(7)
@pytest.mark.parametrize("with_data", [True, False], ids=["with-its-data", "without"])
def test_a_restart_of_redis_fails_nothing_that_runs_and_the_configuration_stands_again(
    deploy: Deploy, own_store: PrivateRedis, shared_namespace: str, tmp_path: Path, with_data: bool
) -> None:
    gate = Gate(tmp_path)
    url = deploy.at(work_behind(gate), sync_threads=4)
    pid, epoch_before = httpx.get(url, timeout=30).json(), epoch(own_store, shared_namespace)
    with asked_and_running(url, gate) as asked:
        own_store.restart(with_data=with_data, kindly=False)
        gate.open()
        assert [future.result().status_code for future in asked] == [200] * 4
    assert gate.came == 4, "one ran twice"
    wait_until(lambda: own_store.say("GET", f"mqserve:{shared_namespace}:desired"))
    assert epoch(own_store, shared_namespace) == epoch_before + (not with_data)
    has_settled = time.monotonic() + 2 * SETTLE_S
    while time.monotonic() < has_settled:  # nobody is missed before; then they are looked at
        assert httpx.get(url, timeout=30).json() == pid, "a replica was replaced, though nothing was wrong with it"
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)  # the next one needs the code
    assert httpx.get(url, timeout=60).raise_for_status().json() != pid


@pytest.mark.row(7)
def test_traffic_goes_on_over_a_restart_of_redis(deploy: Deploy, own_store: PrivateRedis) -> None:
    with Crowd(deploy.at(lambda request: "well", request_timeout_s=10)) as load:
        load.wait_for(20)
        own_store.restart(with_data=False)
        load.wait_for(40)
    assert set(load.statuses) == {200} and not load.failures, load


@pytest.mark.row(9)
def test_results_wait_until_a_full_redis_has_room_and_no_replica_is_missed_meanwhile(
    deploy: Deploy, own_store: PrivateRedis, broker_server: PrivateRabbitMQ, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    url, name = deploy.named(work_behind(gate), sync_threads=4)
    pid = httpx.get(url, timeout=30).json()
    with asked_and_running(url, gate) as asked:
        own_store.limit_memory("1", "noeviction")
        gate.open()
        large = httpx.post(url, content=bytes(2 * 1024 * 1024), timeout=30)
        assert large.status_code == 503 and "retry-after" in large.headers
        full_until = time.monotonic() + 8  # longer than a silent member is believed to live
        while time.monotonic() < full_until:
            assert messages_of(broker_server, name) == 4, "acked, and the result is nowhere"
            time.sleep(0.2)
        assert not any(future.done() for future in asked)
        own_store.limit_memory()
        assert [future.result().status_code for future in asked] == [200] * 4
    wait_until(lambda: messages_of(broker_server, name) == 0)
    assert gate.came == 4, "one ran twice"
    assert httpx.get(url, timeout=30).json() == pid


@pytest.mark.row(10)
def test_after_a_failover_of_redis_every_request_has_ended_in_time_and_the_old_primary_changes_nothing(
    client: serve.Client, deploy: Deploy, own_store: PrivateRedis, second_store: PrivateRedis, wire: Wire
) -> None:
    """The last of the module: its instance stays on the new primary."""
    own_store.say("CONFIG", "SET", "repl-diskless-sync-delay", 0)  # by default it waits 5 s for more copies to come
    second_store.say("REPLICAOF", "127.0.0.1", own_store.port)
    wait_until(lambda: second_store.say("INFO", "replication")["master_link_status"] == "up")
    url, name = deploy.named(lambda request: os.getpid(), request_timeout_s=8)
    with Crowd(url) as load:
        load.wait_for(20)
        own_store.kill()
        second_store.say("REPLICAOF", "NO", "ONE")
        wire.lead_to(second_store.url)
        wire.reset()
        load.wait_for(40)
        own_store.start()  # the old primary comes back with its old data, and is told to follow
        own_store.say("REPLICAOF", "127.0.0.1", second_store.port)
        client.update_backend_config(name, {"num_replicas": 2})
        load.wait_for(40)
    assert load.slowest_s < 8 + NOISE_S, load
    assert set(load.statuses) <= {200, 503, 504} and not load.failures, load
    assert set(load.statuses[-20:]) == {200}, load
