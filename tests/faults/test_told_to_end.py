"""A clean end is no failure: replicas that are told to end while they start, alone or with their node, are started elsewhere at once."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import mqserve as serve
from tests.faults.members import Members
from tests.gates import Gate
from tests.instances import SECRET_KEY, CommandLine, Program, wait_until


@pytest.fixture
def client(
    broker_url: str, store_url: str, namespace: str, distributed_shell: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[serve.Client]:
    """Of an instance without a node."""
    monkeypatch.setenv("MQSERVE_SECRET_KEY", SECRET_KEY)
    client = serve.start(http_options={"location": None}, broker_url=broker_url, store_url=store_url, namespace=namespace, with_node=False)
    yield client
    client.shutdown()


@pytest.fixture
def members(store_url: str, namespace: str) -> Iterator[Members]:
    members = Members(store_url, namespace)
    yield members
    members.close()


def node(shell: CommandLine, members: Members, name: str) -> Program:
    program = shell.start("node", "--node-id", name, "--no-proxy")
    wait_until(lambda: any(beat.id == name for beat in members.beats("node")), told=lambda: program.output)
    return program


def behind(gate: Gate) -> type:
    class Slow:
        def __init__(self) -> None:
            gate.pass_through()

        def __call__(self, request: object) -> str:
            return "served"

    return Slow


def replica_of(program: Program) -> psutil.Process:
    def found() -> list[psutil.Process]:
        return [child for child in program.descendants() if child.cmdline()[3:4] == ["replica"]]

    return wait_until(found)[0]


def test_a_node_that_drains_while_a_replica_starts_there_hands_it_to_another_at_once_and_nothing_is_said_to_have_failed(
    client: serve.Client, distributed_shell: CommandLine, members: Members
) -> None:
    gate = Gate(distributed_shell.folder)
    first = node(distributed_shell, members, "first")
    with ThreadPoolExecutor(1) as background:
        creating = background.submit(client.create_backend, "b", behind(gate))
        wait_until(lambda: gate.came == 1)
        node(distributed_shell, members, "second")
        first.signal(signal.SIGTERM)
        began = time.monotonic()
        assert first.wait(20) == 0
        assert time.monotonic() - began < 15, "it waited for a constructor of which nobody wants the outcome"
        wait_until(lambda: gate.came == 2, told=lambda: first.output)
        assert not members.observed().problems
        gate.open()
        creating.result(60)
    assert "died" not in first.output


@pytest.mark.parametrize("moment", ["process", "constructor"])
def test_a_replica_that_is_told_to_end_while_it_starts_is_followed_by_another_and_is_no_failure(
    client: serve.Client, distributed_shell: CommandLine, members: Members, moment: str
) -> None:
    gate = Gate(distributed_shell.folder)
    program = node(distributed_shell, members, "first")
    with ThreadPoolExecutor(1) as background:
        creating = background.submit(client.create_backend, "b", behind(gate))
        told = replica_of(program)
        if moment == "constructor":
            wait_until(lambda: gate.came == 1)
        told.terminate()
        wait_until(lambda: not told.is_running() or told.status() == psutil.STATUS_ZOMBIE, 15)
        wait_until(lambda: replica_of(program) != told)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert not members.observed().problems
            time.sleep(0.05)
        gate.open()
        creating.result(60)
