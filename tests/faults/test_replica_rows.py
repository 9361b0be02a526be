"""Rows of docs/reliability.md in which a replica fails: it dies, at one point too, its machine is gone, its ack is lost.

Distributed, where a process can die alone.
"""

import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pika
import psutil
import pytest

import mqserve as serve
from tests.children import end_children, leave_a_child
from tests.faults.crash_points import command
from tests.faults.netns import machine
from tests.faults.servers_say import forget_mark, is_marked, messages_of, stored_result
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import NOISE_S, ROOT, CommandLine, Deploy, Program, distributed_only, is_alive, new_name, wait_until
from tests.servers import PrivateRabbitMQ
from tests.tallies import Tally

pytestmark = distributed_only


def dying(tally: Tally, gate: Gate) -> Any:
    """Notes its process, then waits at the gate to be killed."""

    def handle(request: Any) -> str:
        tally.note(os.getpid())
        gate.pass_through()
        return "answered"

    return handle


@pytest.mark.row(1)
def test_at_least_once_runs_again_what_a_killed_replica_was_running(
    client: serve.Client, deploy: Deploy, tmp_path: Path, environment: dict[str, str]
) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    ref = client.get_handle(deploy(dying(tally, gate))).remote()
    wait_until(lambda: is_marked(environment, ref.id))  # a run so short that it has no mark yet is not counted
    os.kill(int(tally.lines[0]), signal.SIGKILL)
    wait_until(lambda: gate.came == 2)
    gate.open()
    assert ref.result(30) == "answered" and len(tally) == 2
    assert stored_result(environment, ref.id)["attempt"] == 2


@pytest.mark.row(1)
def test_at_most_once_is_answered_502_and_never_runs_twice(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    name = new_name("r")
    backend = deploy(dying(tally, gate), route=f"/{name}", delivery="at_most_once")
    with ThreadPoolExecutor(1) as background:
        answer = background.submit(httpx.get, f"{deploy.url}/{name}", timeout=60)
        wait_until(lambda: gate.came == 1)
        waiting = client.get_handle(backend).remote()
        os.kill(int(tally.lines[0]), signal.SIGKILL)
        response = answer.result()
    assert response.status_code == 502 and "never run twice" in response.json()["detail"], response.text
    assert response.headers["content-type"] == "application/problem+json"
    gate.open()
    assert waiting.result(30) == "answered", "what had not started runs elsewhere"
    assert len(tally) == 2


@pytest.mark.row(1)
@pytest.mark.parametrize("mark", ["kept", "lost"])
def test_at_most_once_tells_a_handle_that_its_replica_was_lost_and_never_runs_twice_though_redis_lost_the_mark(
    client: serve.Client, deploy: Deploy, tmp_path: Path, environment: dict[str, str], mark: str
) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    ref = client.get_handle(deploy(dying(tally, gate), delivery="at_most_once")).remote()
    wait_until(lambda: gate.came == 1)
    if mark == "lost":
        forget_mark(environment, ref.id)
    os.kill(int(tally.lines[0]), signal.SIGKILL)
    with pytest.raises(serve.ReplicaLost, match="never run twice"):
        ref.result(30)
    gate.open()
    assert len(tally) == 1


@pytest.mark.row(1)
def test_at_most_once_runs_elsewhere_what_a_drain_gave_back(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    backend = deploy(dying(tally, gate), delivery="at_most_once", num_replicas=2)
    refs = [client.get_handle(backend).remote() for _ in range(12)]
    wait_until(lambda: gate.came == 2)
    client.update_backend_config(backend, {"num_replicas": 1})
    gate.open()
    assert serve.get(refs, timeout=60) == ["answered"] * 12
    assert len(tally) == 12


@pytest.mark.row(1)
def test_a_child_that_a_killed_replica_forked_does_not_keep_its_requests_from_the_others(
    client: serve.Client, deploy: Deploy, tmp_path: Path
) -> None:
    tally, gate, children = Tally(tmp_path), Gate(tmp_path), Tally(tmp_path)
    fork = leave_a_child(children)

    def handle(request: Any) -> str:
        tally.note(os.getpid())
        if len(tally) == 1:
            fork(request)
            gate.pass_through()
        return "answered"

    ref = client.get_handle(deploy(handle, num_replicas=2)).remote()
    wait_until(lambda: gate.came == 1)
    killed = time.monotonic()
    try:
        os.kill(int(tally.lines[0]), signal.SIGKILL)
        assert ref.result(60) == "answered"
        assert time.monotonic() - killed < 2 + NOISE_S, "RabbitMQ's heartbeats take 20 s and more"
        assert is_alive(psutil.Process(int(children.lines[0])))
    finally:
        end_children(children)


@pytest.mark.row(1)
def test_an_exception_is_a_result_and_never_run_again(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    def fail(request: Any) -> None:
        tally.note()
        raise LookupError("no such digit")

    with pytest.raises(LookupError):
        client.get_handle(deploy(fail)).remote().result(30)
    assert len(tally) == 1


# Dying at one point.


def numbered(tally: Tally) -> Any:
    """Notes the number that the request brings, and its process."""

    def handle(request: Any) -> str:
        tally.note(f"{request.headers['x-number']} {os.getpid()}")
        return "answered"

    return handle


def statuses_until_ended(program: Program, url: str) -> list[int]:
    """Of requests one by one, numbered, until the program has ended."""
    statuses: list[int] = []

    def ask() -> bool:
        statuses.append(httpx.get(url, headers={"x-number": str(len(statuses))}, timeout=60).status_code)
        return program.ended

    wait_until(ask, told=lambda: program.output)
    return statuses


@pytest.mark.row(2)
def test_a_request_whose_replica_dies_between_storing_and_ack_is_answered_and_runs_once(
    deploy: Deploy, joining: CommandLine, broker_server: PrivateRabbitMQ, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    url, name = deploy.named(numbered(tally))
    dying = joining.start_program(command("before the ack, the result being stored", "kill", "replica", name), ROOT)
    statuses = statuses_until_ended(dying, url)
    assert set(statuses) == {200}
    wait_until(lambda: messages_of(broker_server, name) == 0)
    assert f" {dying.pid}" in str(tally.lines), "it never had a request"
    assert len(tally) == len(statuses), f"one ran twice: {tally}"


@pytest.mark.row(3)
def test_a_request_whose_replica_dies_before_storing_runs_again_and_is_answered_once(
    deploy: Deploy, joining: CommandLine, tmp_path: Path
) -> None:
    tally = Tally(tmp_path)
    url, name = deploy.named(numbered(tally))
    dying = joining.start_program(command("before the result is stored", "kill", "replica", name), ROOT)
    statuses = statuses_until_ended(dying, url)
    assert set(statuses) == {200}
    runs = Counter(line.split()[0] for line in tally.lines)
    (twice,) = [number for number, count in runs.items() if count == 2]
    pids = {line.split()[1] for line in tally.lines if line.split()[0] == twice}
    assert len(runs) == len(statuses) and len(tally) == len(statuses) + 1
    assert str(dying.pid) in pids and len(pids) == 2


def asked_until_both_run(threads: ThreadPoolExecutor, url: str, gate: Gate) -> list[Future[httpx.Response]]:
    """Requests one by one until each of two replicas has one at the gate: one may be given some ahead."""
    asked: list[Future[httpx.Response]] = []

    def both_run() -> bool:
        asked.append(threads.submit(httpx.post, url, timeout=90))
        time.sleep(0.5)
        return len(set(gate.names)) == 2

    wait_until(both_run, deadline_s=19)  # as many as there are threads
    return asked


SHORT_HEARTBEAT_S = 2  # the default is 10, and a broker misses a client after at most three
WITH_A_SHORT_HEARTBEAT = f"""
from mqserve.broker.rabbitmq import connection
connection.HEARTBEAT_S = {SHORT_HEARTBEAT_S}
from mqserve.commands.cli import main
main()
"""


@pytest.mark.row(4)
def test_what_a_lost_machine_was_running_runs_elsewhere_after_its_heartbeats(
    deploy: Deploy, joining: CommandLine, broker_url: str, store_url: str, tmp_path: Path
) -> None:
    gate, began = Gate(tmp_path), 0.0

    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through(str(os.getpid()))
        return os.getpid()

    url, name = deploy.named(work)
    with machine() as far, Wire(broker_url, far.host) as broker, Wire(store_url, far.host) as store, ThreadPoolExecutor(40) as threads:
        there = joining.with_variables(MQSERVE_BROKER_URL=broker.url, MQSERVE_STORE_URL=store.url)
        replica = there.start_program([*far.command, sys.executable, "-c", WITH_A_SHORT_HEARTBEAT, "replica", name], ROOT)
        wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)
        asked = asked_until_both_run(threads, url, gate)
        far.unplug()
        began = time.monotonic()
        gate.open()
        responses = [future.result() for future in asked]
        took_s = time.monotonic() - began
        replica.kill()
    assert {response.status_code for response in responses} == {200}
    assert {response.json() for response in responses} == {int(name) for name in gate.names} - {replica.pid}
    assert took_s < 3 * SHORT_HEARTBEAT_S + 10


# Duplicates.


@pytest.mark.row(17)
def test_two_copies_that_run_at_once_leave_one_result_and_one_answer(
    client: serve.Client, deploy: Deploy, tmp_path: Path, broker_url: str, shared_namespace: str
) -> None:
    gate = Gate(tmp_path)

    def work(request: Any) -> int:
        gate.pass_through(str(os.getpid()))
        return os.getpid()

    name = deploy(work, num_replicas=2)
    with pika.BlockingConnection(pika.URLParameters(broker_url)) as connection:
        channel = connection.channel()
        replies = str(channel.queue_declare("", exclusive=True).method.queue)
        for copy in "12":
            properties = pika.BasicProperties(message_id="order-17", reply_to=replies, correlation_id=copy)
            channel.basic_publish(f"{shared_namespace}.requests", name, b"", properties)
        wait_until(lambda: gate.came == 2)
        assert len(set(gate.names)) == 2, "one replica took both"
        gate.open()
        answers = []
        for _ in range(2):
            _, properties, body = next(channel.consume(replies, auto_ack=True, inactivity_timeout=30))
            answers.append((properties.correlation_id, body))
    stored = serve.future("order-17", backend=name).result(timeout=30)
    assert sorted(answers) == [("1", str(stored).encode()), ("2", str(stored).encode())]


@pytest.mark.row(17)
def test_a_request_whose_ack_is_lost_with_the_connection_is_not_run_again(
    deploy: Deploy, joining: CommandLine, broker_wire: Wire, broker_server: PrivateRabbitMQ, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)

    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through(str(os.getpid()))
        return os.getpid()

    url, name = deploy.named(work)
    replica = joining.with_variables(MQSERVE_BROKER_URL=broker_wire.url).start("replica", name)
    wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)
    with ThreadPoolExecutor(40) as threads:
        asked = asked_until_both_run(threads, url, gate)
        broker_wire.blackhole()
        gate.open()
        assert {future.result().json() for future in asked} == {int(name) for name in gate.names}
    broker_wire.reset()
    broker_wire.mend()
    wait_until(lambda: messages_of(broker_server, name) == 0)
    assert gate.came == len(asked), "one ran twice"
    replica.kill()
