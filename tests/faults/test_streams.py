"""Streamed answers while processes die and end: a client can tell, and one of server-sent events goes on."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import mqserve as serve
from tests.faults.members import Members
from tests.instances import CommandLine, Deploy, Program, answers, distributed_only, wait_until
from tests.ports import free_port
from tests.servers import PrivateRedis
from tests.tallies import Tally
from tests.test_events import EVENTS, Event, read_events

pytestmark = distributed_only

TOTAL = 1000
TIMEOUT_S = 1.5
SOON_S = 5.0


class Proxy:
    """A proxy of the instance, started by hand."""

    def __init__(self, shell: CommandLine, path: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.program: Program = shell.start("proxy", "--port", str(port))
        wait_until(lambda: answers(f"{self.url}/-/readyz"), told=lambda: self.program.output)
        wait_until(lambda: path in httpx.get(f"{self.url}/-/routes").json())


def numbered(tally: Tally, pause_s: float = 0.005) -> Callable[[Any], Iterator[str]]:
    def handler(request: Any) -> Iterator[str]:
        tally.note("began")
        for number in range(1, TOTAL + 1):
            yield str(number)
            time.sleep(pause_s)

    return handler


def follow(urls: list[str], path: str, on_event: Callable[[int], None]) -> list[Event]:
    """All events, by as many connections as it takes, to one URL after the other."""
    got: list[Event] = []
    deadline = time.monotonic() + 120
    while (not got or got[-1].kind not in ("end", "failure")) and time.monotonic() < deadline:
        headers = {**EVENTS, "Last-Event-ID": got[-1].id} if got else EVENTS
        try:
            with httpx.stream("GET", urls[0] + path, headers=headers) as response:
                assert response.status_code in (200, 503), response.read()
                for event in read_events(response.iter_lines()):
                    got.append(event)
                    on_event(len(got))
        except httpx.TransportError:
            pass
        urls = [*urls[1:], urls[0]]
    return got


def numbers(events: list[Event]) -> list[str]:
    return [event.data for event in events if event.kind == "message"]


@pytest.mark.row(30)
def test_a_replica_that_is_killed_leaves_no_answer_that_looks_whole(deploy: Deploy, members: Members, tally: Tally) -> None:
    url, name = deploy.named(numbered(tally))
    [pid] = members.pids("replica", name)
    with httpx.stream("GET", url) as response, pytest.raises(httpx.RemoteProtocolError):
        for number, _ in enumerate(response.iter_raw()):
            if number == 5:
                os.kill(pid, signal.SIGKILL)
    assert tally.lines == ["began"]


@pytest.mark.row(30)
def test_a_replica_that_is_killed_ends_its_events_with_a_failure(deploy: Deploy, members: Members, tally: Tally) -> None:
    url, name = deploy.named(numbered(tally))
    [pid] = members.pids("replica", name)
    events = follow([deploy.url], url.removeprefix(deploy.url), lambda count: os.kill(pid, signal.SIGKILL) if count == 5 else None)
    shown = numbers(events)
    assert shown == [*map(str, range(1, len(shown) + 1))] and len(shown) < TOTAL
    assert events[-1].kind == "failure" and "502" in events[-1].data
    assert tally.lines == ["began"]


@pytest.mark.row(30)
def test_with_replay_the_answer_is_whole_though_its_replica_is_killed(deploy: Deploy, members: Members, tally: Tally) -> None:
    url, name = deploy.named(numbered(tally, 0.001), on_death="replay")
    [pid] = members.pids("replica", name)
    events = follow([deploy.url], url.removeprefix(deploy.url), lambda count: os.kill(pid, signal.SIGKILL) if count == 100 else None)
    assert numbers(events) == [*map(str, range(1, TOTAL + 1))]
    assert events[-1].kind == "end" and tally.lines == ["began", "began"]


@pytest.mark.row(30)
def test_a_replica_that_is_killed_after_request_timeout_s_ends_its_answers_soon(deploy: Deploy, members: Members, tally: Tally) -> None:
    url, name = deploy.named(numbered(tally), request_timeout_s=TIMEOUT_S, max_concurrent_queries=2, sync_threads=2)
    [pid] = members.pids("replica", name)
    stream = serve.get_handle(name).stream()
    assert next(stream) == "1"
    with httpx.stream("GET", url) as response, pytest.raises(httpx.RemoteProtocolError):
        began, killed_at = time.monotonic(), 0.0
        for _ in response.iter_raw():
            if not killed_at and time.monotonic() > began + 1.5 * TIMEOUT_S:
                killed_at = time.monotonic()
                os.kill(pid, signal.SIGKILL)
    assert killed_at and time.monotonic() < killed_at + SOON_S
    with pytest.raises(serve.ReplicaLost):
        list(stream)
    assert time.monotonic() < killed_at + 10 + SOON_S  # a handle hears nothing of its replica, and asks for it
    assert tally.lines == ["began", "began"]


@pytest.mark.row(30)
def test_with_replay_the_answer_is_whole_though_its_replica_is_killed_after_request_timeout_s(
    deploy: Deploy, members: Members, tally: Tally
) -> None:
    url, name = deploy.named(numbered(tally, 0.004), on_death="replay", request_timeout_s=TIMEOUT_S)
    [pid] = members.pids("replica", name)
    began = time.monotonic()
    killed: list[int] = []

    def kill(count: int) -> None:
        if not killed and time.monotonic() > began + 1.5 * TIMEOUT_S:
            killed.append(count)
            os.kill(pid, signal.SIGKILL)

    events = follow([deploy.url], url.removeprefix(deploy.url), kill)
    assert killed and numbers(events) == [*map(str, range(1, TOTAL + 1))]
    assert events[-1].kind == "end" and tally.lines == ["began", "began"]


@pytest.mark.row(31)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_events_go_on_by_another_proxy_when_theirs_ends(deploy: Deploy, joining: CommandLine, tally: Tally, end: signal.Signals) -> None:
    path = deploy.at(numbered(tally)).removeprefix(deploy.url)
    first, second = Proxy(joining, path), Proxy(joining, path)
    events = follow([first.url, second.url], path, lambda count: first.program.signal(end) if count == 100 else None)
    assert numbers(events) == [*map(str, range(1, TOTAL + 1))]
    assert events[-1].kind == "end" and tally.lines == ["began"]


@pytest.mark.row(31)
@pytest.mark.parametrize("kindly", [True, False])
def test_events_are_complete_though_the_store_is_restarted(
    deploy: Deploy, store_server: PrivateRedis, tally: Tally, *, kindly: bool
) -> None:
    path = deploy.at(numbered(tally)).removeprefix(deploy.url)
    restarted: list[int] = []

    def restart(count: int) -> None:
        if count >= 200 and not restarted:
            restarted.append(count)
            store_server.restart(kindly=kindly)

    events = follow([deploy.url], path, restart)
    assert numbers(events) == [*map(str, range(1, TOTAL + 1))]
    assert events[-1].kind == "end" and tally.lines == ["began"]
