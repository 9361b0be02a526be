"""Clients that close their side behind the request, as `nc -N` does, are answered; those that have gone altogether are told from them."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

import mqserve as serve
from mqserve.proxy.half_close import BEGINNING
from tests.bare_http import Answer, assert_refused, serving, wire
from tests.gates import Gate
from tests.instances import Deploy, wait_until
from tests.tallies import Tally

GET = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n"


def path_of(url: str) -> bytes:
    return httpx.URL(url).raw_path


def assert_served(answer: Answer | None, body: bytes, connection: str) -> None:
    assert answer is not None, "closed without an answer"
    assert (answer.status, answer.body, answer.header("connection")) == (200, body, connection)


@pytest.mark.row(22)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_that_sends_no_more_is_answered(deploy: Deploy, version: bytes) -> None:
    at = deploy.at(lambda request: request.data)
    with wire(at) as connection:
        connection.send(b"POST %b HTTP/%b\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" % (path_of(at), version))
        connection.send_no_more()
        (answer,) = connection.answers()
    assert_served(answer, b"abc", "close")


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_that_waits_for_long_gets_the_answer_whole(deploy: Deploy, gate: Gate, version: bytes) -> None:
    def wait(request: Any) -> str:
        gate.pass_through()
        return "done"

    at = deploy.at(wait)
    with wire(at) as connection:
        connection.send(b"GET %b HTTP/%b\r\nHost: x\r\n\r\n" % (path_of(at), version))
        connection.send_no_more()
        assert connection.peek() == BEGINNING[:1], "a write tells the proxy whether anybody is there"
        assert gate.came == 1
        gate.open()
        (answer,) = connection.answers()
    assert_served(answer, b"done", "close")


@pytest.mark.row(22)
def test_a_client_that_goes_after_it_has_closed_its_side_is_noticed(deploy: Deploy, tally: Tally) -> None:
    def wait(request: Any) -> str:
        tally.note("started")
        while not serve.cancelled():
            time.sleep(0.005)
        tally.note("cancelled")
        return "nobody reads this"

    at = deploy.at(wait)
    with wire(at) as connection:
        connection.send(GET % path_of(at))
        connection.send_no_more()
        connection.peek()
    wait_until(lambda: tally.lines == ["started", "cancelled"], told=lambda: tally)


def test_pipelined_requests_are_all_answered_and_the_last_answer_says_so(deploy: Deploy) -> None:
    at = deploy.at(lambda request: request.query_params["n"])
    with wire(at) as connection:
        connection.send(b"".join(GET % b"%b?n=%d" % (path_of(at), number) for number in range(5)))
        connection.send_no_more()
        *before, last = connection.answers()
    assert [answer.body for answer in before] == [b"0", b"1", b"2", b"3"]
    assert_served(last, b"4", "close")


def test_each_pipelined_request_may_take_its_time(deploy: Deploy, gate: Gate, tmp_path: Path) -> None:
    second = Gate(tmp_path)

    def wait(request: Any) -> str:
        (second if request.query_params["n"] == "1" else gate).pass_through()
        return "done"

    at = deploy.at(wait)
    with wire(at) as connection:
        connection.send(b"".join(GET % b"%b?n=%d" % (path_of(at), number) for number in range(3)))
        connection.send_no_more()
        gate.open()
        assert_served(connection.answer(), b"done", "")
        assert connection.peek() == BEGINNING[:1]
        second.open()
        assert [answer.body for answer in connection.answers()] == [b"done", b"done"]


UNFINISHED = {
    "body": b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc",
    "body-not-begun": b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
    "body-asked-for": b"POST %b HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    "chunks": b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "trailers": b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n",
    "head": b"GET %b HTTP/1.1\r\nHost: x\r\n",
    "request-line": b"GET %b HTT",
}


@pytest.mark.parametrize("kind", UNFINISHED)
def test_a_request_that_will_never_be_whole_is_refused_and_not_run(deploy: Deploy, tally: Tally, kind: str) -> None:
    at = deploy.at(lambda request: tally.note("run"))
    with wire(at) as connection:
        connection.send(UNFINISHED[kind] % path_of(at))
        connection.send_no_more()
        answers = [answer for answer in connection.answers() if answer.status != 100]
    assert len(answers) == 1
    assert_refused(answers[0], 400)
    assert len(tally) == 0


@pytest.mark.parametrize("kind", UNFINISHED)
def test_a_request_that_will_never_be_whole_does_not_take_the_answer_of_the_one_before(deploy: Deploy, kind: str) -> None:
    at = deploy.at(lambda request: "served")
    with wire(at) as connection:
        connection.send(GET % path_of(at) + UNFINISHED[kind] % path_of(at))
        connection.send_no_more()
        served, refused = [answer for answer in connection.answers() if answer.status != 100]
    assert_served(served, b"served", "")
    assert_refused(refused, 400)


@pytest.mark.parametrize("begun", [b"", b"\r\n"])
def test_a_client_that_has_not_begun_a_request_is_let_go_without_a_word(url: str, begun: bytes) -> None:
    with wire(url) as connection:
        connection.send(begun)
        connection.send_no_more()
        assert connection.answers() == []


def test_a_connection_that_is_kept_alive_ends_with_its_client(deploy: Deploy) -> None:
    at = deploy.at(lambda request: "served")
    with wire(at) as connection:
        connection.send(GET % path_of(at))
        assert_served(connection.answer(), b"served", "")
        connection.send_no_more()
        assert connection.answers() == []


# The edge alone.


def test_who_was_answered_before_the_body_was_in_may_leave_it_at_that() -> None:
    with serving() as edge, wire(edge.url) as connection:
        connection.send(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
        assert_served(connection.answer(), b"", "")
        connection.send_no_more()
        assert connection.answers() == []


def test_a_refusal_waits_for_the_answer_before_it_also_if_that_takes_its_time() -> None:
    with serving() as edge, wire(edge.url) as connection:
        connection.send(GET % b"/held" + b"GET / HTTP/1.1\r\n")
        connection.send_no_more()
        assert connection.peek() == BEGINNING[:1]
        edge.app.may_answer.set()
        served, refused = connection.answers()
    assert_served(served, b"", "")
    assert_refused(refused, 400)


def test_a_large_answer_reaches_a_client_that_sends_no_more() -> None:
    with serving() as edge, wire(edge.url) as connection:
        connection.send(GET % b"/large/%d" % 2**24)
        connection.send_no_more()
        (answer,) = connection.answers()
        assert len(answer.body) == 2**24


def test_a_server_that_ends_answers_who_sends_no_more() -> None:
    with serving() as edge, wire(edge.url) as connection:
        connection.send(GET % b"/held")
        connection.send_no_more()
        connection.peek()
        edge.end()
        edge.app.may_answer.set()
        assert_served(connection.answer(), b"", "close")


def test_every_answer_begins_with_what_is_sent_ahead() -> None:
    assert STATUS_LINE and all(line.startswith(BEGINNING) for line in STATUS_LINE.values())
