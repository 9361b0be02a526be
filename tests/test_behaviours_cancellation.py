"""Requests that nobody wants any more: cancelled by their future, left by their client, or out of time."""

import asyncio
import gc
import re
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import mqserve as serve
from tests.faults.servers_say import words_said
from tests.gates import Gate
from tests.instances import Deploy, wait_until
from tests.tallies import Tally


@pytest.fixture
def all_said(form: str, request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Waits until so many cancellations were said since the test began: each replica hears them in their order, so the next word is the
    last one. Embedded, where no server is on the way, they are heard in the order in which they are made."""
    environment = request.getfixturevalue("environment") if form == "distributed" else {}
    before = words_said(environment) if environment else 0

    def wait(count: int) -> None:
        if environment:
            wait_until(lambda: words_said(environment) == before + count)

    return wait


def open_requests_of(name: str, url: str) -> int:
    """Those that the proxy waits for, as its metrics say."""
    found = re.search(rf'^mqserve_backend_queued_queries{{backend="{name}",.*}} (\d+)', httpx.get(f"{url}/-/metrics").text, re.MULTILINE)
    return int(found[1]) if found else 0


def plain(gate: Gate, tally: Tally) -> Callable[[Any], str]:
    """Passes the gate, unless its request is cancelled: then it notes that."""

    def handler(request: Any) -> str:
        tally.note(f"start {request.data}")
        while not gate._open_file.exists():
            if serve.cancelled():
                tally.note(f"heard {request.data}")
                return "nobody reads this"
            time.sleep(0.005)
        return "done"

    return handler


def asynchronous(gate: Gate, tally: Tally) -> Callable[[Any], Any]:
    async def handler(request: Any) -> str:
        tally.note(f"start {request.data}")
        try:
            await gate.pass_through_async()
        except asyncio.CancelledError:
            tally.note(f"heard {request.data}")
            raise
        return "done"

    return handler


HANDLERS = pytest.mark.parametrize("kind", [plain, asynchronous])


@HANDLERS
def test_a_running_call_hears_that_its_future_was_cancelled(
    kind: Any, client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally
) -> None:
    ref = client.get_handle(deploy(kind(gate, tally))).remote(1)
    wait_until(lambda: "start 1" in tally.lines)
    assert ref.cancel()
    wait_until(lambda: "heard 1" in tally.lines)
    with pytest.raises(serve.Cancelled):
        ref.result(30)


def test_a_cancelled_request_that_waits_never_starts(
    client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally, all_said: Callable[[int], None]
) -> None:
    handle = client.get_handle(deploy(plain(gate, tally)))
    first = handle.remote(1)
    wait_until(lambda: "start 1" in tally.lines)
    waiting = [handle.remote(number) for number in range(2, 30)]
    for ref in waiting[:-1]:
        assert ref.cancel()
    all_said(len(waiting) - 1)
    assert first.cancel()
    wait_until(lambda: "heard 1" in tally.lines)
    gate.open()
    assert waiting[-1].result(30) == "done"
    assert tally.lines == ["start 1", "heard 1", "start 29"]


@HANDLERS
def test_a_cancelled_call_leaves_its_slot_to_the_next(kind: Any, client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    handle = client.get_handle(deploy(kind(gate, tally), max_concurrent_queries=1))
    for number in range(5):
        ref = handle.remote(number)
        wait_until(lambda number=number: f"start {number}" in tally.lines)  # type: ignore[misc]
        assert ref.cancel()
    gate.open()
    assert handle.remote("last").result(30) == "done"


def test_what_has_its_result_cannot_be_cancelled(client: serve.Client, deploy: Deploy) -> None:
    ref = client.get_handle(deploy(lambda request: "done")).remote()
    assert ref.result(30) == "done" and not ref.cancel()
    assert client.future(ref.id).result(30) == "done"


def test_a_future_made_of_an_id_cancels_the_request_too(client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    ref = client.get_handle(deploy(plain(gate, tally))).remote(1)
    wait_until(lambda: "start 1" in tally.lines)
    assert client.future(ref.id).cancel()
    with pytest.raises(serve.Cancelled):
        ref.result(30)
    wait_until(lambda: "heard 1" in tally.lines)


def test_an_awaited_future_takes_its_request_with_it(client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    async def call() -> None:
        ref = await client.get_handle(deploy(plain(gate, tally)), sync=False).remote(1)
        await asyncio.to_thread(wait_until, lambda: "start 1" in tally.lines)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ref

    asyncio.run(call())
    wait_until(lambda: "heard 1" in tally.lines)


def test_a_batch_runs_on_as_long_as_one_of_it_is_wanted(client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    @serve.accept_batch
    async def handler(requests: list[Any]) -> list[str]:
        tally.note(f"start {len(requests)}")
        try:
            await gate.pass_through_async()
        except asyncio.CancelledError:
            tally.note("heard")
            raise
        return ["done"] * len(requests)

    handle = client.get_handle(deploy(handler, max_batch_size=2, batch_wait_timeout=10))
    first, second = handle.remote(), handle.remote()
    wait_until(lambda: "start 2" in tally.lines)
    assert first.cancel()
    time.sleep(0.2)
    gate.open()
    assert second.result(30) == "done" and "heard" not in tally.lines


def test_a_request_is_cancelled_over_http_by_its_id(client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    ref = client.get_handle(deploy(plain(gate, tally))).remote(1)
    wait_until(lambda: "start 1" in tally.lines)
    url = f"{client.http_url()}/-/futures/{ref.id}"
    answer = httpx.delete(url)
    assert answer.status_code == 202 and answer.json()["cancelled"] == "asked", "the proxy does not know what the handle waits for"
    with pytest.raises(serve.Cancelled):
        ref.result(30)
    wait_until(lambda: "heard 1" in tally.lines)
    assert httpx.delete(url).json()["cancelled"]  # it is, whoever asked first


def test_a_request_that_is_done_is_not_cancelled_over_http(client: serve.Client, deploy: Deploy) -> None:
    ref = client.get_handle(deploy(lambda request: "done")).remote()
    assert ref.result(30) == "done"
    assert httpx.delete(f"{client.http_url()}/-/futures/{ref.id}").json() == {"id": ref.id, "cancelled": False}


@pytest.mark.parametrize("name", ["", "x", "0" * 31, "0" * 33, "G" * 32, "../desired"])
def test_what_is_no_id_cannot_be_cancelled(client: serve.Client, name: str) -> None:
    assert httpx.delete(f"{client.http_url()}/-/futures/{name}").status_code in (404, 405)


@HANDLERS
def test_a_running_call_hears_that_its_http_client_has_gone(kind: Any, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    gone = open_request(deploy.at(kind(gate, tally)))
    wait_until(lambda: "start 1" in tally.lines)
    gone.close()
    wait_until(lambda: "heard 1" in tally.lines)


def test_what_waits_for_an_http_client_that_has_gone_never_starts(
    deploy: Deploy, gate: Gate, tally: Tally, all_said: Callable[[int], None]
) -> None:
    url, name = deploy.named(plain(gate, tally))
    kept = open_request(url)
    wait_until(lambda: "start 1" in tally.lines)
    gone = [open_request(url) for _ in range(10)]
    wait_until(lambda: open_requests_of(name, deploy.url) == 1 + len(gone))
    for connection in gone:
        connection.close()
    wait_until(lambda: open_requests_of(name, deploy.url) == 1)
    all_said(len(gone))
    kept.close()
    wait_until(lambda: "heard 1" in tally.lines)
    gate.open()
    assert httpx.post(url, json=2).text == "done"
    assert tally.lines == ["start 1", "heard 1", "start 2"]


def test_a_call_that_outlives_its_time_is_ended(client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    name = deploy(asynchronous(gate, tally), request_timeout_s=2)
    with pytest.raises(serve.RequestTimeout) as late:
        client.get_handle(name).remote(1).result(30)
    assert late.value.phase == "run"
    wait_until(lambda: "heard 1" in tally.lines)


def test_plain_code_can_ask_whether_its_time_is_spent(client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    name = deploy(plain(gate, tally), request_timeout_s=2)
    with pytest.raises(serve.RequestTimeout):
        client.get_handle(name).remote(1).result(30)
    wait_until(lambda: "heard 1" in tally.lines)


def test_nothing_is_cancelled_where_no_request_runs() -> None:
    assert not serve.cancelled()


# Time per request.


def test_a_header_shortens_the_time_of_one_request(deploy: Deploy, gate: Gate, tally: Tally) -> None:
    url = deploy.at(plain(gate, tally))
    answer = httpx.post(url, json=1, headers={"X-Request-Timeout-Seconds": "2"}, timeout=30)
    assert (answer.status_code, "(run)" in answer.json()["detail"]) == (504, True)
    assert answer.elapsed.total_seconds() < 20, "the backend's own time is 60 s"


def test_the_504_of_a_request_that_never_ran_says_queue(deploy: Deploy, gate: Gate, tally: Tally) -> None:
    url = deploy.at(plain(gate, tally))
    running = open_request(url)
    wait_until(lambda: "start 1" in tally.lines)
    answer = httpx.post(url, json=2, headers={"X-Request-Timeout-Seconds": "0.3"}, timeout=20)
    assert (answer.status_code, "(queue)" in answer.json()["detail"]) == (504, True)
    gate.open()
    running.close()
    assert httpx.post(url, json=3, timeout=20).text == "done"
    assert "start 2" not in tally.lines


def test_a_header_cannot_lengthen_the_backends_time(deploy: Deploy, gate: Gate, tally: Tally) -> None:
    url = deploy.at(plain(gate, tally), request_timeout_s=0.3)
    assert httpx.post(url, json=1, headers={"X-Request-Timeout-Seconds": "600"}, timeout=20).status_code == 504


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_header_that_is_no_time_is_refused(deploy: Deploy, value: str) -> None:
    answer = httpx.get(deploy.at(lambda request: "done"), headers={"X-Request-Timeout-Seconds": value})
    assert answer.status_code == 400


def test_a_handle_has_an_option_for_the_time(client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally) -> None:
    handle = client.get_handle(deploy(plain(gate, tally))).options(request_timeout_s=0.3)
    with pytest.raises(serve.RequestTimeout):
        handle.remote(1).result(30)


@pytest.mark.parametrize("value", [0, -1, "soon", float("nan"), float("inf")])
def test_an_option_that_is_no_time_is_refused(client: serve.Client, deploy: Deploy, value: Any) -> None:
    with pytest.raises(ValueError, match="request_timeout_s"):
        client.get_handle(deploy(lambda request: 1)).options(request_timeout_s=value)


def test_a_call_inside_a_handler_has_no_more_time_than_the_handlers_own(
    client: serve.Client, deploy: Deploy, gate: Gate, tally: Tally
) -> None:
    inner = deploy(asynchronous(gate, tally))

    async def outer(request: Any) -> Any:
        handle = serve.get_handle(inner, sync=False)
        return await (await handle.remote("inner"))

    name = deploy(outer, request_timeout_s=3)
    with pytest.raises(serve.RequestTimeout):
        client.get_handle(name).remote(1).result(30)
    wait_until(lambda: "heard inner" in tally.lines)


def open_request(url: str) -> socket.socket:
    """A POST of the number 1 whose answer nobody has read yet."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=20)
    connection.sendall(f"POST {parts.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n1".encode())
    return connection


def test_a_request_that_was_cancelled_while_it_ran_leaves_no_word_of_an_exception_that_nobody_read(
    client: serve.Client, deploy: Deploy, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    def wait(request: Any) -> None:
        gate.pass_through()

    ref = client.get_handle(deploy(wait)).remote()
    wait_until(lambda: gate.came == 1)
    ref.cancel()
    with pytest.raises(serve.Cancelled):
        ref.result(30)
    gate.open()
    gc.collect()
    assert "never retrieved" not in caplog.text
