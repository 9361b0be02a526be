"""Jobs whose clients wait for nothing but the promise: they are sent without ASGI, and answered as they would be through it."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from mqserve.broker.calls.sending import INLINE_BODY_BYTES
from mqserve.broker.jobs import JobState
from mqserve.proxy.plain_edge import PlainEdgeProtocol
from tests.broker.traffic import until
from tests.proxy.job_site import JobSite
from tests.proxy.test_plain_edge import Served, serving

pytestmark = pytest.mark.anyio

GET = b"GET /e/x HTTP/1.1|Host: x|"
PLAIN = {
    "get": (GET + b"Prefer: respond-async|", b"", 202),
    "post": (b"POST /e/x HTTP/1.1|Host: x|Prefer: respond-async|Content-Length: 4|", b"body", 202),
    "http-1.0": (b"GET /e/x HTTP/1.0|Prefer: respond-async|", b"", 202),
    "the-last": (GET + b"Prefer: respond-async|Connection: close|", b"", 202),
    "two-lines": (GET + b"Prefer: handling=lenient|Prefer: return=minimal, Respond-Async|", b"", 202),
    "kept-for": (GET + b"Prefer: respond-async|X-Result-TTL: 3600|X-Priority: low|X-Request-Timeout-Seconds: 60|", b"", 202),
    "forwarded": (GET + b"Prefer: respond-async|X-Forwarded-For: 203.0.113.7|X-Forwarded-Prefix: /api|", b"", 202),
    "bad-ttl": (GET + b"Prefer: respond-async|X-Result-TTL: 0|", b"", 400),
    "callback": (GET + b"Prefer: respond-async|X-Callback-URL: https://example.org/|", b"", 400),
    "full": (GET + b"Prefer: respond-async|", b"", 503),
}
NOT_PLAIN = {
    "not-found": (b"GET /nothing HTTP/1.1|Host: x|Prefer: respond-async|", b"", 404),
    "wait": (GET + b"Prefer: respond-async, wait=0|", b"", 202),
    "not-before": (GET + b"Prefer: respond-async|X-Not-Before: soon|", b"", 400),
    "key": (GET + b"Prefer: respond-async|Idempotency-Key: |", b"", 400),
    "large": (
        b"POST /e/x HTTP/1.1|Host: x|Prefer: respond-async|Content-Length: %d|" % (INLINE_BODY_BYTES + 1),
        bytes(INLINE_BODY_BYTES + 1),
        202,
    ),
}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(PlainEdgeProtocol, JobSite) as served:
        yield served


async def answered(served: Served, parts: list[bytes]) -> bytes:
    """Without what differs from one job to the next."""
    answer = await served.exchanged(parts, None)
    return re.sub(rb"[0-9a-f]{32}|[\d-]+T[\d:.]+Z|retry-after: \d+", b"*", answer)


@pytest.mark.parametrize("kind", [*PLAIN, *NOT_PLAIN])
async def test_a_plain_job_is_answered_as_one_through_asgi(served: Served, kind: str) -> None:
    head, body, status = (PLAIN | NOT_PLAIN)[kind]
    served.site.app.futures.refusal = "the store is nearly full" if kind == "full" else ""
    raw = head.replace(b"|", b"\r\n") + b"\r\n" + body
    found = await answered(served, [raw])
    assert found.startswith(b"HTTP/1.1 %d " % status)
    assert (served.outermost.asgi == 0) is (kind in PLAIN)
    served.outermost.plain = None
    assert await answered(served, [raw]) == found
    assert served.site.sender.held.held == 0


@pytest.mark.parametrize("header", [b"Prefer: respond-async", b"Idempotency-Key: ", b"X-Not-Before: soon"])
async def test_a_head_means_the_same_wherever_it_comes_apart(served: Served, header: bytes) -> None:
    head = b"GET /e/x HTTP/1.1\r\n%b\r\nHost: x\r\n\r\n" % header
    whole = await answered(served, [head])
    for at in range(1, len(head)):
        assert await answered(served, [head[:at], head[at:]]) == whole


@pytest.mark.parametrize("is_whole", [True, False])
async def test_the_request_behind_a_job_is_none(served: Served, is_whole: bool) -> None:
    post = b"POST /e/x HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\nContent-Length: 4\r\n\r\n"
    async with served.wire() as (reader, writer):
        for part in [post + b"body"] if is_whole else [post, b"body"]:
            writer.write(part)
            await asyncio.sleep(0.01)
        assert (await reader.readuntil(b'/events"}')).startswith(b"HTTP/1.1 202 ")
        by_asgi = served.outermost.asgi
        writer.write(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
        assert served.outermost.asgi == by_asgi


async def test_a_job_goes_on_when_its_client_has_gone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    site = served.site
    assert isinstance(site, JobSite)
    records, waiting = site.store.jobs, list[Callable[[], None]]()
    add_then = records.add_then

    def add_later(*arguments: Any) -> None:
        waiting.append(lambda: add_then(*arguments))

    monkeypatch.setattr(records, "add_then", add_later)
    async with served.wire() as (_, writer):
        writer.write(b"GET /e/x HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\n\r\n")
        await until(lambda: waiting)
        writer.transport.abort()
        await until(lambda: not served.connections)
    waiting.pop()()
    await site.sender.settle()
    (future_id,) = [delivery.envelope().id for delivery in site.jobs.held]
    record = await records.read(future_id)
    assert record is not None and record.state is JobState.QUEUED
    assert await site.store.get(site.keys.future(future_id)) is None, "nobody has cancelled it"


async def test_an_error_that_nobody_foresaw_ends_one_job_and_no_other(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    head = b"GET /e/x HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\n\r\n"
    timeouts = dict(served.site.app.routes.timeouts_s)
    served.site.app.routes.timeouts_s.clear()
    broken = await served.exchanged([head], None)
    served.site.app.routes.timeouts_s.update(timeouts)
    assert broken.startswith(b"HTTP/1.1 500 ") and b"connection: close" in broken
    assert "a bug in mqserve" in caplog.text
    assert (await served.exchanged([head], None)).startswith(b"HTTP/1.1 202 ")
