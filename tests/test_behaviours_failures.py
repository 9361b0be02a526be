"""What dies, and what goes on: controller, proxies, replicas; distributed, since the embedded form is one process."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import mqserve as serve
from tests.instances import Deploy, answers, distributed_only, new_name, wait_until
from tests.tallies import Tally

pytestmark = distributed_only


def pid_of_replica(request: Any) -> int:
    time.sleep(0.005)
    return os.getpid()


def children(role: str) -> list[psutil.Process]:
    """The processes of a role under this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if role in process.cmdline()[1:6] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_killed_replica_is_replaced_by_another_process(client: serve.Client, deploy: Deploy) -> None:
    handle = client.get_handle(deploy(pid_of_replica))
    first = handle.remote().result(30)
    kill(first)
    assert handle.remote().result(30) != first


def test_one_of_two_replicas_dies_while_its_successor_hangs_and_the_other_answers(
    client: serve.Client, deploy: Deploy, tmp_path: Path
) -> None:
    made = Tally(tmp_path)

    class Hanging:
        def __init__(self) -> None:
            made.note()
            while len(made) > 2 and not (tmp_path / "go").exists():
                time.sleep(0.05)

        def __call__(self, request: Any) -> int:
            return pid_of_replica(request)

    handle = client.get_handle(deploy(Hanging, num_replicas=2))
    pids = set(serve.get([handle.remote() for _ in range(40)], timeout=30))
    assert len(pids) == 2
    kill(pids.pop())
    wait_until(lambda: len(made) == 3)
    assert set(serve.get([handle.remote() for _ in range(10)], timeout=30)) == pids
    (tmp_path / "go").touch()


def test_killed_proxies_come_back_and_serve_what_changed_meanwhile(client: serve.Client, deploy: Deploy) -> None:
    name, other = new_name("r"), deploy(lambda request: "other")
    first = deploy(lambda request: "first", route=f"/{name}")
    url = f"{client.http_url()}/{name}"
    assert httpx.get(url).text == "first"
    for proxy in children("proxy"):
        kill(proxy.pid)
    client.set_traffic(first, {other: 1.0})
    wait_until(lambda: answers(url))
    assert httpx.get(url).text == "other"
    client.set_traffic(first, {first: 1.0})


def test_identical_calls_make_one_backend_and_one_endpoint(client: serve.Client, deploy: Deploy) -> None:
    name = deploy(pid_of_replica, route=f"/{new_name('r')}")
    before = client.list_endpoints()
    for _ in range(10):
        with pytest.raises(ValueError):
            client.create_backend(name, pid_of_replica)
        with pytest.raises(ValueError):
            client.create_endpoint(name, backend=name, route=before[name]["route"])
    assert client.list_endpoints() == before
    assert len(set(serve.get([client.get_handle(name).remote() for _ in range(20)], timeout=30))) == 1


def test_without_a_controller_traffic_goes_on_and_its_split_too(client: serve.Client, deploy: Deploy) -> None:
    """The last of the module: nobody replaces the controller of an instance that a program started."""
    (controller,) = children("controller")
    name = new_name("r")
    endpoint = deploy(pid_of_replica, route=f"/{name}")
    other = deploy(lambda request: "other")
    controller.suspend()
    try:
        url = f"{client.http_url()}/{name}"
        assert {httpx.get(url).status_code for _ in range(20)} == {200}
        client.set_traffic(endpoint, {other: 1.0})
        assert httpx.get(url).text == "other"
        assert client.get_handle(endpoint).remote().result(30) == "other"
        client.set_traffic(endpoint, {endpoint: 1.0})
    finally:
        controller.resume()
    late = new_name("b")
    client.create_backend(late, lambda request: "late")
    client.create_endpoint(late, backend=late)
    assert client.get_handle(late).remote().result(30) == "late"
    client.delete_endpoint(late)
    client.delete_backend(late)
