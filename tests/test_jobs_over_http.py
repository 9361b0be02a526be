"""Jobs over HTTP: any endpoint's request may be one, and whoever has its id finds it, on any proxy."""

import json
import os
import signal
import socket
import subprocess
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.responses import Response, StreamingResponse

import mqserve as serve
from tests.gates import Gate
from tests.instances import CommandLine, Deploy, answers, distributed_only, wait_until
from tests.ports import free_port
from tests.tallies import Tally
from tests.test_events import events_of, read_events

ASYNC = {"Prefer": "respond-async"}


def submitted(url: str, **request: Any) -> str:
    """The id of a job that was accepted."""
    answer = httpx.post(url, headers=ASYNC, **request)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def state_of(proxy: str, id: str, wait_s: float = 0) -> dict[str, Any]:
    answer = httpx.get(f"{proxy}/-/futures/{id}", params={"wait": wait_s} if wait_s else None, timeout=90)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_job_is_accepted_and_its_answer_found_by_its_id_on_any_proxy(deploy: Deploy, proxies: list[str], gate: Gate) -> None:
    def handler(request: Any) -> Any:
        gate.pass_through()
        return {"doubled": request.data["number"] * 2}

    answer = httpx.post(deploy.at(handler), json={"number": 21}, headers=ASYNC)
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
    id = answer.json()["id"]
    wait_until(lambda: state_of(proxies[-1], id)["status"] == "running")
    for proxy in proxies:
        waiting = httpx.get(f"{proxy}{answer.headers['location']}/result")
        assert (waiting.status_code, waiting.json()["status"]) == (202, "running")
    gate.open()
    for proxy in proxies:
        assert state_of(proxy, id, wait_s=30)["status"] == "succeeded"
        assert httpx.get(f"{proxy}{answer.headers['location']}/result").json() == {"doubled": 42}


def test_a_request_without_a_route_of_ours_changes_nothing_for_others(deploy: Deploy) -> None:
    url = deploy.at(lambda request: request.headers.get("prefer", ""))
    assert httpx.get(url).text == ""
    assert httpx.get(url, headers={"Prefer": "return=minimal"}).text == "return=minimal"


def test_who_prefers_to_wait_gets_the_answer_itself_if_it_comes_in_time(deploy: Deploy, url: str, gate: Gate) -> None:
    def handler(request: Any) -> str:
        if request.method == "POST":
            gate.pass_through()
        return "here"

    at = deploy.at(handler)
    answer = httpx.get(at, headers={"Prefer": "wait=30"})
    assert (answer.status_code, answer.text, answer.headers["preference-applied"]) == (200, "here", "wait=30")
    late = httpx.post(at, headers={"Prefer": "wait=1"})
    assert (late.status_code, late.headers["preference-applied"]) == (202, "wait=1")
    gate.open()
    assert state_of(url, late.json()["id"], wait_s=30)["status"] == "succeeded"


def test_a_job_that_fails_says_so_in_its_state_and_its_answer(deploy: Deploy, url: str) -> None:
    def handler(request: Any) -> None:
        raise ValueError("secret words")

    id = submitted(deploy.at(handler))
    state = state_of(url, id, wait_s=30)
    assert (state["status"], state["error"]["type"], "secret" in json.dumps(state)) == ("failed", "ValueError", False)
    assert httpx.get(f"{url}/-/futures/{id}/result").status_code == 500
    again = httpx.post(f"{url}/-/futures/{id}/retry")
    assert (again.status_code, again.json()["retry_of"]) == (202, id)
    assert state_of(url, again.json()["id"], wait_s=30)["status"] == "failed"


def test_progress_and_logs_are_events_and_a_client_goes_on_on_any_proxy(deploy: Deploy, proxies: list[str], gate: Gate) -> None:
    def handler(request: Any) -> str:
        serve.progress(0.25, "first quarter")
        gate.pass_through()
        serve.log("nearly there")
        return "done"

    id = submitted(deploy.at(handler))
    with httpx.stream("GET", f"{proxies[0]}/-/futures/{id}/events") as response:
        events = read_events(response.iter_lines())
        seen = [next(events)]
        while seen[-1].kind != "progress":
            seen.append(next(events))
    assert json.loads(seen[-1].data)["fraction"] == 0.25
    gate.open()
    rest = events_of(httpx.get(f"{proxies[-1]}/-/futures/{id}/events", headers={"Last-Event-ID": seen[-1].id}))
    assert [event.kind for event in rest] == ["log", "state"]
    assert json.loads(rest[-1].data)["status"] == "succeeded"
    assert [event.id for event in [*seen, *rest]] == [f"{id}:{number}" for number in range(1, len(seen) + 3)]
    assert httpx.get(f"{proxies[-1]}/-/futures/{id}/events", headers={"Last-Event-ID": rest[-1].id}).status_code == 204


def test_the_parts_of_an_answer_are_events_as_they_come_and_its_result_has_them_joined(deploy: Deploy, url: str, gate: Gate) -> None:
    def text(request: Any) -> Any:
        yield "caf\u00e9 "
        gate.pass_through()
        yield "noir"

    def rows(request: Any) -> Any:
        yield {"row": 1}
        gate.pass_through()
        yield {"row": 2}

    def response(request: Any) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield "caf\u00e9".encode()[:-1]
            yield "caf\u00e9 ".encode()[-2:]
            await gate.pass_through_async()
            yield b"noir"

        return StreamingResponse(parts(), media_type="text/plain")

    def image(request: Any) -> Any:
        yield b"\x89PNG"
        gate.pass_through()
        yield b"\xff"

    ids = [submitted(deploy.at(handler)) for handler in (text, rows, response, image)]
    for id in ids:
        with httpx.stream("GET", f"{url}/-/futures/{id}/events", timeout=30) as answer:
            assert next(event for event in read_events(answer.iter_lines()) if event.kind == "chunk"), "before the end"
    gate.open()
    for id in ids:
        assert state_of(url, id, wait_s=30)["status"] == "succeeded"
        chunks = [json.loads(event.data) for event in events_of(httpx.get(f"{url}/-/futures/{id}/events")) if event.kind == "chunk"]
        told = b"".join(chunk["text"].encode() if "text" in chunk else b64decode(chunk["base64"]) for chunk in chunks)
        assert len(chunks) > 1 and told == httpx.get(f"{url}/-/futures/{id}/result").content


def test_what_a_middleware_sends_on_in_one_piece_is_no_chunk(deploy: Deploy, url: str) -> None:
    class PassedOn(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await send({"type": "http.response.body"})

    id = submitted(deploy.at(lambda request: PassedOn("whole")))
    assert state_of(url, id, wait_s=30)["status"] == "succeeded"
    assert {event.kind for event in events_of(httpx.get(f"{url}/-/futures/{id}/events"))} == {"state"}
    assert httpx.get(f"{url}/-/futures/{id}/result").text == "whole"


def test_a_running_job_is_cancelled_by_whoever_knows_its_id(deploy: Deploy, proxies: list[str], gate: Gate, tally: Tally) -> None:
    async def handler(request: Any) -> None:
        try:
            await gate.pass_through_async()
        finally:
            tally.note("over")

    id = submitted(deploy.at(handler))
    wait_until(lambda: gate.came)
    assert httpx.delete(f"{proxies[-1]}/-/futures/{id}").json() == {"id": id, "cancelled": True}
    assert state_of(proxies[0], id)["status"] == "cancelled"
    wait_until(lambda: len(tally))
    assert httpx.get(f"{proxies[0]}/-/futures/{id}/result").status_code == 499


def test_curl_submits_a_job_and_asks_for_its_answer(deploy: Deploy, url: str) -> None:
    def curl(*words: str) -> str:
        return subprocess.run(["curl", "-sS", *words], capture_output=True, text=True, check=True, timeout=60).stdout

    head = curl("-i", "-H", "Prefer: respond-async", "-d", '{"a": 1}', "-H", "Content-Type: application/json", deploy.at(lambda r: r.data))
    location = next(line.split(": ", 1)[1].strip() for line in head.splitlines() if line.startswith("location: "))
    assert head.startswith("HTTP/1.1 202")
    assert json.loads(curl(f"{url}{location}/result?wait=30")) == {"a": 1}


def test_links_follow_the_prefix_of_a_server_in_front(deploy: Deploy) -> None:
    """The tests come from 127.0.0.1, which is trusted as it is by uvicorn."""
    answer = httpx.get(deploy.at(lambda request: 1), headers={**ASYNC, "X-Forwarded-Prefix": "/api/"})
    assert answer.headers["location"] == f"/api/-/futures/{answer.json()['id']}"
    odd = httpx.get(str(answer.url), headers={**ASYNC, "X-Forwarded-Prefix": "//evil.example"})
    assert odd.headers["location"].startswith("/-/futures/")


# Sent again with a key.


def test_a_request_that_is_sent_again_with_its_key_runs_once(deploy: Deploy, proxies: list[str], tally: Tally, gate: Gate) -> None:
    def handler(request: Any) -> str:
        tally.note("ran")
        gate.pass_through()
        return "once"

    at = urlsplit(deploy.at(handler))
    wait_until(lambda: all(httpx.get(f"{proxy}/-/routes").json().get(at.path) for proxy in proxies))
    with socket.create_connection((at.hostname, at.port)) as lost:
        lost.sendall(f"GET {at.path} HTTP/1.1\r\nHost: {at.netloc}\r\nIdempotency-Key: order-1\r\n\r\n".encode())
        wait_until(lambda: gate.came)
    gate.open()
    found = [httpx.get(f"{proxy}{at.path}", headers={"Idempotency-Key": "order-1"}) for proxy in proxies for _ in range(2)]
    assert {(answer.text, answer.headers["idempotent-replayed"]) for answer in found} == {("once", "true")}
    assert tally.lines == ["ran"]
    assert httpx.get(f"{proxies[0]}{at.path}?other", headers={"Idempotency-Key": "order-1"}).status_code == 422


# Proxies that die.


@pytest.fixture
def mortal(joining: CommandLine) -> Iterator[tuple[str, Any]]:
    """Another proxy of the module's instance, to be killed: where it listens, and its program."""
    port = free_port()
    program = joining.start("proxy", "--port", str(port))
    wait_until(lambda: answers(f"http://127.0.0.1:{port}/-/readyz"), told=lambda: program.output)
    yield f"http://127.0.0.1:{port}", program


@pytest.mark.row(11)
@distributed_only
def test_a_job_outlives_the_proxy_that_accepted_it(deploy: Deploy, mortal: tuple[str, Any], gate: Gate) -> None:
    def handler(request: Any) -> str:
        gate.pass_through()
        return "kept"

    proxy, program = mortal
    path = urlsplit(deploy.at(handler)).path
    wait_until(lambda: httpx.get(f"{proxy}/-/routes").json().get(path))
    id = submitted(f"{proxy}{path}")
    os.kill(program.pid, signal.SIGKILL)
    gate.open()
    assert state_of(deploy.url, id, wait_s=30)["status"] == "succeeded"
    assert httpx.get(f"{deploy.url}/-/futures/{id}/result").text == "kept"


@pytest.mark.row(11)
@distributed_only
def test_a_request_with_a_key_outlives_its_proxy(deploy: Deploy, mortal: tuple[str, Any], gate: Gate, tally: Tally) -> None:
    def handler(request: Any) -> str:
        tally.note("ran")
        gate.pass_through()
        return "kept"

    proxy, program = mortal
    path = urlsplit(deploy.at(handler)).path
    wait_until(lambda: httpx.get(f"{proxy}/-/routes").json().get(path))
    address = urlsplit(proxy)
    with socket.create_connection((address.hostname, address.port)) as asked:
        asked.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nIdempotency-Key: order-2\r\n\r\n".encode())
        wait_until(lambda: gate.came)
        os.kill(program.pid, signal.SIGKILL)
    gate.open()
    answer = httpx.get(f"{deploy.url}{path}", headers={"Idempotency-Key": "order-2"})
    assert (answer.text, answer.headers["idempotent-replayed"], tally.lines) == ("kept", "true", ["ran"])


@distributed_only
def test_a_proxy_that_is_told_to_end_answers_those_who_wait_at_once(deploy: Deploy, mortal: tuple[str, Any], gate: Gate) -> None:
    def handler(request: Any) -> None:
        gate.pass_through()

    proxy, program = mortal
    id = submitted(deploy.at(handler))
    with httpx.stream("GET", f"{proxy}/-/futures/{id}/events") as response:
        events = response.iter_lines()
        assert next(events) == "retry: 1000"
        os.kill(program.pid, signal.SIGTERM)
        assert "retry: 100" in list(events)
    wait_until(lambda: program.ended)
    assert state_of(deploy.url, id)["status"] == "running"
    gate.open()


def test_a_job_with_a_result_that_the_store_does_not_keep_fails_with_the_mend(deploy: Deploy, url: str) -> None:
    at = deploy.at(lambda request: b"x" * (8 * 2**20 + 1))
    assert len(httpx.get(at).content) == 8 * 2**20 + 1
    state = state_of(url, submitted(at), wait_s=60)
    assert (state["status"], state["error"]["type"]) == ("failed", "mqserve.TooLarge")
    assert "more than 8 MiB" in state["error"]["message"] and "MQSERVE_RESULT_STORE" in state["error"]["message"]
