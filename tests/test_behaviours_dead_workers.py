"""A replica whose worker is dead or stuck is noticed and replaced, and the reason is said. In both forms."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import mqserve as serve
from mqserve.replicas import stuck
from tests.gates import Gate
from tests.instances import NOISE_S, Deploy, wait_until

NOTICED_WITHIN_S = 3 + NOISE_S


def stops_its_loop(name: str) -> Any:
    async def handler(request: Any) -> Any:
        import asyncio

        if request.query_params.get("bad"):
            asyncio.get_running_loop().stop()
        return name

    return handler


def closes_its_loop(name: str) -> Any:
    async def handler(request: Any) -> Any:
        import asyncio

        if request.query_params.get("bad"):
            loop: Any = asyncio.get_running_loop()
            loop.run_forever = loop.close
            loop.stop()
            await asyncio.sleep(60)
        return name

    return handler


@pytest.mark.parametrize("make", [stops_its_loop, closes_its_loop])
def test_a_worker_whose_loop_was_ended_serves_again_within_seconds(deploy: Deploy, make: Any) -> None:
    url = deploy.at(make("well"), request_timeout_s=2)
    httpx.get(url, params={"bad": "1"}, timeout=10)
    began = time.monotonic()
    wait_until(lambda: httpx.get(url, timeout=10).text == "well")
    assert time.monotonic() - began < NOTICED_WITHIN_S


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process a stuck worker is noticed after a second."""
    monkeypatch.setattr(stuck, "STUCK_AFTER_S", 1.0)


@pytest.mark.parametrize("form", ["embedded"], indirect=True)
def test_a_backend_whose_pool_threads_are_all_taken_gets_new_ones(
    deploy: Deploy, tmp_path: Path, soon: None, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(tmp_path)

    def handler(request: Any) -> Any:
        if request.query_params.get("bad"):
            gate.pass_through()
        return "well"

    url, name = deploy.named(handler, sync_threads=2, request_timeout_s=1)
    with ThreadPoolExecutor() as threads:
        stuck = [threads.submit(httpx.get, url, params={"bad": "1"}, timeout=20) for _ in range(2)]
        assert {answer.result().status_code for answer in stuck} == {504}
    wait_until(lambda: httpx.get(url, timeout=10).text == "well", NOTICED_WITHIN_S + 4)
    assert f"a call of backend '{name}' goes on" in caplog.text
    gate.open()


@pytest.mark.parametrize("form", ["embedded"], indirect=True)
def test_a_backend_whose_loop_is_blocked_outside_any_request_gets_another_one(
    deploy: Deploy, tmp_path: Path, soon: None, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(tmp_path)

    async def handler(request: Any) -> Any:
        import asyncio

        if request.query_params.get("bad"):
            asyncio.get_running_loop().call_later(0.1, gate.pass_through)
        return "well"

    url, name = deploy.named(handler, request_timeout_s=1)
    assert httpx.get(url, params={"bad": "1"}).text == "well"
    wait_until(lambda: gate.came == 1)
    assert httpx.get(url, timeout=10).status_code == 504
    wait_until(lambda: httpx.get(url, timeout=10).text == "well", NOTICED_WITHIN_S + 4)
    assert f"code of backend '{name}' has blocked its replica" in caplog.text
    gate.open()


@pytest.mark.parametrize("form", ["embedded"], indirect=True)
def test_a_long_call_that_is_wanted_is_not_taken_for_a_stuck_one(deploy: Deploy, soon: None, caplog: pytest.LogCaptureFixture) -> None:
    def handler(request: serve.Request) -> str:
        time.sleep(4)
        return "done"

    assert httpx.get(deploy.at(handler, request_timeout_s=10), timeout=20).text == "done"
    assert "replacing it" not in caplog.text
