"""Rows of docs/reliability.md in which the user's code fails its replica: it kills it, blocks it, or is slow."""

import ctypes
import faulthandler
import os
import pickle
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import mqserve as serve
from mqserve.controller.node import SILENT_CHILD_AFTER_S
from tests.faults.servers_say import dead_letter
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, wait_until
from tests.tallies import Tally

pytestmark = distributed_only


# Poison.


def exit_at_once() -> None:
    os._exit(1)


def fault() -> None:
    faulthandler.disable()
    ctypes.string_at(0)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.row(16)
@pytest.mark.parametrize("die", [exit_at_once, fault, kill])
def test_poison_is_set_aside_after_its_attempts_and_others_are_served(
    client: serve.Client, deploy: Deploy, tmp_path: Path, broker_url: str, shared_namespace: str, die: Callable[[], None]
) -> None:
    tally = Tally(tmp_path)

    def fragile(request: Any) -> str:
        if request.query_params.get("poison"):
            tally.note()
            time.sleep(0.5)  # for its mark to be written, mostly
            die()
        return "well"

    url, name = deploy.named(fragile, max_attempts=2, num_replicas=2)
    with ThreadPoolExecutor(1) as background:
        poison = background.submit(httpx.get, url, params={"poison": "yes"}, timeout=60)
        others = [client.get_handle(name).remote() for _ in range(50)]
        assert serve.get(others, timeout=60) == ["well"] * 50
        response = poison.result()
    assert response.status_code == 500 and "max_attempts" in response.json()["detail"], response.text
    assert len(tally) in (2, 3), "one run more than its attempts, where the first one's mark came too late"
    letter = dead_letter(broker_url, shared_namespace, name)
    assert "max_attempts" in letter["mq-reason"] and letter["mq-backend"] == name
    assert httpx.get(url, timeout=60).text == "well"


@pytest.mark.row(16)
def test_memory_that_is_not_there_is_a_500_and_the_replica_lives(deploy: Deploy) -> None:
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


# Slow ones.


@pytest.mark.row(19)
def test_a_slow_replica_gets_what_it_can_do_and_other_routes_do_not_wait(deploy: Deploy, tmp_path: Path) -> None:
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
    assert spread[1.0] < 15, f"in turns it would have got 25: {spread}"
    assert fast > 10, "a fast route waited for a slow one"


# Blocking. All at once, since each takes longer than a silent replica is tolerated.

SLEEP_S = 1.2 * SILENT_CHILD_AFTER_S
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


@pytest.mark.row(18)
def test_code_that_blocks_costs_nobody_else_and_a_replica_that_cannot_breathe_is_replaced(deploy: Deploy, tmp_path: Path) -> None:
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


@pytest.mark.row(16)
def test_a_call_that_never_ends_costs_its_replica_and_not_the_backend(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    def handler(request: Any) -> str:
        while request.data == "endless":
            time.sleep(0.01)
        return f"{os.getpid()}"

    handle = client.get_handle(deploy(handler, request_timeout_s=1))
    with pytest.raises(serve.RequestTimeout):
        handle.remote("endless").result(20)

    def is_served() -> bool:
        try:
            return bool(handle.remote("hello").result(20))
        except serve.RequestTimeout:
            return False

    wait_until(is_served, 60)


@pytest.mark.row(3)
def test_user_code_is_told_the_requests_id_and_the_number_of_its_run(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    def handler(request: Any) -> list[Any]:
        if request.attempt == 1:
            time.sleep(0.5)  # for its mark to be written, mostly
            os._exit(1)
        return [request.id, request.attempt]

    ref = client.get_handle(deploy(handler)).remote()
    assert ref.result(60) == [ref.id, 2]
