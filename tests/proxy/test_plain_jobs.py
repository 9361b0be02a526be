"""Jobs whose clients wait for nothing but the promise: they are sent without ASGI, and answered as they would be through it."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from mqserve.broker.calls import submission
from mqserve.broker.calls.sending import INLINE_BODY_BYTES
from mqserve.broker.errors import BrokerUnavailable
from mqserve.broker.jobs import JobState
from mqserve.proxy.calls import PlainCall, PlainJob
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
    "too-late": (GET + b"Prefer: respond-async|X-Request-Timeout-Seconds: 1e12|", b"", 400),
    "bad-ttl": (GET + b"Prefer: respond-async|X-Result-TTL: 0|", b"", 400),
    "callback": (GET + b"Prefer: respond-async|X-Callback-URL: https://example.org/|", b"", 400),
    "far": (GET + b"Prefer: respond-async|X-Request-Timeout-Seconds: 31536000|", b"", 202),
    "full": (GET + b"Prefer: respond-async|", b"", 503),
}
NOT_PLAIN = {
    "not-found": (b"GET /nothing HTTP/1.1|Host: x|Prefer: respond-async|", b"", 404),
    "wait": (GET + b"Prefer: respond-async, wait=0|", b"", 202),
    "not-before": (GET + b"Prefer: respond-async|X-Not-Before: soon|", b"", 400),
    "key": (GET + b"Prefer: respond-async|Idempotency-Key: |", b"", 400),
}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(PlainEdgeProtocol, JobSite) as served:
        yield served


def job_site(served: Served) -> JobSite:
    assert isinstance(served.site, JobSite)
    return served.site


class NobodyThere:
    """The connection of a client that gets no answer."""

    def answer(self, call: PlainCall, reply: Any) -> None:
        raise AssertionError(f"answered with {reply}")

    stream = answer


@contextmanager
def slow_records(site: JobSite, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """The store takes records of jobs only when the test calls these."""
    taking, add_then = list[Callable[[], None]](), site.store.jobs.add_then
    with monkeypatch.context() as patched:
        patched.setattr(site.store.jobs, "add_then", lambda *arguments: taking.append(partial(add_then, *arguments)))
        yield taking


async def holds_nothing(site: JobSite) -> None:
    assert site.sender.held.held == 0
    async with asyncio.timeout(1):
        await site.app.jobs.settle()


async def answered(served: Served, parts: list[bytes]) -> bytes:
    """Without what differs from one job to the next."""
    answer = await served.exchanged(parts, None)
    return re.sub(rb"[0-9a-f]{32}|[\d-]+T[\d:.]+Z|retry-after: \d+", b"*", answer)


def sent(site: JobSite) -> Any:
    """What is there of the last job, but for its id and the moment."""
    envelope = site.jobs.held.pop().envelope()
    header, job = envelope.header, envelope.header.job
    assert job is not None
    within_s = round((header.deadline - job.created_ms) / 1000) if header.deadline else None
    assert header.meta.client is not None
    meta = replace(header.meta, client=(header.meta.client[0], 0))
    return envelope.body, envelope.content_type, envelope.priority, meta, header.once, job.result_ttl_s, within_s


@pytest.mark.parametrize("kind", [*PLAIN, *NOT_PLAIN])
async def test_a_plain_job_is_sent_and_answered_as_one_through_asgi(served: Served, kind: str) -> None:
    head, body, status = (PLAIN | NOT_PLAIN)[kind]
    site = job_site(served)
    site.app.futures.refusal = "the store is nearly full" if kind == "full" else ""
    raw = head.replace(b"|", b"\r\n") + b"\r\n" + body
    found = await answered(served, [raw])
    assert found.startswith(b"HTTP/1.1 %d " % status)
    assert (served.outermost.asgi == 0) is (kind in PLAIN)
    job = sent(site) if status == 202 else None
    assert job is None or (job[0] == body and (kind != "kept-for" or job[-3:] == (False, 3600, 60)))
    served.outermost.plain = None
    assert await answered(served, [raw]) == found
    assert job is None or sent(site) == job
    await holds_nothing(site)


@pytest.mark.parametrize(
    "header", [b"Prefer: respond-async", b"Idempotency-Key: ", b"X-Not-Before: soon", b"Last-Event-ID: 0123456789abcdef0123456789abcdef:1"]
)
async def test_a_head_means_the_same_wherever_it_comes_apart(served: Served, header: bytes) -> None:
    head = b"GET /e/x HTTP/1.1\r\n%b\r\nHost: x\r\n\r\n" % header
    whole = await answered(served, [head])
    for at in range(1, len(head)):
        assert await answered(served, [head[:at], head[at:]]) == whole


async def test_a_body_that_goes_to_the_store_by_itself_needs_a_task(served: Served) -> None:
    call = PlainJob(NobodyThere(), served.site.app)
    call.method, call.path, call.headers = "POST", "/e/x", [(b"prefer", b"respond-async")]
    assert not call.begin(bytes(INLINE_BODY_BYTES + 1))


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


JOB = b"GET /e/x HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\n\r\n"
LAST = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def test_a_job_is_answered_once_recorded_and_before_what_is_behind_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_records(job_site(served), monkeypatch) as taking:
        async with served.wire() as (reader, writer):
            writer.write(JOB + LAST)
            await until(lambda: taking)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
            taking.pop()()
            assert re.findall(rb"HTTP/1.1 (\d+)", await reader.read()) == [b"202", b"404"]


async def test_a_job_goes_on_when_its_client_has_gone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    site = job_site(served)
    with slow_records(site, monkeypatch) as taking:
        async with served.wire() as (_, writer):
            writer.write(JOB)
            await until(lambda: taking)
            writer.transport.abort()
            await until(lambda: not served.connections)
        settling = asyncio.create_task(site.app.jobs.settle())
        await asyncio.sleep(0.05)
        assert not settling.done(), "a proxy that ends waits for it"
        taking.pop()()
        await settling
    (future_id,) = [delivery.envelope().id for delivery in site.jobs.held]
    record = await site.store.jobs.read(future_id)
    assert record is not None and record.state is JobState.QUEUED
    assert await site.store.get(site.keys.future(future_id)) is None, "nobody has cancelled it"


async def test_a_job_that_the_broker_does_not_take_is_a_503_and_holds_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    site = job_site(served)
    body = b"POST /e/x HTTP/1.1\r\nHost: x\r\nPrefer: respond-async\r\nContent-Length: 4\r\n\r\nbody"
    away: Any = lambda backend, envelope, settled: settled(BrokerUnavailable("away", maybe_sent=False))  # noqa: E731
    monkeypatch.setattr(site.queue, "publish_job", away)
    monkeypatch.setattr(submission, "REPUBLISH_BUDGET_S", 0.2)
    assert (await served.exchanged([body], None)).startswith(b"HTTP/1.1 503 ")
    await holds_nothing(site)


@pytest.mark.parametrize("moment", ["first", "last"])
async def test_an_error_that_nobody_foresaw_ends_one_job_and_no_other(
    served: Served, moment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = job_site(served)
    where = {"first": "mqserve.broker.calls.kept_messages.KeptMessage.of", "last": "mqserve.proxy.app.promise"}[moment]
    post = JOB.replace(b"GET", b"POST").replace(b"Host", b"Content-Length: 4\r\nHost") + b"body"
    with slow_records(site, monkeypatch) as taking:
        monkeypatch.setattr(where, broken)
        async with served.wire() as (reader, writer):
            writer.write(post)
            if moment == "last":
                await until(lambda: taking)
                taking.pop()()
            answer = await reader.read()
        monkeypatch.undo()
    assert answer.startswith(b"HTTP/1.1 500 ") and b"connection: close" in answer
    assert "a bug in mqserve" in caplog.text
    await holds_nothing(site)
    assert (await served.exchanged([JOB], None)).startswith(b"HTTP/1.1 202 ")


def broken(*_: object) -> Any:
    raise ArithmeticError("a bug")
