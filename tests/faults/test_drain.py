"""Replacing replicas, proxies and controllers under load: not one request fails. All on one distributed instance."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import mqserve as serve
from mqserve.controller.node import SILENT_CHILD_AFTER_S
from tests.faults.load import Load
from tests.faults.members import Members
from tests.gates import Gate
from tests.instances import Deploy, Program, distributed_only, new_name, wait_until

pytestmark = [distributed_only, pytest.mark.row(26)]


@pytest.fixture(scope="module", autouse=True)
def later_controllers() -> Iterator[list[Program]]:
    """Started by a test, and the instance's from then on: so they end with it."""
    programs: list[Program] = []
    yield programs
    assert [program.wait() for program in programs] == [0] * len(programs)


def says(word: str) -> Callable[[Any], str]:
    def say(request: Any) -> str:
        time.sleep(0.005)
        return word

    return say


def serving(deploy: Deploy, target: Any, **config: Any) -> tuple[str, str]:
    """(name, URL) of a backend of the test's own."""
    route = f"/{new_name('r')}"
    return deploy(target, route=route, **config), f"{deploy.url}{route}"


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_every_replica_is_told_to_end_one_after_another(deploy: Deploy, members: Members) -> None:
    name, url = serving(deploy, says("served"), num_replicas=3)
    first = wait_until(lambda: members.pids("replica", name))
    with Load(url) as load:
        for pid in first:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda pid=pid: is_gone(pid) and len(members.pids("replica", name) - {pid}) == 3)  # type: ignore[misc]
    assert not load.failed and not first & members.pids("replica", name)


def test_every_replica_is_replaced_by_new_code(client: serve.Client, deploy: Deploy, members: Members) -> None:
    name, url = serving(deploy, says("old"), num_replicas=3)
    with Load(url) as load:
        client.update_backend(name, says("new"))
        wait_until(lambda: not members.beats("replica", name, "draining"))
    assert not load.failed and load.texts == {"old", "new"}


def test_replicas_are_fewer(client: serve.Client, deploy: Deploy, members: Members) -> None:
    name, url = serving(deploy, says("served"), num_replicas=4)
    with Load(url) as load:
        client.update_backend_config(name, {"num_replicas": 1})
        wait_until(lambda: len(members.pids("replica", name)) == 1)
    assert not load.failed


def test_the_queue_gets_another_limit(client: serve.Client, deploy: Deploy, members: Members) -> None:
    name, url = serving(deploy, says("served"), num_replicas=2)
    with Load(url) as load:
        for limit in (500, 1000):
            client.update_backend_config(name, {"max_queued_requests": limit})
        wait_until(lambda: members.observed().queues.get(name) == (3,) and name not in members.observed().retiring)
    assert not load.failed


def test_a_proxy_is_told_to_end(deploy: Deploy, members: Members) -> None:
    url = deploy.at(says("served"))
    (old,) = wait_until(lambda: members.pids("proxy"))
    with Load(url) as load:
        os.kill(old, signal.SIGTERM)
        wait_until(lambda: is_gone(old))
        (new,) = wait_until(lambda: members.pids("proxy"))
    assert not load.failed and new != old


def test_the_next_proxy_serves_while_the_last_one_finishes(deploy: Deploy, members: Members, tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    def handler(request: Any) -> str:
        if "slow" in request.query_params:
            gate.pass_through()
        return "served"

    url = deploy.at(handler, num_replicas=2, max_concurrent_queries=1)
    (old,) = wait_until(lambda: members.pids("proxy"))
    with ThreadPoolExecutor(1) as background:
        slow = background.submit(httpx.get, url, params={"slow": ""}, timeout=60)
        wait_until(lambda: gate.came == 1)
        with Load(url) as load:
            os.kill(old, signal.SIGTERM)
            wait_until(lambda: members.pids("proxy") - {old})
            assert not is_gone(old) and not slow.done()
            gate.open()
            assert slow.result().status_code == 200
            wait_until(lambda: is_gone(old))
    assert not load.failed


@pytest.mark.row(11)
def test_nobody_is_refused_while_a_killed_proxy_is_replaced(deploy: Deploy, members: Members) -> None:
    url = deploy.at(says("served"))
    (old,) = wait_until(lambda: members.pids("proxy"))
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: is_gone(old))
    assert [httpx.get(url, timeout=30).status_code for _ in range(20)] == [200] * 20
    wait_until(lambda: members.pids("proxy") - {old})
    wait_until(lambda: old not in {beat.pid for beat in members.last_beats()}, 20)  # its node says so; by its silence it is lost after 25 s


@pytest.mark.row(11)
def test_who_connects_while_the_proxy_hangs_is_answered_by_the_next_one(deploy: Deploy, members: Members) -> None:
    url = deploy.at(says("served"))
    (old,) = wait_until(lambda: members.pids("proxy"))
    os.kill(old, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(old).status() == psutil.STATUS_STOPPED)
    members.age(old, SILENT_CHILD_AFTER_S + 1)  # its node gives it so long, and then kills it
    assert httpx.get(url, timeout=90).status_code == 200
    assert is_gone(old)


def test_the_controller_is_replaced(
    client: serve.Client,
    deploy: Deploy,
    members: Members,
    environment: dict[str, str],
    later_controllers: list[Program],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    name, url = serving(deploy, says("served"))
    first, epoch = members.leader()
    with Load(url) as load:
        other = Program([sys.executable, "-m", "mqserve", "controller"], tmp_path_factory.mktemp("controller"), environment)
        later_controllers.append(other)
        os.kill(first, signal.SIGTERM)
        # It, or the one that this process starts in place of the one that ends.
        wait_until(lambda: (lead := members.leader())[0] not in (0, first) and lead[1] > epoch)
        client.update_backend_config(name, {"num_replicas": 3})
    assert not load.failed and len(members.pids("replica", name)) == 3


def raises() -> type:
    class Broken:
        def __init__(self) -> None:
            raise LookupError("no model file")

        def __call__(self, request: Any) -> str:
            return "bad"

    return Broken


def never_gets_ready() -> type:
    class Endless:
        def __init__(self) -> None:
            time.sleep(120)

        def __call__(self, request: Any) -> str:
            return "bad"

    return Endless


@pytest.mark.parametrize(("bad", "reason"), [(raises, "no model file"), (never_gets_ready, "start_timeout_s")])
def test_a_bad_new_version_stops_the_roll_out(
    client: serve.Client, deploy: Deploy, members: Members, bad: Callable[[], type], reason: str
) -> None:
    name, url = serving(deploy, says("old"), num_replicas=2, start_timeout_s=5)
    old = members.pids("replica", name)
    with Load(url) as load:
        with pytest.raises(serve.BackendFailed, match=reason):
            client.update_backend(name, bad())
        assert members.pids("replica", name) >= old
    assert not load.failed and load.texts == {"old"}


def test_the_request_of_a_replica_that_is_killed_after_its_grace_is_answered_by_another(
    client: serve.Client, deploy: Deploy, members: Members, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)

    def old(request: Any) -> str:
        if "slow" in request.query_params:
            gate.pass_through(str(os.getpid()))
        return "old"

    name, url = serving(deploy, old, num_replicas=2, graceful_shutdown_timeout_s=0.5)
    with ThreadPoolExecutor(1) as background:
        slow = background.submit(httpx.get, url, params={"slow": ""}, timeout=60)
        wait_until(lambda: gate.came == 1)
        stuck = int(gate.names[0])
        os.kill(stuck, signal.SIGSTOP)  # its I/O loop too: it cannot give anything back, and hears no SIGTERM
        try:
            with Load(url) as load:
                client.update_backend(name, says("new"))
                wait_until(lambda: is_gone(stuck))
                assert (slow.result(30).status_code, slow.result().text) == (200, "new")
        finally:
            if not is_gone(stuck):
                os.kill(stuck, signal.SIGCONT)
            gate.open()
    # What the stuck one held waits for the kill, at most some six seconds; nothing of it is lost.
    assert not load.failed
