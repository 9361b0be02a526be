"""Requests whose replica dies: run again, or never twice, or set aside; distributed, where a process can die alone."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.gates import Gate
from tests.instances import Deploy, distributed_only, new_name, wait_until
from tests.tallies import Tally

pytestmark = distributed_only


def dying(tally: Tally, gate: Gate) -> Any:
    """Notes its process, then waits at the gate to be killed."""

    def handle(request: Any) -> str:
        tally.note(os.getpid())
        gate.pass_through()
        return "answered"

    return handle


def test_at_least_once_runs_again_what_a_killed_replica_was_running(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    ref = client.get_handle(deploy(dying(tally, gate))).remote()
    wait_until(lambda: gate.came == 1)
    os.kill(int(tally.lines[0]), signal.SIGKILL)
    wait_until(lambda: gate.came == 2)
    gate.open()
    assert ref.result(30) == "answered" and len(tally) == 2


def test_at_most_once_is_answered_502_and_never_runs_twice(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

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


def test_at_most_once_tells_a_handle_that_its_replica_was_lost(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally, gate = Tally(tmp_path), Gate(tmp_path)
    ref = client.get_handle(deploy(dying(tally, gate), delivery="at_most_once")).remote()
    wait_until(lambda: gate.came == 1)
    os.kill(int(tally.lines[0]), signal.SIGKILL)
    with pytest.raises(serve.RemoteError, match="ReplicaLost"):
        ref.result(30)
    gate.open()
    assert len(tally) == 1


def test_poison_is_answered_500_after_its_attempts_and_others_are_served(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    def fragile(request: Any) -> str:
        if request.query_params.get("poison"):
            tally.note()
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return "well"

    name = new_name("r")
    backend = deploy(fragile, route=f"/{name}", max_attempts=2, num_replicas=2)
    poison = client.get_handle(backend).remote(poison="yes")
    others = [client.get_handle(backend).remote() for _ in range(50)]
    with pytest.raises(serve.MQServeError, match="max_attempts"):
        poison.result(60)
    assert serve.get(others, timeout=60) == ["well"] * 50
    assert len(tally) == 2
    response = httpx.get(f"{deploy.url}/{name}", params={"poison": "yes"}, timeout=60)
    assert response.status_code == 500, response.text
    assert httpx.get(f"{deploy.url}/{name}", timeout=60).text == "well"


def test_an_exception_is_a_result_and_never_run_again(client: serve.Client, deploy: Deploy, tmp_path: Path) -> None:
    tally = Tally(tmp_path)

    def fail(request: Any) -> None:
        tally.note()
        raise LookupError("no such digit")

    with pytest.raises(LookupError):
        client.get_handle(deploy(fail)).remote().result(30)
    assert len(tally) == 1
