"""Rows of docs/reliability.md in which a controller fails, alone or cut off; two of them at once are in test_controllers.py."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

import mqserve as serve
from tests.faults.crash_points import command
from tests.faults.crowd import Crowd
from tests.faults.wire import Wire
from tests.instances import ROOT, SECRET_KEY, CommandLine, Program, answers, wait_until
from tests.ports import free_port

TAKEN_OVER_WITHIN_S = 40.0  # the lead lapses after 8 s


class Parts:
    """An instance of separate programs: `mqserve controller`, `mqserve node`, `mqserve proxy`, and this process as its client."""

    def __init__(self, shell: CommandLine, controllers: CommandLine) -> None:
        self.controller = controllers.start("controller")
        self.node = shell.start("node", "--num-cpus", "16")
        port = free_port()
        proxy = shell.start("proxy", "--port", str(port))
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/readyz"), told=lambda: proxy.output)
        wait_until(lambda: shell.run("status").returncode == 0, told=lambda: self.controller.output)
        self.client = serve.connect()

    def replicas(self, backend: str) -> set[int]:
        """The processes of a backend's replicas."""
        found = set()
        for process in self.node.descendants():
            try:
                if process.cmdline()[1:5] == ["-m", "mqserve", "replica", backend]:
                    found.add(process.pid)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def wired(distributed_shell: CommandLine, broker_wire: Wire, store_wire: Wire) -> Iterator[CommandLine]:
    yield distributed_shell.with_variables(MQSERVE_BROKER_URL=broker_wire.url, MQSERVE_STORE_URL=store_wire.url)
    distributed_shell.close()  # before the wires are: who can say goodbye ends sooner


@pytest.fixture
def parts(
    distributed_shell: CommandLine, wired: CommandLine, broker_url: str, store_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Parts]:
    monkeypatch.setenv("MQSERVE_BROKER_URL", broker_url)
    monkeypatch.setenv("MQSERVE_STORE_URL", store_url)
    monkeypatch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
    monkeypatch.setenv("MQSERVE_NAMESPACE", namespace)
    parts = Parts(distributed_shell, wired)
    yield parts
    parts.client.shutdown()


def well(request: Any) -> int:
    return os.getpid()


@pytest.mark.row(12)
def test_controllers_that_are_killed_in_each_phase_stop_no_traffic_and_the_next_one_adopts_what_runs(
    parts: Parts, distributed_shell: CommandLine
) -> None:
    client = parts.client
    client.create_backend("b", well, config={"num_replicas": 2})
    client.create_endpoint("b", backend="b", route="/b")
    first = parts.replicas("b")
    assert len(first) == 2

    def ended(controller: Program) -> bool:
        return controller.ended

    with Crowd(f"{client.http_url()}/b") as load, ThreadPoolExecutor(2) as background:
        load.wait_for(20)
        parts.controller.kill()
        scaled = background.submit(client.update_backend_config, "b", {"num_replicas": 3})
        for point in ("before the observed state is written", "before a queue is declared"):
            dying = distributed_shell.start_program(command(point, "kill", "controller"), ROOT)
            wait_until(lambda: ended(dying), TAKEN_OVER_WITHIN_S, told=lambda: dying.output)  # noqa: B023
        assert parts.replicas("b") == first
        distributed_shell.start("controller")
        scaled.result(timeout=TAKEN_OVER_WITHIN_S)
        client.create_backend("late", well)
        load.wait_for(20)
    assert set(load.statuses) == {200} and not load.failures, load
    assert first < parts.replicas("b") and len(parts.replicas("b")) == 3
    assert len(parts.replicas("late")) == 1


@pytest.mark.row(14)
def test_a_controller_that_is_cut_off_from_everything_stops_no_traffic_and_goes_on_afterwards(
    parts: Parts, broker_wire: Wire, store_wire: Wire
) -> None:
    client = parts.client
    client.create_backend("b", well, config={"num_replicas": 2})
    client.create_endpoint("b", backend="b", route="/b")
    first = parts.replicas("b")
    with Crowd(f"{client.http_url()}/b") as load, ThreadPoolExecutor(1) as background:
        broker_wire.blackhole()
        store_wire.blackhole()
        lost = first.copy().pop()
        os.kill(lost, signal.SIGKILL)
        scaled = background.submit(client.update_backend_config, "b", {"num_replicas": 3})
        load.wait_for(500)
        assert parts.replicas("b") == first - {lost}, "somebody else decides too"
        broker_wire.mend()
        store_wire.mend()
        scaled.result(timeout=TAKEN_OVER_WITHIN_S)
        load.wait_for(20)
    assert set(load.statuses) == {200} and not load.failures, load
    assert len(parts.replicas("b")) == 3 and first - {lost} < parts.replicas("b")
