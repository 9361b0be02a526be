"""Streamed answers over HTTP, by both ways through a proxy: each client gets the chunks as they are made, and can tell a whole answer from
one that was cut."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware

from mqserve.broker.results import ErrorInfo, Outcome, Result
from mqserve.broker.streams import Form, Head
from mqserve.proxy import events
from mqserve.proxy.plain_edge import PlainEdgeProtocol
from mqserve.proxy.streaming import FlowEnd
from tests.broker.flowing import Run
from tests.broker.traffic import until
from tests.proxy.test_plain_edge import Served, serving

pytestmark = pytest.mark.anyio

GET = b"GET /e/x HTTP/1.1\r\nHost: x\r\n\r\n"
GET_1_0 = b"GET /e/x HTTP/1.0\r\n\r\n"
BOO = ErrorInfo("ValueError", "boo")
WAYS = ("plain", "asgi")


@pytest.fixture(params=WAYS)
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    async with serving(PlainEdgeProtocol) as served:
        if request.param == "asgi":
            served.outermost.plain = None
        yield served


class Stream:
    """A request of one client, and the run that answers it."""

    def __init__(self, served: Served, run: Run, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served, self.run, self.reader, self.writer = served, run, reader, writer

    async def answer_of(self, size: int) -> bytes:
        async with asyncio.timeout(20):
            return await self.reader.readexactly(size)

    async def head(self) -> bytes:
        return re.sub(rb"(x-request-id|date): [^\r]*\r\n", b"", await self.reader.readuntil(b"\r\n\r\n"))


@asynccontextmanager
async def streaming(served: Served, request: bytes = GET, **head: Any) -> AsyncIterator[Stream]:
    async with served.wire() as (reader, writer):
        writer.write(request)
        envelope = await served.site.taken()
        site = served.site
        async with Run(site.store, site.keys, envelope.id, envelope.header.inbox, Head(replica="r", **head)) as run:
            yield Stream(served, run, reader, writer)


async def test_chunks_arrive_as_they_are_made(served: Served) -> None:
    async with streaming(served, content_type="text/plain", headers=((b"X-Mine", b"1"),)) as stream:
        await stream.run.show(b"one")
        head = await stream.head()
        assert b"\r\ncontent-type: text/plain\r\nx-mine: 1\r\ntransfer-encoding: chunked\r\n\r\n" in head
        assert await stream.reader.readexactly(8) == b"3\r\none\r\n"
        await stream.run.show(b"three")
        assert await stream.reader.readexactly(10) == b"5\r\nthree\r\n"
        await stream.run.end()
        assert await stream.reader.readexactly(5) == b"0\r\n\r\n"


async def test_what_came_in_one_turn_is_one_piece(served: Served) -> None:
    async with streaming(served) as stream:
        await stream.run.show(b"a", b"b", b"c")
        await stream.head()
        assert await stream.reader.readexactly(8) == b"3\r\nabc\r\n"


async def test_a_length_that_is_known_is_said(served: Served) -> None:
    async with streaming(served, length=6) as stream:
        await stream.run.show(b"abc", b"def")
        assert b"content-length: 6\r\n\r\n" in await stream.head()
        await stream.run.end()
        assert await stream.reader.readexactly(6) == b"abcdef"


async def test_the_connection_serves_the_next_request(served: Served) -> None:
    async with streaming(served) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        stream.writer.write(GET)  # it waits
        await asyncio.sleep(0.05)
        served.site.hands.ack_all()
        await stream.run.end()
        assert await stream.reader.readexactly(13) == b"3\r\nabc\r\n0\r\n\r\n"
        await served.site.answer(Result(body=b"well"))
        assert b"200" in await stream.head() and await stream.reader.readexactly(4) == b"well"


async def test_http_1_0_gets_a_body_that_ends_with_the_connection(served: Served) -> None:
    async with streaming(served, GET_1_0) as stream:
        await stream.run.show(b"abc")
        head = await stream.head()
        assert b"connection: close" in head and b"chunked" not in head and b"content-length" not in head
        await stream.run.show(b"def")
        await stream.run.end()
        assert await stream.reader.read() == b"abcdef"


async def test_a_failed_answer_with_chunks_stays_without_its_last_one(served: Served) -> None:
    async with streaming(served) as stream:
        await stream.run.show(b"abc")
        await stream.run.end(BOO)
        await stream.head()
        assert await stream.reader.read() == b"3\r\nabc\r\n"


async def test_a_failed_answer_of_known_length_stays_short(served: Served) -> None:
    async with streaming(served, length=6) as stream:
        await stream.run.show(b"abc")
        await stream.run.end(BOO)
        await stream.head()
        assert await stream.reader.read() == b"abc"


@pytest.mark.parametrize("chunk", [b"short", b"much too long"])
async def test_an_answer_of_another_length_than_its_head_says_is_cut(served: Served, chunk: bytes) -> None:
    async with streaming(served, length=8) as stream:
        await stream.run.show(b"", chunk)
        await stream.run.end()
        assert len(await stream.reader.read()) < 400
        assert stream.reader.at_eof()


async def test_a_failed_answer_to_http_1_0_ends_in_a_reset(served: Served) -> None:
    async with streaming(served, GET_1_0) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        await stream.run.end(BOO)
        with pytest.raises(ConnectionResetError):
            await stream.reader.read()


async def test_a_failure_before_the_head_is_a_problem(served: Served) -> None:
    async with served.wire() as (reader, writer):
        writer.write(GET)
        await served.site.answer(Result(status=422, error=BOO))
        assert b"HTTP/1.1 422" in await reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize("status", [204, 304])
async def test_a_status_without_a_body_ends_the_answer_at_its_head(served: Served, status: int) -> None:
    async with streaming(served, status=status) as stream:
        await stream.run.show(b"abc")
        head = await stream.head()
        assert b"%d" % status in head and b"chunked" not in head
        stream.writer.write_eof()
        assert await stream.reader.read() == b""


async def test_a_head_request_gets_the_head_only(served: Served) -> None:
    async with streaming(served, GET.replace(b"GET", b"HEAD"), length=9) as stream:
        await stream.run.show(b"abc")
        assert b"content-length: 9" in await stream.head()
        stream.writer.write_eof()
        assert await stream.reader.read() == b""


async def test_a_client_that_leaves_cancels_its_request(served: Served) -> None:
    async with streaming(served) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        stream.writer.close()
        site, key = served.site, served.site.keys.future(stream.run.id)
        async with asyncio.timeout(20):
            while (raw := await site.store.get(key)) is None:
                await asyncio.sleep(0.02)
        assert Result.from_bytes(raw).outcome is Outcome.CANCELLED
        await until(lambda: not site.sender.pending and not site.app._flowing)


async def test_a_client_that_leaves_what_it_can_resume_cancels_nothing(served: Served) -> None:
    async with streaming(served, form=Form.ITEMS, resumable=True) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        stream.writer.close()
        await until(lambda: any(credit.left for credit in stream.run.credits))
        assert await served.site.store.get(served.site.keys.future(stream.run.id)) is None


async def test_a_client_of_http_1_0_that_leaves_its_events_is_noticed() -> None:
    async with serving(PlainEdgeProtocol) as served, streaming(served, GET_1_0, form=Form.ITEMS, resumable=True) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        stream.writer.close()
        await until(lambda: any(credit.left for credit in stream.run.credits))


async def test_a_client_that_closes_its_side_gets_the_whole_answer(served: Served) -> None:
    async with streaming(served) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        stream.writer.write_eof()
        await asyncio.sleep(0.05)
        await stream.run.show(b"def")
        await stream.run.end()
        assert await stream.reader.read() == b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"


async def test_a_client_that_takes_nothing_for_too_long_is_gone() -> None:
    class Impatient(PlainEdgeProtocol):
        body_timeout_s = 0.3

    async with serving(Impatient) as served, streaming(served, length=2**30) as stream:
        for _ in range(300):
            await stream.run.show(b"x" * 64 * 1024)
        await until(lambda: not served.site.sender.pending)
        assert not served.connections


async def test_a_server_that_ends_cuts_what_is_still_running(served: Served) -> None:
    async with streaming(served) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        served.server.should_exit = True  # its time to end is one second
        assert await stream.reader.read() == b"3\r\nabc\r\n"


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Any, call_next: Any) -> Any:
        return await call_next(request)


@pytest.mark.parametrize("middleware", [Passing, GZipMiddleware])
async def test_a_middleware_passes_chunks_on_and_a_failure(middleware: Any) -> None:
    async with serving(PlainEdgeProtocol) as served:
        served.outermost.plain, served.outermost._app = None, middleware(served.site.app)
        async with streaming(served) as stream:
            await stream.run.show(b"abc")
            await stream.head()
            assert await stream.reader.readexactly(8) == b"3\r\nabc\r\n"
            await stream.run.end(BOO)
            assert await stream.reader.read() == b""


async def counted(served: Served) -> dict[str, float]:
    """The streamed answers that the metrics page knows, by how they ended."""
    async with served.wire() as (reader, writer):
        writer.write(b"GET /-/metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        page = (await reader.read()).partition(b"\r\n\r\n")[2].decode()
    families = text_string_to_metric_families(page)
    return {
        sample.labels["outcome"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "mqserve_num_http_streams_total"
    }


async def complete(stream: Stream) -> None:
    await stream.run.end()


async def fail(stream: Stream) -> None:
    await stream.run.end(BOO)


async def leave(stream: Stream) -> None:
    stream.writer.close()


async def cancel(stream: Stream) -> None:
    await stream.served.site.sender.cancel_everywhere(stream.run.id)


async def move(stream: Stream) -> None:
    stream.served.site.app.events.reconnect()


ENDS: dict[str, list[tuple[Callable[[Stream], Awaitable[None]], dict[str, Any]]]] = {
    "complete": [(complete, {}), (complete, {"form": Form.ITEMS, "resumable": True})],
    "failed": [(fail, {}), (fail, {"form": Form.ITEMS, "resumable": True}), (complete, {"length": 9})],
    "cancelled": [(leave, {}), (leave, {"form": Form.ITEMS, "resumable": True}), (cancel, {})],
    "moved": [(move, {"form": Form.ITEMS, "resumable": True})],
}


@pytest.mark.parametrize("outcome", ENDS)
@pytest.mark.parametrize("middleware", [None, Passing])
async def test_each_streamed_answer_is_counted_once_by_how_it_ended(served: Served, outcome: str, middleware: Any) -> None:
    if middleware is not None:
        served.outermost.plain, served.outermost._app = None, middleware(served.site.app)
    for end, head in ENDS[outcome]:
        async with streaming(served, **head) as stream:
            await stream.run.show(b"abc")
            await stream.head()
            await end(stream)
            if end is not leave:
                await stream.reader.read(64)
            served.site.hands.ack_all()
    async with asyncio.timeout(20):
        while sum((counts := await counted(served)).values()) < len(ENDS[outcome]):
            await asyncio.sleep(0.02)
    assert counts == {outcome: len(ENDS[outcome])}


async def test_an_answer_that_a_server_cuts_at_its_end_has_failed(served: Served) -> None:
    async with streaming(served) as stream:
        await stream.run.show(b"abc")
        await stream.head()
        served.server.should_exit = True
        await stream.reader.read()
    await until(lambda: served.site.app._metrics.routes["/e/{key}"].streams == {FlowEnd.FAILED: 1})


async def test_events_have_ids_and_an_end(served: Served) -> None:
    async with streaming(served, form=Form.ITEMS, resumable=True, content_type="text/event-stream") as stream:
        await stream.run.show(b"one\r\ntwo\rthree\n", b"")
        assert b"content-type: text/event-stream" in await stream.head()
        await stream.run.end()
        body = await dechunked(stream.reader)
    id = stream.run.id.encode()
    assert body == (
        b"id: %b:0\nretry: 1000\n\nid: %b:1\ndata: one\ndata: two\ndata: three\ndata: \n\nid: %b:2\ndata: \n\nevent: end\ndata: {}\n\n"
        % (id, id, id)
    )


async def test_a_head_request_goes_on_with_no_stream(served: Served) -> None:
    async with streaming(served, form=Form.ITEMS, resumable=True) as stream:
        await stream.run.show(b"one")
        await stream.head()
        served.site.hands.ack_all()
        async with served.wire() as (reader, writer):
            again = b"Last-Event-ID: %b:0\r\n\r\n" % stream.run.id.encode()
            writer.write(GET.replace(b"GET", b"HEAD").removesuffix(b"\r\n") + again)
            async with asyncio.timeout(20):
                assert (await served.site.taken()).header.meta.method == "HEAD"
                await served.site.answer(Result(body=b"one"))
                assert (await reader.readline()).endswith(b" 200 OK\r\n")
        assert not any(credit.left for credit in stream.run.credits)


async def test_a_silent_stream_of_events_has_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SILENCE_S", 0.05)
    monkeypatch.setattr(events, "_LOOK_EVERY_S", 0.05)
    async with streaming(served, form=Form.ITEMS, resumable=True) as stream:
        await stream.run.show(b"one")
        async with asyncio.timeout(20):
            await stream.reader.readuntil(b"\r\n:\n")
            await stream.reader.readuntil(b"\r\n:\n")


async def test_a_proxy_that_ends_sends_resumable_clients_elsewhere(served: Served) -> None:
    async with streaming(served, form=Form.ITEMS, resumable=True) as stream:
        await stream.run.show(b"one")
        await stream.head()
        served.site.app.events.reconnect()
        body = await dechunked(stream.reader)
        assert body.endswith(b"data: one\n\nretry: 100\n\n")
        await until(lambda: any(credit.left for credit in stream.run.credits))


async def dechunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    return body


async def test_answers_to_a_client_that_has_closed_its_side_come_one_after_the_other(served: Served) -> None:
    async with streaming(served, GET + GET) as stream:
        stream.writer.write_eof()
        await stream.run.show(b"abc")
        await asyncio.sleep(0.6)  # for bytes ahead of the next part
        served.site.hands.ack_all()
        await stream.run.end()
        await asyncio.sleep(0.3)  # for bytes ahead of the next answer
        await served.site.answer(Result(body=b"well"))
        answers = await stream.reader.read()
    first, _, second = answers.partition(b"HTTP/1.1 200 OK\r\n")[2].partition(b"HTTP/1.1 200 OK\r\n")
    assert re.search(rb"\r\n\r\n3\r\nabc\r\n0*0\r\n\r\n$", first) and second.endswith(b"\r\n\r\nwell")
