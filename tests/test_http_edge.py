"""The strict edge of a proxy, asked by bare sockets: what it refuses, what it bounds, what it lets through, and who may ask `/-/…`."""

import asyncio
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import Response

import mqserve as serve
from mqserve.broker.calls.sending import MAX_BODY_BYTES
from mqserve.broker.process.loopback import names_loopback
from mqserve.controller.node_metrics import serve_metrics
from mqserve.proxy.edge import MAX_HEADERS, MAX_PIPELINED, EdgeProtocol
from mqserve.proxy.system_routes import SystemPath, SystemPaths
from tests.bare_http import GIVEN_S, Answer, Edge, ask, assert_refused, serving, wire
from tests.instances import Deploy, distributed_only, wait_until

TOKEN = "the-token-of-the-tests"


@pytest.fixture(scope="module", autouse=True)
def admin_token() -> Iterator[str]:
    """In the environment of whoever starts the module's instance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MQSERVE_ADMIN_TOKEN", TOKEN)
        yield TOKEN


# Framing.

EMPTY_CHUNKED = b"\r\n0\r\n\r\n"
REFUSED = {
    "both-length-and-coding": (400, b"POST / HTTP/1.1|Host: x|Content-Length: 5|Transfer-Encoding: chunked|" + EMPTY_CHUNKED),
    "both-coding-and-length": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked|Content-Length: 5|" + EMPTY_CHUNKED),
    "length-twice": (400, b"POST / HTTP/1.1|Host: x|Content-Length: 1|Content-Length: 1||a"),
    "two-lengths": (400, b"POST / HTTP/1.1|Host: x|Content-Length: 1|Content-Length: 2||ab"),
    "length-list": (400, b"POST / HTTP/1.1|Host: x|Content-Length: 1, 1||a"),
    "length-plus": (400, b"POST / HTTP/1.1|Host: x|Content-Length: +1||a"),
    "length-minus": (400, b"POST / HTTP/1.1|Host: x|Content-Length: -1||a"),
    "length-hex": (400, b"POST / HTTP/1.1|Host: x|Content-Length: 0x1||a"),
    "length-underscore": (400, b"POST / HTTP/1.1|Host: x|Content-Length: 1_0||a"),
    "length-empty": (400, b"POST / HTTP/1.1|Host: x|Content-Length: ||"),
    "length-overflow": (400, b"POST / HTTP/1.1|Host: x|Content-Length: 18446744073709551617||a"),
    "length-many-zeros": (400, b"POST / HTTP/1.1|Host: x|Content-Length: " + b"0" * 5000 + b"1||a"),
    "length-space-colon": (400, b"POST / HTTP/1.1|Host: x|Content-Length : 1||a"),
    "coding-space-colon": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding : chunked|" + EMPTY_CHUNKED),
    "coding-vertical-tab": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: \x0bchunked|" + EMPTY_CHUNKED),
    "coding-identity": (501, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: identity||"),
    "coding-gzip": (501, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: gzip||"),
    "coding-gzip-chunked": (501, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: gzip, chunked|" + EMPTY_CHUNKED),
    "coding-chunked-gzip": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked, gzip|" + EMPTY_CHUNKED),
    "coding-twice": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked|Transfer-Encoding: chunked|" + EMPTY_CHUNKED),
    "coding-xchunked": (501, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: xchunked|" + EMPTY_CHUNKED),
    "coding-empty": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: |" + EMPTY_CHUNKED),
    "coding-in-1.0": (400, b"POST / HTTP/1.0|Host: x|Transfer-Encoding: chunked|" + EMPTY_CHUNKED),
    "fold-space": (400, b"GET / HTTP/1.1|Host: x|X: a| b||"),
    "fold-tab": (400, b"GET / HTTP/1.1|Host: x|X: a|\tb||"),
    "fold-first-line": (400, b"GET / HTTP/1.1| X: a|Host: x||"),
    "bare-lf-everywhere": (400, b"GET / HTTP/1.1\nHost: x\n\n"),
    "bare-lf-request-line": (400, b"GET / HTTP/1.1\nHost: x||"),
    "bare-lf-header": (400, b"GET / HTTP/1.1|Host: x\nX: y||"),
    "bare-lf-end": (400, b"GET / HTTP/1.1|Host: x|\n"),
    "bare-cr-in-value": (400, b"GET / HTTP/1.1|Host: x|X: y\rz||"),
    "nul-in-value": (400, b"GET / HTTP/1.1|Host: x|X: y\x00z||"),
    "control-in-value": (400, b"GET / HTTP/1.1|Host: x|X: y\x01z||"),
    "nul-in-name": (400, b"GET / HTTP/1.1|Host: x|X\x00: y||"),
    "space-in-name": (400, b"GET / HTTP/1.1|Host: x|X Y: y||"),
    "empty-name": (400, b"GET / HTTP/1.1|Host: x|: y||"),
    "no-colon": (400, b"GET / HTTP/1.1|Host: x|XY||"),
    "no-host": (400, b"GET / HTTP/1.1||"),
    "two-hosts": (400, b"GET / HTTP/1.1|Host: x|Host: y||"),
    "same-host-twice": (400, b"GET / HTTP/1.1|Host: x|Host: x||"),
    "host-with-user": (400, b"GET / HTTP/1.1|Host: u@x||"),
    "host-with-path": (400, b"GET / HTTP/1.1|Host: x/y||"),
    "absolute-other-host": (400, b"GET http://other/a HTTP/1.1|Host: x||"),
    "absolute-other-scheme": (400, b"GET ftp://x/a HTTP/1.1|Host: x||"),
    "absolute-user": (400, b"GET http://u@x/a HTTP/1.1|Host: x||"),
    "authority": (400, b"GET x:80 HTTP/1.1|Host: x||"),
    "connect": (501, b"CONNECT x:80 HTTP/1.1|Host: x||"),
    "connect-path": (501, b"CONNECT /a HTTP/1.1|Host: x||"),
    "asterisk": (400, b"GET * HTTP/1.1|Host: x||"),
    "fragment": (400, b"GET /a#b HTTP/1.1|Host: x||"),
    "no-slash": (400, b"GET a HTTP/1.1|Host: x||"),
    "space-in-target": (400, b"GET /a b HTTP/1.1|Host: x||"),
    "control-in-target": (400, b"GET /\x01 HTTP/1.1|Host: x||"),
    "eight-bits-in-target": (400, b"GET /\xff HTTP/1.1|Host: x||"),
    "lower-case-method": (400, b"get / HTTP/1.1|Host: x||"),
    "unknown-method": (400, b"FOO / HTTP/1.1|Host: x||"),
    "http-0.9": (505, b"GET /||"),
    "http-1.2": (505, b"GET / HTTP/1.2|Host: x||"),
    "http-2": (505, b"GET / HTTP/2.0|Host: x||"),
    "http-2-preface": (505, b"PRI * HTTP/2.0||SM||"),
    "http-3": (505, b"GET / HTTP/3.0|Host: x||"),
    "http-11": (400, b"GET / HTTP/11|Host: x||"),
    "rtsp": (505, b"GET / RTSP/1.0||"),
    "rtsp-1.1": (505, b"POST /a RTSP/1.1|Host: x|Content-Length: 1||a"),
    "rtsp-asterisk": (505, b"OPTIONS * RTSP/1.0|CSeq: 1||"),
    "rtsp-method": (505, b"DESCRIBE rtsp://x/a RTSP/1.0|CSeq: 2||"),
    "rtsp-method-of-no-other": (505, b"PUT / RTSP/1.0|Host: x||"),
    "rtsp-that-names-http": (505, b"GET /a RTSP/1.0|X: /b HTTP/1.1||"),
    "ice": (505, b"SOURCE /a ICE/1.0|Host: x||"),
    "sip": (505, b"INVITE sip:a@x SIP/2.0|Via: SIP/2.0/UDP x||"),
    "lower-case-protocol": (505, b"GET / http/1.1|Host: x||"),
    "unknown-protocol": (505, b"GET / FOO-BAR/1.0|Host: x||"),
    "no-protocol": (400, b"GET / |Host: x||"),
    "protocol-without-version": (400, b"GET / FOO|Host: x||"),
    "words-behind-the-protocol": (400, b"GET / HTTP/1.1 x|Host: x||"),
    "tls-hello": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "chunk-bare-lf": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||1\nx\n0\n\n"),
    "chunk-without-end": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||1|x0||"),
    "chunk-0x": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||0x1|x|0||"),
    "chunk-minus": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||-1|x|0||"),
    "chunk-overflow": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||fffffffffffffffff|x|0||"),
    "chunk-space": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||1 |x|0||"),
    "chunk-extension-lf": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||1;a\nb|x|0||"),
    "trailer-with-length": (400, b"POST / HTTP/1.1|Host: x|Transfer-Encoding: chunked||0|Content-Length: 4||"),
    "many-header-lines": (431, b"GET / HTTP/1.1|Host: x|" + b"X: y|" * MAX_HEADERS + b"|"),
    "long-target": (431, b"GET /" + b"a" * 0xFFFF + b" HTTP/1.1|Host: x||"),
    "declared-too-long": (413, b"POST / HTTP/1.1|Host: x|Expect: 100-continue|Content-Length: %d||" % (MAX_BODY_BYTES + 1)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_two_servers_could_read_in_two_ways_is_refused_and_the_connection_closed(url: str, kind: str) -> None:
    status, raw = REFUSED[kind]
    with wire(url) as connection:
        connection.send(raw.replace(b"|", b"\r\n"))
        answers = connection.answers()
    assert len(answers) == 1, answers
    assert_refused(answers[0], status)


def describe(request: serve.Request) -> dict[str, Any]:
    return {"headers": dict(request.headers), "data": request.data.decode(), "path": request.url.path, "client": list(request.client or ())}


@pytest.fixture(scope="module")
def described(client: serve.Client) -> Iterator[str]:
    """The path that tells what came in."""
    deploy = Deploy(client)
    yield httpx.URL(deploy.at(describe)).path
    deploy.undo()


SERVED = {
    "plain": (b"GET PATH HTTP/1.1|Host: x||", ""),
    "http-1.0-without-host": (b"GET PATH HTTP/1.0||", ""),
    "two-spaces": (b"GET  PATH  HTTP/1.1|Host: x||", ""),
    "names-another-protocol": (b"GET PATH HTTP/1.1|Host: x|Via: RTSP/1.0 x|X: GET PATH RTSP/1.0||", ""),
    "empty-lines-first": (b"||GET PATH HTTP/1.1|Host: x||", ""),
    "absolute-same-host": (b"GET http://X:80PATH HTTP/1.1|Host: x:80||", ""),
    "length": (b"POST PATH HTTP/1.1|Host: x|Content-Length:  3 ||abc", "abc"),
    "chunks": (b"POST PATH HTTP/1.1|Host: x|Transfer-Encoding: Chunked||1|a|2;x=y|bc|0||", "abc"),
    "trailers": (b"POST PATH HTTP/1.1|Host: x|Transfer-Encoding: chunked||3|abc|0|X-Late: a|Host: b||", "abc"),
    "offered-h2c": (b"GET PATH HTTP/1.1|Host: x|Connection: Upgrade, HTTP2-Settings|Upgrade: h2c|HTTP2-Settings: AAMA||", ""),
    "offered-h2c-with-a-body": (b"POST PATH HTTP/1.1|Host: x|Connection: Upgrade|Upgrade: h2c|Content-Length: 3||abc", "abc"),
    "offered-h2c-with-chunks": (
        b"POST PATH HTTP/1.1|Host: x|Connection: Upgrade|Upgrade: h2c|Transfer-Encoding: chunked||3|abc|0||",
        "abc",
    ),
}


@pytest.mark.parametrize("kind", SERVED)
def test_what_can_be_read_in_one_way_is_served(url: str, described: str, kind: str) -> None:
    raw, data = SERVED[kind]
    seen = ask(url, raw.replace(b"|", b"\r\n").replace(b"PATH", described.encode())).json()
    assert seen["data"] == data
    assert not {"x-late", "upgrade", "connection", "transfer-encoding", "http2-settings"} & set(seen["headers"])


@pytest.mark.parametrize("kind", ["rtsp", "rtsp-asterisk", "ice", "http-3"])
def test_another_protocol_is_refused_however_its_bytes_come_apart(url: str, kind: str) -> None:
    status, raw = REFUSED[kind]
    with wire(url) as connection:
        for byte in raw.replace(b"|", b"\r\n"):
            connection.send(bytes((byte,)))
        assert_refused(connection.answer(), status)


def test_another_protocol_behind_a_request_of_ours_is_refused(url: str, described: str) -> None:
    with wire(url) as connection:
        connection.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\nGET / RTSP/1.0\r\n\r\n" % described.encode())
        served, refused = connection.answers()
    assert served.status == 200
    assert_refused(refused, 505)


@pytest.mark.parametrize("kind", SERVED)
def test_a_request_is_the_same_however_its_bytes_come_apart(url: str, described: str, kind: str) -> None:
    raw, data = SERVED[kind]
    with wire(url) as connection:
        for byte in raw.replace(b"|", b"\r\n").replace(b"PATH", described.encode()):
            connection.send(bytes((byte,)))
        answer = connection.answer()
    assert answer is not None and answer.json()["data"] == data


def test_pipelined_requests_are_answered_in_their_order(url: str, described: str) -> None:
    one = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n%d"
    with wire(url) as connection:
        connection.send(b"".join(one % (described.encode(), number) for number in range(5)))
        seen = [connection.answer() for _ in range(5)]
    assert [answer.json()["data"] for answer in seen if answer] == ["0", "1", "2", "3", "4"]


def test_a_bad_request_behind_a_good_one_does_not_take_its_answer(url: str, described: str) -> None:
    with wire(url) as connection:
        connection.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost : y\r\n\r\n" % described.encode())
        served, refused = connection.answers()
    assert served.json()["path"] == described
    assert_refused(refused, 400)


@pytest.mark.parametrize("kind", [kind for kind in SERVED if kind.startswith("offered")])
def test_what_follows_an_offered_upgrade_in_the_same_piece_is_served(url: str, described: str, kind: str) -> None:
    raw, data = SERVED[kind]
    others = b"".join(SERVED[other][0].replace(b"PATH", b"PATH?%d" % number) for number, other in enumerate(["plain", "chunks"]))
    with wire(url) as connection:
        connection.send((raw + others).replace(b"|", b"\r\n").replace(b"PATH", described.encode()))
        seen = [connection.answer() for _ in range(3)]
    assert [answer.json()["data"] for answer in seen if answer] == [data, "", "abc"]


def test_the_body_of_an_offered_upgrade_is_no_request_of_its_own(url: str, described: str) -> None:
    smuggled = b"GET /-/healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n"
    with wire(url) as connection:
        connection.send(head % (described.encode(), len(smuggled)))
        connection.send(smuggled)
        (served,) = connection.answers()
    assert served.json()["data"] == smuggled.decode()


# Headers on their way in.


def test_headers_of_the_connection_and_of_the_instance_do_not_reach_the_handler(url: str, described: str) -> None:
    sent = {
        "connection": "keep-alive, X-Private, Authorization", "proxy-connection": "keep-alive", "te": "trailers", "x-other": "kept",
        "proxy-authorization": "Basic x", "x-private": "1", "x-mqserve-inbox": "theirs", "X-MQServe-A": "0", "authorization": "Bearer y",
        "x-serve-shard-key": "alice", "x-request-timeout-seconds": "20",
    }  # fmt: skip
    seen = httpx.get(url + described, headers=sent).json()["headers"]
    kept = {"authorization": "Bearer y", "x-serve-shard-key": "alice", "x-request-timeout-seconds": "20", "x-other": "kept"}
    assert {name: value for name, value in seen.items() if name in {name.lower() for name in sent}} == kept


def test_a_server_in_front_on_the_same_machine_says_who_the_client_is(url: str, described: str) -> None:
    assert httpx.get(url + described, headers={"x-forwarded-for": "203.0.113.7"}).json()["client"][0] == "203.0.113.7"


# Answers of user code.


ODD_ANSWERS: dict[str, tuple[int, tuple[bytes, bytes]]] = {
    "line-break-in-value": (200, (b"x-odd", b"a\r\nset-cookie: b=1")),
    "line-feed-in-value": (200, (b"x-odd", b"a\nset-cookie: b=1")),
    "carriage-return-in-value": (200, (b"x-odd", b"a\rb")),
    "nul-in-value": (200, (b"x-odd", b"a\0b")),
    "line-break-in-name": (200, (b"x-odd: 1\r\nset-cookie", b"b=1")),
    "colon-in-name": (200, (b"x-odd:", b"1")),
    "space-in-name": (200, (b"x-odd ", b"1")),
    "eight-bits-in-name": (200, (b"x-odd\xe9", b"1")),
    "empty-name": (200, (b"", b"x-odd")),
    "connection": (200, (b"connection", b"x-odd, upgrade")),
    "coding": (200, (b"Transfer-Encoding", b"chunked, x-odd")),
    "length": (200, (b"Content-Length", b"1")),
}


@pytest.fixture(scope="module")
def odd(client: serve.Client) -> Iterator[str]:
    """The URL of a handler that answers with what its query names."""

    def answer(request: serve.Request) -> Response:
        kind = request.query_params.get("kind")
        response = Response(b"the body", status_code=int(request.query_params.get("status", 200)), media_type="text/plain")
        if kind:
            response.raw_headers += [ODD_ANSWERS[kind][1], (b"x-good", "grüße".encode("latin-1"))]
        if content_type := request.query_params.get("type"):
            response.raw_headers = [(b"content-type", content_type.encode("latin-1"))]
        return response

    deploy = Deploy(client)
    yield deploy.at(answer)
    deploy.undo()


def get(url: str) -> Answer:
    """As bare as `ask`: httpx would tidy up."""
    parsed = httpx.URL(url)
    return ask(url, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % parsed.raw_path)


@pytest.mark.parametrize("kind", ODD_ANSWERS)
def test_a_header_that_http_cannot_carry_is_left_out_and_the_answer_kept(odd: str, kind: str) -> None:
    answer = get(f"{odd}?kind={kind}")
    assert (answer.status, answer.body, answer.header("content-length"), answer.header("x-good")) == (200, b"the body", "8", "grüße")
    assert "set-cookie" not in dict(answer.headers) and not any("x-odd" in name + value for name, value in answer.headers)


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("text/x; a=%C3%A9", "text/x; a=é"),
        ("text/x%0D%0Aset-cookie:%20b=1", "application/octet-stream"),
        ("a%00b", "application/octet-stream"),
    ],
    ids=["latin-1", "line-break", "nul"],
)
def test_a_content_type_that_http_cannot_carry_becomes_bytes(odd: str, asked: str, sent: str) -> None:
    answer = get(f"{odd}?type={asked}")
    assert (answer.status, answer.header("content-type"), answer.header("set-cookie"), answer.body) == (200, sent, "", b"the body")


@pytest.mark.parametrize("status", [0, 100, 101, 199, 600, 999])
def test_a_status_that_is_none_for_an_answer_is_a_500(odd: str, status: int) -> None:
    answer = get(f"{odd}?status={status}")
    assert (answer.status, answer.header("content-type")) == (500, "application/problem+json")
    assert str(status) in answer.json()["detail"]


@pytest.mark.parametrize(("status", "length"), [(204, ""), (205, "0"), (304, "")])
def test_an_answer_that_has_no_body_is_sent_without_one(odd: str, status: int, length: str) -> None:
    with wire(odd) as connection:
        for _ in range(2):  # what follows on the same connection is not the body
            connection.send(b"GET %b?status=%d HTTP/1.1\r\nHost: x\r\n\r\n" % (httpx.URL(odd).raw_path, status))
            answer = connection.answer()
            assert answer is not None and (answer.status, answer.header("content-length"), answer.body) == (status, length, b"")


# Bounds of time and memory: the edge alone, since its patience is shorter here.


class Hasty(EdgeProtocol):
    head_timeout_s = 0.3
    body_timeout_s = 0.3
    linger_s = 0.3


@pytest.fixture(scope="module")
def hasty() -> Iterator[Edge]:
    with serving(Hasty) as edge:
        yield edge


@pytest.mark.parametrize("begun", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET"])
def test_a_head_that_does_not_come_to_its_end_is_a_408(hasty: Edge, begun: bytes) -> None:
    with wire(hasty.url) as connection:
        connection.send(begun)
        *served, refused = connection.answers()
    assert len(served) == begun.count(b"\r\n\r\n")
    assert_refused(refused, 408)


def test_a_head_that_trickles_in_does_not_gain_time(hasty: Edge) -> None:
    with wire(hasty.url) as connection:
        began = time.monotonic()
        connection.send(b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError):  # closed under it
            while time.monotonic() - began < GIVEN_S:
                connection.send(b"X: y\r\n")
                time.sleep(0.05)


def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(hasty: Edge) -> None:
    with wire(hasty.url) as connection:
        assert connection.answers() == []


def test_a_connection_that_waits_between_requests_is_not_taken_for_a_slow_head(hasty: Edge) -> None:
    with wire(hasty.url) as connection:
        for _ in range(2):
            connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = connection.answer()
            assert answer is not None and answer.status == 200
            time.sleep(Hasty.head_timeout_s + 0.2)


@pytest.mark.parametrize(
    "begun",
    [
        b"POST /LEFT HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
        b"POST /LEFT HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab",
        b"POST /LEFT HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
        b"POST /LEFT HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Late: a",
    ],
    ids=["nothing", "a-part", "a-chunk", "all-but-the-trailer"],
)
def test_a_body_that_stops_coming_is_a_408_and_the_app_is_told(hasty: Edge, begun: bytes, request: pytest.FixtureRequest) -> None:
    path = f"/{request.node.callspec.id}"
    with wire(hasty.url) as connection:
        connection.send(begun.replace(b"/LEFT", path.encode()))
        (refused,) = connection.answers()
    assert_refused(refused, 408)
    wait_until(lambda: path in hasty.app.left)


class Unhurried(EdgeProtocol):
    body_timeout_s = 6.0


def test_a_body_that_goes_on_coming_has_all_the_time_it_needs() -> None:
    with serving(Unhurried) as edge, wire(edge.url) as connection:
        connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
        for _ in range(3):  # more than its time, altogether
            time.sleep(2.2)
            connection.send(b"a")
        answer = connection.answer()
    assert answer is not None and (answer.status, answer.body) == (200, b"aaa")


def test_a_body_that_nobody_reads_does_not_keep_the_connection(hasty: Edge) -> None:
    with wire(hasty.url) as connection:
        connection.send(b"POST /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = connection.answer()
        assert answer is not None and answer.status == 200
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < GIVEN_S:
                connection.send(b"1\r\na\r\n")
                time.sleep(0.01)


class Flushing(EdgeProtocol):
    body_timeout_s = 3.0


def test_a_client_that_takes_each_answer_in_its_time_gets_all_of_them() -> None:
    with serving(Flushing) as edge, wire(edge.url) as connection:
        for size in (2**24, 2**25):  # what is left of the second is more than what was left of the first
            connection.send(b"GET /large/%d HTTP/1.1\r\nHost: x\r\n\r\n" % size)
            time.sleep(1.8)  # so that the first one's time is over while the second one waits
            answer = connection.answer()
            assert answer is not None and len(answer.body) == size


class GivingUp(EdgeProtocol):
    body_timeout_s = 0.3
    gone = threading.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone.set()


def test_a_client_that_does_not_take_its_answer_is_given_up() -> None:
    with serving(GivingUp) as edge, wire(edge.url) as connection:
        connection.send(b"GET /large/%d HTTP/1.1\r\nHost: x\r\n\r\n" % 2**25)
        assert GivingUp.gone.wait(GIVEN_S)
        answer = connection.answer()
    assert answer is not None and len(answer.body) < 2**25


ENDLESS = {
    "value": (b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"a"),
    "name": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"a"),
    "target": (b"GET /", b"a"),
    "lines": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
    "connection": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"Connection: abcdef\r\n"),
    "ours": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"X-MQServe-A: abcdef\r\n"),
    "empty-lines": (b"", b"\r\n"),
    "trailer-value": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ", b"a"),
    "trailer-lines": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"X: y\r\n"),
    "chunk-extension": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a"),
}


@pytest.fixture(scope="module")
def patient() -> Iterator[Edge]:
    with serving(EdgeProtocol) as edge:
        yield edge


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_is_a_431_and_takes_no_memory(patient: Edge, kind: str) -> None:
    begun, repeated = ENDLESS[kind]
    piece = repeated * (65536 // len(repeated))
    tracemalloc.start()
    try:
        with wire(patient.url) as connection:
            connection.send(begun)
            for _ in range(320):  # 20 MiB
                connection.send(piece)
            (refused,) = connection.answers()
            held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_refused(refused, 431)
    assert held < 4 * 1024 * 1024


def test_heads_that_each_bring_the_last_bytes_of_the_one_before_take_no_memory(patient: Edge) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX: %b\r\n" % (b"a" * 50_000)
    tracemalloc.start()
    try:
        with wire(patient.url) as connection:
            connection.send(head)
            for _ in range(200):  # 10 MB
                connection.send(b"\r\n" + head)
                answer = connection.answer()
                assert answer is not None and answer.status == 200
            held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < 4 * 1024 * 1024


def test_more_pipelined_requests_than_may_wait_are_a_429_after_the_answers_of_the_others(patient: Edge) -> None:
    patient.app.may_answer.clear()
    one = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"
    with wire(patient.url) as connection:
        connection.send(one * (1 + MAX_PIPELINED + 1))
        patient.app.may_answer.set()
        *served, refused = connection.answers()
    assert [answer.status for answer in served] == [200] * (1 + MAX_PIPELINED)
    assert_refused(refused, 429)


def test_requests_that_are_pipelined_without_end_take_no_memory(patient: Edge) -> None:
    piece = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2000
    tracemalloc.start()
    try:
        with wire(patient.url) as connection:
            for _ in range(15):
                connection.send(piece)
            *_, refused = connection.answers()
            held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_refused(refused, 429)
    assert held < 4 * 1024 * 1024


# System paths.


async def _told(scope: Any) -> Any:
    return 200, [], b""


PATHS = SystemPaths({"/-/open": SystemPath(_told, open=True), "/-/closed": SystemPath(_told)}, "secret" * 4)
HERE, THERE = ("127.0.0.1", 5), ("192.0.2.1", 5)
LOCAL, OTHER = (b"host", b"127.0.0.1:8000"), (b"host", b"example.org")
GUARD: dict[str, tuple[int, str, str, tuple[str, int] | None, list[tuple[bytes, bytes]]]] = {
    "from-here": (200, "GET", "/-/closed", HERE, [LOCAL]),
    "from-here-by-name": (200, "HEAD", "/-/closed", HERE, [(b"host", b"LocalHost:8000")]),
    "from-here-by-ipv6": (200, "GET", "/-/closed", ("::1", 5), [(b"host", b"[::1]:8000")]),
    "from-here-mapped": (200, "GET", "/-/closed", ("::ffff:127.0.0.1", 5), [LOCAL]),
    "from-there": (403, "GET", "/-/closed", THERE, [LOCAL]),
    "from-there-open": (200, "GET", "/-/open", THERE, [OTHER]),
    "from-a-unix-socket": (403, "GET", "/-/closed", None, [LOCAL]),
    "rebound-name": (403, "GET", "/-/closed", HERE, [OTHER]),
    "rebound-name-like-ours": (403, "GET", "/-/closed", HERE, [(b"host", b"localhost.example.org")]),
    "rebound-address": (403, "GET", "/-/closed", HERE, [(b"host", b"127.0.0.1.example.org")]),
    "without-host": (403, "GET", "/-/closed", HERE, []),
    "forwarded": (403, "GET", "/-/closed", HERE, [LOCAL, (b"x-forwarded-for", b"127.0.0.1")]),
    "via": (403, "GET", "/-/closed", HERE, [LOCAL, (b"via", b"1.1 front")]),
    "token": (200, "GET", "/-/closed", THERE, [OTHER, (b"authorization", b"Bearer secretsecretsecretsecret")]),
    "token-lower-case-scheme": (200, "GET", "/-/closed", THERE, [OTHER, (b"authorization", b"bearer  secretsecretsecretsecret")]),
    "token-wrong": (403, "GET", "/-/closed", THERE, [OTHER, (b"authorization", b"Bearer secretsecretsecretsecreT")]),
    "token-empty": (403, "GET", "/-/closed", THERE, [OTHER, (b"authorization", b"Bearer ")]),
    "token-eight-bits": (403, "GET", "/-/closed", THERE, [OTHER, (b"authorization", b"Bearer \xff")]),
    "token-other-scheme": (403, "GET", "/-/closed", THERE, [OTHER, (b"authorization", b"Basic secretsecretsecretsecret")]),
    "own-origin": (200, "GET", "/-/closed", HERE, [LOCAL, (b"origin", b"http://127.0.0.1:8000")]),
    "other-origin": (403, "GET", "/-/closed", HERE, [LOCAL, (b"origin", b"https://example.org")]),
    "other-port": (403, "GET", "/-/closed", HERE, [LOCAL, (b"origin", b"http://127.0.0.1:3000")]),
    "null-origin": (403, "GET", "/-/closed", HERE, [LOCAL, (b"origin", b"null")]),
    "null-origin-and-empty-host": (403, "GET", "/-/open", HERE, [(b"host", b""), (b"origin", b"null")]),
    "other-origin-open": (403, "GET", "/-/open", HERE, [LOCAL, (b"origin", b"https://example.org")]),
    "other-origin-post": (403, "POST", "/-/closed", HERE, [LOCAL, (b"origin", b"https://example.org")]),
    "other-origin-delete": (403, "DELETE", "/-/closed", HERE, [LOCAL, (b"origin", b"https://example.org")]),
    "other-origin-options": (403, "OPTIONS", "/-/open", HERE, [LOCAL, (b"origin", b"https://example.org")]),
    "other-origin-with-token": (
        403, "GET", "/-/closed", THERE, [OTHER, (b"origin", b"null"), (b"authorization", b"Bearer secretsecretsecretsecret")],
    ),
    "post": (405, "POST", "/-/closed", HERE, [LOCAL]),
    "delete": (405, "DELETE", "/-/open", HERE, [LOCAL]),
    "options": (405, "OPTIONS", "/-/open", HERE, [LOCAL]),
    "below": (404, "GET", "/-/open/1", HERE, [LOCAL]),
    "unknown": (404, "GET", "/-/unknown", HERE, [LOCAL]),
}  # fmt: skip


@pytest.mark.parametrize("kind", GUARD)
def test_a_system_path_is_answered_to_whom_it_concerns(kind: str) -> None:
    status, method, path, peer, headers = GUARD[kind]
    answer = asyncio.run(PATHS.answer({"method": method, "path": path, "client": peer, "headers": headers}))
    assert isinstance(answer, tuple) and answer[0] == status


def test_without_a_token_set_none_is_right() -> None:
    closed = SystemPaths({"/-/closed": SystemPath(_told)}, "")
    for given in (b"Bearer ", b"Bearer", b"", b"Bearer x"):
        scope = {"method": "GET", "path": "/-/closed", "client": THERE, "headers": [OTHER, (b"authorization", given)]}
        answer = asyncio.run(closed.answer(scope))
        assert isinstance(answer, tuple) and answer[0] == 403


@pytest.mark.parametrize("path", ["/-/routes", "/-/metrics"])
def test_what_a_proxy_reveals_is_for_this_machine_or_the_token(url: str, path: str, admin_token: str) -> None:
    assert httpx.get(url + path).status_code == 200
    refused = httpx.get(url + path, headers={"host": "example.org"})
    assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
    assert "MQSERVE_ADMIN_TOKEN" in refused.json()["detail"] and admin_token not in refused.text
    assert httpx.get(url + path, headers={"host": "example.org", "authorization": f"Bearer {admin_token}"}).status_code == 200
    assert httpx.get(url + path, headers={"host": "example.org", "authorization": "Bearer another"}).status_code == 403


@pytest.mark.parametrize("path", ["/%2D/routes", "/%2d/metrics", "/-%2Froutes", "/-%2Fhealthz"])
def test_a_system_path_that_a_server_in_front_would_not_know_is_none(url: str, path: str) -> None:
    answer = ask(url, b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
    assert (answer.status, answer.header("content-type")) == (404, "application/problem+json")
    assert "for routing table" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/-/healthz", "/-/readyz"])
def test_health_is_told_to_everybody_but_the_pages_of_other_sites(url: str, path: str) -> None:
    assert httpx.get(url + path, headers={"host": "example.org"}).status_code == 200
    assert httpx.get(url + path, headers={"origin": "https://example.org"}).status_code == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_a_system_path_takes_no_other_method(url: str, method: str) -> None:
    refused = httpx.request(method, f"{url}/-/routes")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


@distributed_only
def test_the_admin_token_is_not_in_the_environment_of_user_code(deploy: Deploy, admin_token: str) -> None:
    assert admin_token not in httpx.get(deploy.at(lambda request: str(dict(os.environ)))).text


def test_a_nodes_metrics_on_loopback_are_for_this_machine() -> None:
    with serve_metrics("127.0.0.1", 0) as metrics:
        assert httpx.get(metrics.url).status_code == 200
        assert httpx.get(metrics.url, headers={"host": "example.org"}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3:1", "[::1]", "[::1]:80", "[::ffff:127.0.0.1]:80"])
def test_a_loopback_name_is_one_that_nobody_else_can_own(host: str) -> None:
    assert names_loopback(host)


IMITATIONS = ["[::1].evil", "[::1]evil:80", "[::1", "::1]", "127.0.0.1:80.evil", "localhost:evil", "[127.0.0.1][evil]"]


@pytest.mark.parametrize(
    "host", ["", "example.org", "localhost.", "a.localhost", "0.0.0.0", "[::]", "127.0.0.1.nip.io", "10.0.0.1", *IMITATIONS]
)
def test_any_other_name_is_none(host: str) -> None:
    assert not names_loopback(host)


def test_a_header_that_ends_the_request_is_not_removed_by_naming_it(odd: str) -> None:
    """With an upgrade offered the head is read twice, and both times it must end at the same place."""
    inner = b"GET /-/routes HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: upgrade, content-length\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n"
    with wire(odd) as connection:
        connection.send(head % (httpx.URL(odd).raw_path, len(inner)) + inner)
        connection.send(b"GET %b?status=201 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % httpx.URL(odd).raw_path)
        assert [answer.status for answer in connection.answers()] == [200, 201]
