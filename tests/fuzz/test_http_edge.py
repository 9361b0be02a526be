"""The HTTP edge of one embedded instance: any bytes get a well-formed answer or a closed connection, and the next request is served."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mqserve as serve
from tests import socket_apps
from tests.fuzz.material import cases, mutated
from tests.instances import started

SILENCE_S = 0.2  # a server that says nothing for so long waits for more: then it is told that no more comes
AFTERWARDS_S = 0.03  # answers come in one piece
EXAMPLES = settings(max_examples=settings.default.max_examples // 2 if settings.default else 100)
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) [^\r\n]*")
HEADER_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [^\r\n\0]*")

REQUESTS = [
    b"GET /echo?a=1&b=%20 HTTP/1.1\r\nhost: x\r\ncookie: a=b; c\r\naccept: */*\r\n\r\n",
    b'POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 8\r\n\r\n{"a": 1}',
    b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET /item/12/3.5 HTTP/1.1\r\nhost: x\r\nx-serve-call-method: \r\nx-serve-shard-key: me\r\n\r\n",
    b"HEAD /files/a/b%2Fc HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /-/routes HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
    b"GET /echo HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk\r\n\r\n",
]
HANDSHAKE = (
    b"GET /ws/echo HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: chat\r\norigin: http://x\r\n\r\n"
)
FRAMES = (
    b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58\x82\x80\0\0\0\0\x89\x80\0\0\0\0\x88\x82\0\0\0\0\x03\xe8"  # "Hello", b"", a ping, 1000
)


def echo(request: serve.Request) -> dict[str, Any]:
    """Reads all of a request that a handler may read."""
    read = [dict(request.query_params), dict(request.headers), dict(request.cookies), request.path_params, request.client, request.data]
    return {"method": request.method, "read": repr(read)}


@pytest.fixture(scope="module")
def edge_url() -> Iterator[str]:
    with started() as client:
        client.create_backend("echo", echo)
        for number, route in enumerate(["/echo", "/item/{n:int}/{x:float}", "/files/{rest:path}"]):
            client.create_endpoint(f"echo-{number}", backend="echo", route=route, methods=["GET", "POST", "HEAD"])
        client.mount("/ws", socket_apps.app)
        yield client.http_url()


def exchange(url: str, request: bytes, silence_s: float = SILENCE_S) -> bytes:
    """All that the server says to these bytes, until it closes: once it has answered, or is silent, it is told that no more comes."""
    address = urlsplit(url)
    received = b""
    with socket.create_connection((address.hostname, address.port), timeout=silence_s) as connection:
        try:
            connection.sendall(request)
            while part := connection.recv(65536):
                received += part
                if has_whole_answer(received):
                    connection.settimeout(AFTERWARDS_S)
        except TimeoutError:
            connection.settimeout(30)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass
    return received


def has_whole_answer(received: bytes) -> bool:
    """With its body, and more than a 100 Continue."""
    head, separator, rest = received.partition(b"\r\n\r\n")
    while separator and head.startswith(b"HTTP/1.1 1"):
        head, separator, rest = rest.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: ([0-9]+)", head, re.IGNORECASE)
    return bool(separator) and length is not None and len(rest) >= int(length[1])


def statuses(received: bytes, *, bodiless: bool) -> list[int]:
    """Of the answers, which must be well-formed and whole."""
    found: list[int] = []
    while received:
        head, separator, received = received.partition(b"\r\n\r\n")
        assert separator, f"no whole head: {head!r}"
        first, *lines = head.split(b"\r\n")
        status = STATUS_LINE.fullmatch(first)
        assert status and all(HEADER_LINE.fullmatch(line) for line in lines), head
        found.append(int(status[1]))
        headers = dict(line.lower().split(b": ", 1) for line in lines)
        if found[-1] == 101:
            break  # what follows is no HTTP
        if found[-1] < 200:
            continue
        if b"content-length" not in headers:
            assert headers.get(b"connection") == b"close", head
            break
        length = int(headers[b"content-length"])
        if not (bodiless and (not received or received.startswith(b"HTTP/1."))):
            assert len(received) >= length, f"{len(received)} of {length} bytes of the body"
            received = received[length:]
    return found


def check(url: str, request: bytes, caplog: pytest.LogCaptureFixture) -> None:
    answered = statuses(exchange(url, request), bodiless=b"HEAD" in request)
    assert 500 not in answered, f"{request!r} -> {answered}"
    assert httpx.get(f"{url}/echo").status_code == 200
    assert "Exception in" not in caplog.text and "Traceback" not in caplog.text, caplog.text
    caplog.clear()


@pytest.mark.parametrize("request_bytes", cases("http"))
def test_requests_that_did_harm_are_refused_or_served(edge_url: str, request_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
    check(edge_url, request_bytes, caplog)


@pytest.mark.parametrize("request_bytes", REQUESTS, ids=lambda request: request.split(b"\r\n")[0].decode())
def test_the_requests_to_be_mutated_are_served(edge_url: str, request_bytes: bytes) -> None:
    answered = statuses(exchange(edge_url, request_bytes, silence_s=20), bodiless=b"HEAD" in request_bytes)
    assert [status for status in answered if status >= 200] == [200]


@EXAMPLES
@given(requests=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=6), cuts=st.lists(st.integers(1, 800), max_size=6))
def test_good_requests_are_all_served_however_their_bytes_come_apart(edge_url: str, requests: list[bytes], cuts: list[int]) -> None:
    last = b"GET /echo?last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    raw = b"".join([*(request.replace(b"connection: close\r\n", b"") for request in requests), last])
    address = urlsplit(edge_url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin, end in pairwise([0, *sorted({cut for cut in cuts if cut < len(raw)}), len(raw)]):
            connection.sendall(raw[begin:end])
            time.sleep(0.001)  # most pieces come by themselves
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1\.1 ([2-5]..) ", received) == [b"200"] * (len(requests) + 1), received


@EXAMPLES
@given(request=st.sampled_from(REQUESTS).flatmap(mutated) | st.binary(min_size=1, max_size=300))
@example(request=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200))  # the beginning of TLS
@example(request=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
def test_any_bytes_are_answered_or_hung_up_on(edge_url: str, request: bytes, caplog: pytest.LogCaptureFixture) -> None:
    check(edge_url, request, caplog)


@EXAMPLES
@given(handshake=st.just(HANDSHAKE) | mutated(HANDSHAKE), frames=st.just(FRAMES) | mutated(FRAMES))
def test_any_bytes_of_a_websocket_are_answered_or_hung_up_on(
    edge_url: str, handshake: bytes, frames: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    address = urlsplit(edge_url)
    with socket.create_connection((address.hostname, address.port), timeout=SILENCE_S) as connection:
        received = b""
        with suppress(TimeoutError, ConnectionError):
            connection.sendall(handshake)
            received = connection.recv(65536)
            connection.sendall(frames)
            while part := connection.recv(65536):
                received += part
    if received:
        statuses(received, bodiless=b"HEAD" in handshake)
    assert httpx.get(f"{edge_url}/echo").status_code == 200
    assert "Exception in" not in caplog.text and "Traceback" not in caplog.text and "bug in" not in caplog.text, caplog.text
    caplog.clear()


targets = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30) | st.sampled_from(
    [
        "/echo",
        "/item/1/2",
        "/item/" + "9" * 5000 + "/1",
        "/files/" + "%ff%00" * 20,
        "*",
        "http://other/echo",
        "/echo?" + "a=1&" * 500,
        "/%2e%2e/-/x",
    ]
)
values = st.binary(max_size=60).map(lambda raw: raw.translate(None, b"\r\n\0")) | st.sampled_from([b"\xe9" * 255, b"a" * 300, b"text/\xff"])
names = st.sampled_from(
    [
        b"content-type",
        b"x-serve-call-method",
        b"x-serve-shard-key",
        b"cookie",
        b"host",
        b"accept",
        b"expect",
        b"te",
        b"x-forwarded-for",
        b"range",
    ]
)


@EXAMPLES
@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"]),
    target=targets,
    headers=st.lists(st.tuples(names, values), max_size=5),
    body=st.binary(max_size=60),
)
def test_any_well_formed_request_is_answered(
    edge_url: str, method: str, target: str, headers: list[tuple[bytes, bytes]], body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"".join(b"%s: %s\r\n" % header for header in [*headers, (b"content-length", b"%d" % len(body)), (b"connection", b"close")])
    check(edge_url, b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method.encode(), target.encode(), head, body), caplog)
