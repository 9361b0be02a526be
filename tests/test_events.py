"""Server-sent events: a client that was cut off goes on with its stream, on any proxy, and nothing runs twice."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.gates import Gate
from tests.instances import Deploy, wait_until
from tests.tallies import Tally

EVENTS = {"Accept": "text/event-stream"}


class Event(NamedTuple):
    id: str
    kind: str
    data: str


def read_events(lines: Iterator[str]) -> Iterator[Event]:
    """As a browser reads them."""
    kind, data, last_id = "", list[str](), ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield Event(last_id, kind or "message", "\n".join(data))
            kind, data = "", []
        elif name == "id":
            last_id = value
        elif name == "event":
            kind = value
        elif name == "data":
            data.append(value)


def events_of(answer: httpx.Response) -> list[Event]:
    return list(read_events(iter(answer.text.splitlines())))


def count(request: Any) -> Iterator[dict[str, int]]:
    for number in range(3):
        yield {"number": number}


def large(request: Any) -> Iterator[str]:
    yield "x" * 3_000_000


def empty_first(request: Any) -> Iterator[str]:
    yield from ("", "", "three")


def test_an_empty_first_item_is_an_event_like_any_other(deploy: Deploy) -> None:
    answer = httpx.get(deploy.at(empty_first), headers=EVENTS)
    id = answer.headers["x-request-id"]
    assert [event.data for event in events_of(answer)] == ["", "", "three", "{}"]
    rest = httpx.get(str(answer.url), headers={"Last-Event-ID": f"{id}:0"})
    for text in (answer.text, rest.text):
        numbers = [line.rpartition(":")[2] for line in text.splitlines() if line.startswith("id:")]
        assert numbers == ["0", "1", "2", "3"] and text.endswith("event: end\ndata: {}\n\n")


ENDS = """
import threading
import time

import httpx
import mqserve as serve


def count(request):
    for number in range(20):
        yield number
        time.sleep(0.05)


client = serve.start(http_options={"port": 0})
serve.create_backend("count", count)
serve.create_endpoint("count", backend="count", route="/count")
with httpx.stream("GET", client.http_url() + "/count", headers={"Accept": "text/event-stream"}) as answer:
    lines = answer.iter_lines()
    next(lines)
    ending = threading.Thread(target=serve.shutdown)
    ending.start()
    rest = list(lines)
ending.join()
assert "retry: 100" not in rest and "data: 19" in rest and "event: end" in rest, rest
"""


def test_a_stream_runs_to_its_end_when_its_instance_ends(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    env = dict(os.environ)
    if form == "distributed":
        env |= request.getfixturevalue("environment") | {"MQSERVE_NAMESPACE": f"ends-{os.getpid()}"}
    told = subprocess.run([sys.executable, "ends.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr


def test_an_event_may_be_larger_than_all_that_is_made_ahead_of_its_reader(deploy: Deploy) -> None:
    answer = httpx.get(deploy.at(large), headers=EVENTS, timeout=10)
    assert [(event.kind, len(event.data)) for event in events_of(answer)] == [("message", 3_000_000), ("end", 2)]


def test_items_are_events_with_ids_and_an_end(deploy: Deploy) -> None:
    answer = httpx.get(deploy.at(count), headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["cache-control"] == "no-store"
    id = answer.headers["x-request-id"]
    assert answer.text.startswith(f"id: {id}:0\nretry: 1000\n\n")
    assert events_of(answer) == [
        Event(f"{id}:1", "message", '{"number":0}'),
        Event(f"{id}:2", "message", '{"number":1}'),
        Event(f"{id}:3", "message", '{"number":2}'),
        Event(f"{id}:3", "end", "{}"),
    ]


def test_curl_shows_an_event_as_it_is_made(deploy: Deploy, gate: Gate) -> None:
    def handler(request: Any) -> Iterator[str]:
        yield "first"
        gate.pass_through()
        yield "second"

    with subprocess.Popen(["curl", "-sN", "-H", "Accept: text/event-stream", deploy.at(handler)], stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        events = read_events(line.decode().rstrip("\n") for line in curl.stdout)
        assert next(events).data == "first"
        gate.open()
        assert [event.data for event in events] == ["second", "{}"]


def test_a_failure_is_an_event_with_a_problem(deploy: Deploy) -> None:
    def handler(request: Any) -> Iterator[str]:
        yield "first"
        raise ValueError("on purpose")

    answer = httpx.get(deploy.at(handler), headers=EVENTS)
    first, failure = events_of(answer)
    assert (first.data, failure.kind) == ("first", "failure")
    problem = json.loads(failure.data)
    assert problem["status"] == 500 and problem["request_id"] == answer.headers["x-request-id"]
    assert httpx.get(str(answer.url), headers={"Last-Event-ID": failure.id}).status_code == 204
    assert [event.kind for event in events_of(httpx.get(str(answer.url), headers={"Last-Event-ID": first.id}))] == ["failure"]


def numbered(total: int, tally: Tally) -> Callable[[Any], Iterator[str]]:
    def handler(request: Any) -> Iterator[str]:
        tally.note("began")
        for number in range(1, total + 1):
            yield str(number)
            time.sleep(0.001)

    return handler


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_events_are_complete_however_often_the_connection_is_cut(deploy: Deploy, proxies: list[str], tally: Tally, method: str) -> None:
    path = deploy.at(numbered(1000, tally)).removeprefix(deploy.url)
    for proxy in proxies:
        wait_until(lambda proxy=proxy: httpx.get(f"{proxy}/-/routes").json().get(path))  # type: ignore[misc]
    got: list[str] = []
    last_id, cuts = "", sorted(random.sample(range(1, 1000), 10))
    while not got or got[-1] != "{}":
        url = random.choice(proxies) + path
        headers = {**EVENTS, "Last-Event-ID": last_id} if last_id else EVENTS
        with httpx.stream(method, url, headers=headers) as response:
            assert response.status_code == 200, response.read()
            for event in read_events(response.iter_lines()):
                got.append(event.data)
                last_id = event.id
                if cuts and len(got) >= cuts[0]:
                    cuts.pop(0)
                    break
    assert got == [*map(str, range(1, 1001)), "{}"]
    assert tally.lines == ["began"]


def test_nothing_is_left_behind_the_last_event(deploy: Deploy, proxies: list[str]) -> None:
    answer = httpx.get(deploy.at(count), headers=EVENTS)
    last = events_of(answer)[-1].id
    for proxy in proxies:
        path = answer.url.path
        wait_until(lambda proxy=proxy, path=path: httpx.get(f"{proxy}/-/routes").json().get(path))  # type: ignore[misc]
        assert httpx.get(proxy + path, headers={"Last-Event-ID": last}).status_code == 204


def test_an_id_that_is_unknown_or_of_another_route_is_not_found(deploy: Deploy) -> None:
    first, second = deploy.at(count), deploy.at(count)
    id = httpx.get(first, headers=EVENTS).headers["x-request-id"]
    assert httpx.get(first, headers={"Last-Event-ID": f"{id}:1"}).status_code == 200
    assert httpx.get(second, headers={"Last-Event-ID": f"{id}:1"}).status_code == 404
    assert httpx.get(first, headers={"Last-Event-ID": f"{'0' * 32}:1"}).status_code == 404


def test_an_id_of_another_form_is_the_handlers(deploy: Deploy) -> None:
    url = deploy.at(lambda request: request.headers["last-event-id"])
    assert httpx.get(url, headers={"Last-Event-ID": "42"}).text == "42"


def test_events_are_found_by_the_id_of_the_request_alone(deploy: Deploy, proxies: list[str]) -> None:
    streamed = httpx.get(deploy.at(count), headers=EVENTS)
    id = streamed.headers["x-request-id"]
    for proxy in proxies:
        assert events_of(httpx.get(f"{proxy}/-/futures/{id}/events")) == events_of(streamed)
        rest = httpx.get(f"{proxy}/-/futures/{id}/events", headers={"Last-Event-ID": f"{id}:2"})
        assert [event.kind for event in events_of(rest)] == ["message", "end"]
    for unknown in ("0" * 32, "what"):
        assert httpx.get(f"{proxies[0]}/-/futures/{unknown}/events").status_code == 404


def test_an_answer_that_nobody_can_come_back_for_is_not_found_by_its_id(deploy: Deploy, url: str) -> None:
    id = httpx.get(deploy.at(count)).headers["x-request-id"]
    assert httpx.get(f"{url}/-/futures/{id}/events").status_code == 404


def test_events_that_are_not_kept_any_more_are_a_gap(deploy: Deploy) -> None:
    def handler(request: Any) -> Iterator[str]:
        for number in range(1, 201):
            yield str(number)

    answer = httpx.get(deploy.at(handler, stream_kept_frames=100), headers=EVENTS)
    assert len(events_of(answer)) == 201
    id = answer.headers["x-request-id"]
    gap, *rest = events_of(httpx.get(str(answer.url), headers={"Last-Event-ID": f"{id}:5"}))
    assert gap.kind == "gap" and gap.id == f"{id}:5"
    first = json.loads(gap.data)["first"]
    assert 6 < first < 200 and [event.data for event in rest] == [*map(str, range(first, 201)), "{}"]


def test_two_clients_read_one_stream(deploy: Deploy, proxies: list[str], gate: Gate, tally: Tally) -> None:
    def handler(request: Any) -> Iterator[str]:
        tally.note("began")
        yield "1"
        gate.pass_through()
        for number in range(2, 6):
            yield str(number)

    with httpx.stream("GET", deploy.at(handler), headers=EVENTS) as one:
        events = read_events(one.iter_lines())
        assert next(events).data == "1"
        id = one.headers["x-request-id"]
        with httpx.stream("GET", f"{proxies[-1]}/-/futures/{id}/events") as other:
            also = read_events(other.iter_lines())
            assert next(also).data == "1"
            gate.open()
            assert [event.data for event in also] == ["2", "3", "4", "5", "{}"]
        assert [event.data for event in events] == ["2", "3", "4", "5", "{}"]
    assert tally.lines == ["began"]


def test_a_client_that_comes_back_in_time_finds_its_stream_where_it_left_it(deploy: Deploy, proxies: list[str], tally: Tally) -> None:
    def handler(request: Any) -> Iterator[str]:
        try:
            for number in range(1, 3000):
                yield str(number)
                time.sleep(0.0005)
        finally:
            tally.note("over")

    with httpx.stream("GET", deploy.at(handler), headers=EVENTS) as response:
        first = next(read_events(response.iter_lines()))
    time.sleep(1)
    assert not len(tally)
    id = first.id.partition(":")[0]
    rest = httpx.get(f"{proxies[-1]}/-/futures/{id}/events", headers={"Last-Event-ID": first.id})
    assert [event.data for event in events_of(rest)] == [*map(str, range(2, 3000)), "{}"]
    assert tally.lines == ["over"]


def test_a_stream_that_nobody_comes_back_for_is_cancelled(deploy: Deploy, tally: Tally) -> None:
    def handler(request: Any) -> Iterator[str]:
        try:
            while True:
                yield "on and on"
                time.sleep(0.01)
        finally:
            tally.note("over")

    with httpx.stream("GET", deploy.at(handler, resume_grace_s=0.5), headers=EVENTS) as response:
        next(read_events(response.iter_lines()))
    wait_until(lambda: tally.lines == ["over"], 20)


@pytest.mark.parametrize("form", ["embedded"], indirect=True)
def test_a_silent_stream_sends_comments_and_no_blocks_without_data(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients take such a block for an event."""
    monkeypatch.setattr("mqserve.proxy.events.SILENCE_S", 0.1)
    monkeypatch.setattr("mqserve.proxy.events._LOOK_EVERY_S", 0.05)
    gate = Gate(tmp_path)

    def waits(request: Any) -> Iterator[int]:
        yield 1
        gate.pass_through()
        yield 2

    blocks: list[list[str]] = [[]]
    with httpx.stream("GET", deploy.at(waits), headers=EVENTS) as answer:
        for line in answer.iter_lines():
            blocks[-1].append(line)
            if not line:
                blocks.append([])
            elif line == ":":
                gate.open()
    opening, *rest, nothing = blocks
    assert opening[1].startswith("retry:") and not nothing
    assert all(any(line.startswith("data:") for line in block) for block in rest), rest
    assert any(line == ":" for block in rest for line in block)
