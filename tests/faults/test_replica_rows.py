"""Rows of docs/reliability.md in which a replica fails: it dies, its machine is gone, its user's code kills or blocks it.

Distributed, where a process can die alone.
"""

import ctypes
import faulthandler
import os
import pickle
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pika
import psutil
import pytest

import mqserve as serve
from mqserve.controller.node import SILENT_CHILD_AFTER_S
from tests.faults.crash_points import command
from tests.faults.netns import machine
from tests.faults.servers_say import dead_letter, is_marked, messages_of, stored_result
from tests.faults.wire import Wire
from tests.gates import Gate
from tests.instances import ROOT, CommandLine, Deploy, Program, distributed_only, new_name, wait_until
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


def test_row_01_at_least_once_runs_again_what_a_killed_replica_was_running(
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


def test_row_01_at_most_once_is_answered_502_and_never_runs_twice(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
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


def test_row_01_at_most_once_tells_a_handle_that_its_replica_was_lost(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    ref = client.get_handle(deploy(dying(tally, gate), delivery="at_most_once")).remote()
    wait_until(lambda: gate.came == 1)
    os.kill(int(tally.lines[0]), signal.SIGKILL)
    with pytest.raises(serve.RemoteError, match="ReplicaLost"):
        ref.result(30)
    gate.open()
    assert len(tally) == 1


def test_row_01_an_exception_is_a_result_and_never_run_again(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
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


def test_row_02_a_request_whose_replica_dies_between_storing_and_ack_is_answered_and_runs_once(
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


def test_row_03_a_request_whose_replica_dies_before_storing_runs_again_and_is_answered_once(
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


SHORT_HEARTBEAT_S = 2  # the default is 10, and a broker misses a client after at most three
WITH_A_SHORT_HEARTBEAT = f"""
from mqserve.broker import amqp_link
amqp_link.HEARTBEAT_S = {SHORT_HEARTBEAT_S}
from mqserve.cli import main
main()
"""


def test_row_04_what_a_lost_machine_was_running_runs_elsewhere_after_its_heartbeats(
    deploy: Deploy, joining: CommandLine, broker_url: str, store_url: str, tmp_path: Path
) -> None:
    gate, began = Gate(tmp_path), 0.0

    def work(request: Any) -> int:
        if request.method == "POST":
            gate.pass_through(str(os.getpid()))
        return os.getpid()

    url, name = deploy.named(work)
    with machine() as far, Wire(broker_url, far.host) as broker, Wire(store_url, far.host) as store, ThreadPoolExecutor(4) as threads:
        there = joining.with_variables(MQSERVE_BROKER_URL=broker.url, MQSERVE_STORE_URL=store.url)
        replica = there.start_program([*far.command, sys.executable, "-c", WITH_A_SHORT_HEARTBEAT, "replica", name], ROOT)
        wait_until(lambda: httpx.get(url, timeout=30).json() == replica.pid, told=lambda: replica.output)
        asked = [threads.submit(httpx.post, url, timeout=90) for _ in range(2)]
        wait_until(lambda: str(replica.pid) in gate.names and gate.came == 2)
        far.unplug()
        began = time.monotonic()
        gate.open()
        responses = [future.result() for future in asked]
        took_s = time.monotonic() - began
        replica.kill()
    assert [response.status_code for response in responses] == [200] * 2
    assert {response.json() for response in responses} == {int(name) for name in gate.names} - {replica.pid}
    assert took_s < 3 * SHORT_HEARTBEAT_S + 10


# Poison.


def exit_at_once() -> None:
    os._exit(1)


def fault() -> None:
    faulthandler.disable()
    ctypes.string_at(0)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("die", [exit_at_once, fault, kill])
def test_row_16_poison_is_set_aside_after_its_attempts_and_others_are_served(
    client: serve.Client, deploy: Deploy, tmp_path: Path, broker_url: str, shared_namespace: str, die: Callable[[], None]
) -> None:
    tally = Tally(tmp_path)

    def fragile(request: Any) -> str:
        if request.query_params.get("poison"):
            tally.note()
            time.sleep(0.2)
            die()
        return "well"

    url, name = deploy.named(fragile, max_attempts=2, num_replicas=2)
    with ThreadPoolExecutor(1) as background:
        poison = background.submit(httpx.get, url, params={"poison": "yes"}, timeout=60)
        others = [client.get_handle(name).remote() for _ in range(50)]
        assert serve.get(others, timeout=60) == ["well"] * 50
        response = poison.result()
    assert response.status_code == 500 and "max_attempts" in response.json()["detail"], response.text
    assert len(tally) == 2
    letter = dead_letter(broker_url, shared_namespace, name)
    assert "max_attempts" in letter["mq-reason"] and letter["mq-backend"] == name
    assert httpx.get(url, timeout=60).text == "well"


def test_row_16_memory_that_is_not_there_is_a_500_and_the_replica_lives(deploy: Deploy) -> None:
    def greedy(request: Any) -> int:
        import resource

        if request.query_params.get("much"):
            used = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20, resource.RLIM_INFINITY))
            try:
                return len(bytearray(2 * 2**30))
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return os.getpid()

    url = deploy.at(greedy)
    before = httpx.get(url, timeout=30).json()
    assert httpx.get(url, params={"much": "yes"}, timeout=30).status_code == 500
    assert httpx.get(url, timeout=30).json() == before


# Duplicates.


def test_row_17_two_copies_that_run_at_once_leave_one_result_and_one_answer(
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


def test_row_17_a_request_whose_ack_is_lost_with_the_connection_is_not_run_again(
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
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(httpx.post, url, timeout=60) for _ in range(2)]
        wait_until(lambda: str(replica.pid) in gate.names and gate.came == 2)
        broker_wire.blackhole()
        gate.open()
        assert {future.result().json() for future in asked} == {int(name) for name in gate.names}
    broker_wire.reset()
    broker_wire.mend()
    wait_until(lambda: messages_of(broker_server, name) == 0)
    assert gate.came == 2


# Slow ones.


def test_row_19_a_slow_replica_gets_what_it_can_do_and_other_routes_do_not_wait(deploy: Deploy, tmp_path: Path) -> None:
    first = tmp_path / "first"

    class Work:
        """The first one that is made is slow."""

        def __init__(self) -> None:
            try:
                first.touch(exist_ok=False)
                self.pause_s = 1.0
            except FileExistsError:
                self.pause_s = 0.02

        def __call__(self, request: Any) -> float:
            time.sleep(self.pause_s)
            return self.pause_s

    url, other = deploy.at(Work, num_replicas=2), deploy.at(lambda request: "fast")
    fast = 0
    with ThreadPoolExecutor(50) as threads, httpx.Client(timeout=60, limits=httpx.Limits(max_connections=60)) as pool:
        asked = [threads.submit(pool.get, url) for _ in range(50)]
        while not all(future.done() for future in asked):
            assert pool.get(other).text == "fast"
            fast += 1
        spread = Counter(future.result().json() for future in asked)
    assert spread[1.0] <= 5, spread
    assert fast > 10, "a fast route waited for a slow one"


# Blocking. All at once, since each takes longer than a silent replica is tolerated.

SLEEP_S = 1.6 * SILENT_CHILD_AFTER_S
TOLD_AFTER_S = 8


class Rotten:
    """Its pickle holds the GIL for years: the hash of a tuple in a tuple in a tuple is computed anew at each level."""

    def __reduce__(self) -> Any:
        nested: Any = ()
        for _ in range(64):
            nested = (nested, nested)
        return frozenset, ([nested],)


def ask_while(url: str, alive: Callable[[], bool]) -> list[int]:
    """The statuses of requests sent now and then as long as it lives."""
    with ThreadPoolExecutor(40) as threads:
        asked = []

        def ask() -> bool:
            asked.append(threads.submit(httpx.get, url, timeout=60))
            time.sleep(0.5)
            return not alive()

        wait_until(ask, deadline_s=3 * SILENT_CHILD_AFTER_S)
        return [future.result().status_code for future in asked]


def test_row_18_code_that_blocks_costs_nobody_else_and_a_replica_that_cannot_breathe_is_replaced(deploy: Deploy, tmp_path: Path) -> None:
    gates = {name: Gate(tmp_path) for name in ("sleep", "regex", "pickle")}
    for gate in gates.values():
        gate.open()
    rotten = pickle.dumps(Rotten())

    async def sleep(request: Any) -> int:
        if request.method == "POST":
            gates["sleep"].pass_through(str(os.getpid()))
            time.sleep(SLEEP_S)  # noqa: ASYNC251 -- what this is about
        return os.getpid()

    def regex(request: Any) -> int:
        if request.method == "POST":
            gates["regex"].pass_through(str(os.getpid()))
            re.match("(a|a)*b", "a" * 64)
        return os.getpid()

    def unpickle(request: Any) -> int:
        if request.method == "POST":
            gates["pickle"].pass_through(str(os.getpid()))
            pickle.loads(rotten)
        return os.getpid()

    urls = {
        "sleep": deploy.at(sleep),
        "regex": deploy.at(regex, num_replicas=2, request_timeout_s=TOLD_AFTER_S),
        "pickle": deploy.at(unpickle, num_replicas=2, request_timeout_s=TOLD_AFTER_S),
    }
    with ThreadPoolExecutor(6) as threads:
        blocking = {name: threads.submit(httpx.post, url, timeout=90) for name, url in urls.items()}
        pids = {name: int(wait_until(lambda gate=gate: gate.names)[0]) for name, gate in gates.items()}  # type: ignore[misc]
        others = {
            name: threads.submit(ask_while, urls[name], lambda pid=pids[name]: psutil.pid_exists(pid))  # type: ignore[misc]
            for name in ("regex", "pickle")
        }
        assert blocking["regex"].result().status_code == blocking["pickle"].result().status_code == 504
        for name in ("regex", "pickle"):
            statuses = Counter(others[name].result())
            assert statuses[200] >= 10 and set(statuses) <= {200, 504}, (name, statuses)
            assert {httpx.get(urls[name], timeout=30).status_code for _ in range(10)} == {200}
        assert blocking["sleep"].result().json() == pids["sleep"] == httpx.get(urls["sleep"], timeout=30).json()
    assert [gate.came for gate in gates.values()] == [1, 1, 1], "what blocks was run again"
