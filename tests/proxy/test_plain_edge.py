"""Plain requests, which are served without ASGI: each is answered as it would be through ASGI, and ends whatever happens."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import uvicorn

from mqserve.broker.calls.sending import INLINE_BODY_BYTES
from mqserve.broker.results import ErrorInfo, Result
from mqserve.proxy.plain_edge import APART, JOINED_BYTES, PlainEdgeProtocol
from tests.broker.traffic import until
from tests.proxy.test_app import Site

pytestmark = pytest.mark.anyio


class Outermost:
    """What uvicorn calls, as in a proxy; `plain` is None while there are middlewares."""

    def __init__(self, site: Site) -> None:
        self.plain: Any = site.app
        self.apart = APART
        self._app = site.app
        self.asgi = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asgi += 1
        await self._app(scope, receive, send)


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Served:
    """A site behind a socket."""

    def __init__(self, site: Site, outermost: Outermost, server: uvicorn.Server) -> None:
        self.site, self.outermost, self.server = site, outermost, server
        self.connections = server.server_state.connections
        self._port = server.servers[0].sockets[0].getsockname()[1]

    @asynccontextmanager
    async def wire(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            async with asyncio.timeout(30):
                yield reader, writer
        finally:
            writer.close()

    async def exchanged(self, parts: list[bytes], result: Result | None) -> bytes:
        """All that is said to a request that comes in these parts, if a replica answers with that; without the id and the date."""
        async with self.wire() as (reader, writer):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.01)  # most parts come by themselves, and the two ways must answer alike in any case
            if result is not None:
                await self.site.answer(result)
            head = await reader.readuntil(b"\r\n\r\n")
            if b"connection: close" not in head:
                writer.write_eof()
            answer = head + await reader.read()
        self.site.hands.held.clear()
        return re.sub(rb"\r\n(x-request-id|date): [^\r]*|\"request_id\":\"[0-9a-f]*\"", b"", answer)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(PlainEdgeProtocol) as served:
        yield served


@asynccontextmanager
async def serving(protocol: type[PlainEdgeProtocol], kind: type[Site] = Site) -> AsyncIterator[Served]:
    async with kind() as site:
        outermost = Outermost(site)
        config: Any = {"http": protocol, "ws": "none", "lifespan": "off", "log_config": None, "port": 0, "proxy_headers": False}
        server = Server(uvicorn.Config(outermost, timeout_graceful_shutdown=1, **config))
        running = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        yield Served(site, outermost, server)
        server.should_exit = True
        await running


REQUESTS = {
    "get": (b"GET /e/x?a=1 HTTP/1.1|Host: x|", b"", Result(body=b"well")),
    "post": (b"POST /e/x HTTP/1.1|Host: x|Content-Length: 4|", b"body", Result(status=201, body=b"well", headers=((b"X-Mine", b"1"),))),
    "chunked": (b"POST /e/x HTTP/1.1|Host: x|Transfer-Encoding: chunked|", b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n", Result(body=b"well")),
    "head": (b"HEAD /e/x HTTP/1.1|Host: x|", b"", Result(body=b"well")),
    "head-with-length": (b"HEAD /e/x HTTP/1.1|Host: x|", b"", Result(headers=((b"content-length", b"9"),))),
    "no-content": (b"GET /e/x HTTP/1.1|Host: x|", b"", Result(status=204, body=b"none")),
    "not-modified": (b"GET /e/x HTTP/1.1|Host: x|", b"", Result(status=304, headers=((b"etag", b"1"),))),
    "error": (b"GET /e/x HTTP/1.1|Host: x|", b"", Result(status=422, error=ErrorInfo(type="ValueError", message="no"))),
    "error-without-content": (b"GET /e/x HTTP/1.1|Host: x|", b"", Result(status=204, error=ErrorInfo(type="ValueError", message="no"))),
    "http-1.0": (b"GET /e/x HTTP/1.0|", b"", Result(body=b"well")),
    "the-last": (b"GET /e/x HTTP/1.1|Host: x|Connection: close|", b"", Result(body=b"well")),
    "percent": (b"GET /e/%C3%A4 HTTP/1.1|Host: x|", b"", Result(body=b"well")),
    "large": (b"GET /e/x HTTP/1.1|Host: x|", b"", Result(body=b"a" * 2 * JOINED_BYTES)),
    "upgrade": (b"GET /e/x HTTP/1.1|Host: x|Upgrade: h2c|Connection: upgrade|", b"", Result(body=b"well")),
    "not-found": (b"GET /nothing HTTP/1.1|Host: x|", b"", None),
    "not-allowed": (b"DELETE /e/x HTTP/1.1|Host: x|", b"", None),
    "bad-timeout": (b"GET /e/x HTTP/1.1|Host: x|X-Request-Timeout-Seconds: soon|", b"", None),
    "our-path-in-disguise": (b"GET /%2D/healthz HTTP/1.1|Host: x|", b"", None),
}


@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_plain_request_is_answered_as_one_through_asgi(served: Served, kind: str) -> None:
    head, body, result = REQUESTS[kind]
    raw = head.replace(b"|", b"\r\n") + b"\r\n" + body
    plain = await served.exchanged([raw], result)
    as_plain = served.outermost.asgi == 0
    served.outermost.plain = None
    assert await served.exchanged([raw], result) == plain
    assert plain.startswith(b"HTTP/1.1 ") and (as_plain or kind == "our-path-in-disguise")


@pytest.mark.parametrize(
    ("header", "mend"),
    [
        (b"X-Not-Before: soon", b"add Prefer: respond-async"),
        (b"X-Not-Before: 2030-01-31T03:00:00Z", b"add Prefer: respond-async"),
        (b"Idempotency-Key:", b"of 1 to 255 bytes"),
        (b"Idempotency-Key:  ", b"of 1 to 255 bytes"),
    ],
)
async def test_a_header_of_jobs_that_would_do_nothing_is_a_400(served: Served, header: bytes, mend: bytes) -> None:
    answer = await served.exchanged([b"GET /e/x HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % header], None)
    assert answer.startswith(b"HTTP/1.1 400 ") and mend in answer


@pytest.mark.parametrize("kind", ["post", "chunked"])
async def test_a_request_whose_body_comes_later_is_answered_as_one_that_comes_whole(served: Served, kind: str) -> None:
    head, body, result = REQUESTS[kind]
    head = head.replace(b"|", b"\r\n") + b"\r\n"
    whole = await served.exchanged([head + body], result)
    for at in range(len(body)):
        assert await served.exchanged([head + body[:at], body[at:]], result) == whole


async def test_the_envelope_of_a_plain_request_says_what_the_request_said(served: Served) -> None:
    lines = b"POST /e/%78?q=1 HTTP/1.1|Host: me|Content-Type: text/plain|X-Serve-Call-Method: tell|X-Forwarded-For: 203.0.113.7|"
    async with served.wire() as (_, writer):
        writer.write((lines + b"X-Forwarded-Proto: https|Content-Length: 2||ab").replace(b"|", b"\r\n"))
        envelope = await served.site.taken()
    meta = envelope.header.meta
    assert served.outermost.asgi == 0
    assert (envelope.body, envelope.content_type, meta.call, meta.query) == (b"ab", "text/plain", "tell", b"q=1")
    assert (meta.method, meta.path, meta.raw_path, meta.http_version) == ("POST", "/e/x", b"/e/%78", "1.1")
    assert (meta.scheme, meta.client, dict(meta.headers)[b"host"]) == ("https", ("203.0.113.7", 0), b"me")


async def test_requests_behind_a_plain_one_wait_for_its_answer(served: Served) -> None:
    async with served.wire() as (reader, writer):
        writer.write(b"GET /e/first HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await served.site.answer(Result(body=b"first"))
        answers = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"404"]
    assert answers.index(b"first") < answers.index(b" 404 ")


async def test_one_connection_serves_plain_requests_one_after_the_other(served: Served) -> None:
    async with served.wire() as (reader, writer):
        for number in range(3):
            writer.write(b"GET /e/x HTTP/1.1\r\nHost: x\r\n\r\n")
            await served.site.answer(Result(body=b"%d" % number))
            assert (await reader.readuntil(b"\r\n\r\n%d" % number)).startswith(b"HTTP/1.1 200 ")
            served.site.hands.held.clear()
    assert served.outermost.asgi == 0


async def test_a_client_that_goes_is_noticed_at_once_and_its_request_cancelled(served: Served) -> None:
    async with served.wire() as (_, writer):
        writer.write(b"GET /e/x HTTP/1.1\r\nHost: x\r\n\r\n")
        envelope = await served.site.taken()
        writer.transport.abort()
        await until(lambda: not served.site.sender.pending)
    await served.site.sender.settle()
    recorded = await served.site.store.get(served.site.keys.future(envelope.id))
    assert recorded is not None and Result.from_bytes(recorded).status == 499


async def test_a_request_that_is_waiting_when_its_proxy_stops_reading_results_is_told(served: Served) -> None:
    async with served.wire() as (reader, writer):
        writer.write(b"GET /e/x HTTP/1.1\r\nHost: x\r\n\r\n")
        await served.site.taken()
        served.site.stop_reading()
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ") and b"connection: close" in answer and b"retry-after: " in answer


async def test_an_error_that_nobody_foresaw_ends_one_request_and_no_other(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    timeouts = dict(served.site.app.routes.timeouts_s)
    served.site.app.routes.timeouts_s.clear()
    broken = await served.exchanged([b"GET /e/x HTTP/1.1\r\nHost: x\r\n\r\n"], None)
    served.site.app.routes.timeouts_s.update(timeouts)
    assert broken.startswith(b"HTTP/1.1 500 ") and b"connection: close" in broken
    assert "a bug in mqserve" in caplog.text
    assert (await served.exchanged([b"GET /e/x HTTP/1.1\r\nHost: x\r\n\r\n"], Result(body=b"well"))).endswith(b"well")


async def test_what_waits_for_an_answer_holds_no_body(served: Served) -> None:
    for size in (1000, INLINE_BODY_BYTES + 1):
        async with served.wire() as (_, writer):
            writer.write(b"POST /e/x HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            await served.site.taken()
            assert served.site.sender.held.held == 0
            (call,) = served.site.sender.pending._waiting.values()
            assert call.envelope is None
        await until(lambda: not served.site.sender.pending)
        served.site.hands.held.clear()


class Impatient(PlainEdgeProtocol):
    body_timeout_s = 0.3


@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"], ids=["of-many", "the-last"])
async def test_a_client_that_does_not_take_its_answer_is_given_up(last: bytes) -> None:
    async with serving(Impatient) as served, served.wire() as (_, writer):
        writer.write(b"GET /e/x HTTP/1.1\r\nHost: x\r\n" + last + b"\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await served.site.answer(Result(body=bytes(2**25)))
        await until(lambda: not served.connections)
