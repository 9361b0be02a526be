"""The proxy as an ASGI app, without a socket: what an HTTP request puts on the queue, and what it is answered."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, MutableMapping
from functools import partial
from typing import Any, NamedTuple

import pytest

from mqserve.broker.calls.cancellations import Cancellations, notice_of_request
from mqserve.broker.calls.idempotency import IdempotencyKeys
from mqserve.broker.calls.job_sending import JobSender
from mqserve.broker.calls.sending import MAX_BODY_BYTES, RequestSender
from mqserve.broker.envelope import MAX_HEAD_BYTES, Envelope, mint_id
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.results import Result, entry_of
from mqserve.broker.store import Record
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.signing import Signer
from mqserve.controller.state.documents import Backend, Desired, Endpoint, Observed
from mqserve.proxy.app import ProxyApp
from mqserve.proxy.readiness import DOWN_AFTER_MS
from mqserve.proxy.routes import RouteTable
from tests.broker.traffic import Hands, until

pytestmark = pytest.mark.anyio

TOKEN = "the token of the operator"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        return str(json.loads(self.body)["detail"])


class Site:
    """A proxy on an embedded queue and store, with endpoint `e` at `/e/{key}` (GET, POST) on backend `b`. Nothing runs what it sends:
    `hands` hold it. Use as a context manager."""

    def __init__(self, **settings: Any) -> None:
        self.queue, self.store, self.keys = EmbeddedQueue(), EmbeddedStore("tests"), StoreKeys("tests")
        self.hands = Hands()
        self.is_ready = True
        self.sender = RequestSender(self.queue, self.store, self.keys, "test")
        self.desired = Desired(
            backends={name: Backend(name, "c0de", "f", settings) for name in ("b", "copy")},
            endpoints={"e": Endpoint("e", "/e/{key}", ("GET", "POST"), {"b": 1.0}, {"copy": 1.0})},
        )
        routes = RouteTable(self.desired, Observed())
        self.heard = Cancellations(self.store, self.keys, lambda names: None)
        jobs = JobSender(self.queue, self.store, self.keys, self.sender.held, Signer((), "tests"))
        readiness = lambda: (self.is_ready, {"why": "told"})  # noqa: E731
        keys = IdempotencyKeys(self.store, self.keys)
        self.app = ProxyApp(self.sender, jobs, keys, routes, readiness, is_cancelled=self.heard.has, admin_token=TOKEN)

    async def __aenter__(self) -> "Site":
        for backend in ("b", "copy"):
            await self.queue.declare(backend, 1, None)
        await self.queue.consume("b", 1, 10, self.hands)
        self._tasks = [asyncio.create_task(work) for work in (self.sender.run(), self.app.departures.watch_forever())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop_reading(self) -> None:
        """As a proxy does that ends before its requests are answered."""
        self._tasks[0].cancel()

    def down_since(self, ms: int) -> None:
        self.app.routes = RouteTable(self.desired, Observed(down_since={"b": ms}))

    async def ask(
        self,
        path: str,
        method: str = "GET",
        body: Iterable[bytes] = (b"",),
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        is_whole: bool = True,
        gone: asyncio.Event | None = None,
        **scope: Any,
    ) -> Answer:
        """What the app answers to a client that goes away when `gone` is set, and not by itself."""
        parts = list(body)
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts) or not is_whole}
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        whole = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": list(headers),
            "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), **scope,
        }  # fmt: skip
        async with asyncio.timeout(20):
            await self.app(whole, receive, send)
        start, content = sent
        return Answer(start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, content["body"])

    async def taken(self) -> Envelope:
        """The only request that is on the queue of `b`."""
        await self.hands.hold(1)
        return self.hands.held[0].envelope()

    async def answer(self, result: Result) -> None:
        """As a replica does."""
        envelope = await self.taken()
        raw = result.to_bytes()
        record = Record(self.keys.future(envelope.id), raw, envelope.header.inbox, entry_of(envelope.id, raw), self.store.now_ms() + 10_000)
        await self.store.record(record)
        self.hands.ack_all()

    async def exchanged(self, result: Result, path: str = "/e/x", **request: Any) -> tuple[Envelope, Answer]:
        """A request, and what it is answered where the replica's result is this."""
        asked = asyncio.create_task(self.ask(path, **request))
        envelope = await self.taken()
        await self.answer(result)
        return envelope, await asked


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as site:
        yield site


async def test_the_envelope_says_what_the_request_said_and_the_answer_what_the_result_says(site: Site) -> None:
    headers = [(b"content-type", b"text/plain"), (b"x-mine", b"1"), (b"x-serve-call-method", b"tell")]
    result = Result(status=201, headers=((b"x-answer", b"2"),), body=b"well")
    envelope, answer = await site.exchanged(result, "/e/x", method="POST", body=[b"a", b"b"], headers=headers, query_string=b"q=1")
    meta = envelope.header.meta
    assert (envelope.body, envelope.content_type, envelope.header.origin) == (b"ab", "text/plain", "http")
    assert (meta.method, meta.path, meta.query, meta.route, meta.endpoint, meta.call) == ("POST", "/e/x", b"q=1", "/e/{key}", "e", "tell")
    assert meta.headers == tuple(headers)
    assert (answer.status, answer.body, answer.headers["x-answer"]) == (201, b"well", "2")
    assert (answer.headers["content-length"], answer.headers["x-request-id"]) == ("4", envelope.id)


async def test_a_head_request_is_answered_with_the_length_and_without_the_body(site: Site) -> None:
    _, answer = await site.exchanged(Result(body=b"well"), method="HEAD")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "4", b"")


async def test_a_shadow_gets_a_copy_with_an_id_of_its_own(site: Site) -> None:
    copies = Hands()
    await site.queue.consume("copy", 1, 10, copies)
    envelope, _ = await site.exchanged(Result(), method="POST", body=[b"same"])
    await copies.hold(1)
    copy = copies.held[0].envelope()
    assert (copy.body, copy.header.shadow) == (b"same", True)
    assert copy.id != envelope.id


@pytest.mark.parametrize(
    ("header", "limit_s"), [((), 30.0), ((b"0.2",), 0.2), ((b"90",), 30.0), ((b"90", b"0.2"), 0.2)], ids=["none", "less", "more", "both"]
)
async def test_the_deadline_is_the_backends_or_an_earlier_one_of_the_clients(header: tuple[bytes, ...], limit_s: float) -> None:
    async with Site(request_timeout_s=30.0) as site:
        before = site.store.now_ms()
        envelope, _ = await site.exchanged(Result(), headers=[(b"x-request-timeout-seconds", value) for value in header])
        assert envelope.header.deadline is not None
        assert before + limit_s * 1000 <= envelope.header.deadline <= site.store.now_ms() + limit_s * 1000


async def test_a_request_nobody_answers_is_a_504_in_time(site: Site) -> None:
    answer = await site.ask("/e/x", headers=[(b"x-request-timeout-seconds", b"0.2")])
    assert answer.status == 504


@pytest.mark.parametrize("seconds", [b"soon", b"0", b"-1", b"nan", b"inf"])
async def test_a_bad_number_of_seconds_is_a_400_and_nothing_is_sent(site: Site, seconds: bytes) -> None:
    answer = await site.ask("/e/x", headers=[(b"x-request-timeout-seconds", seconds)])
    assert (answer.status, "number of seconds above 0" in answer.detail) == (400, True)
    assert len(site.hands) == 0


async def test_a_path_without_an_endpoint_is_a_404_and_another_method_a_405(site: Site) -> None:
    assert (await site.ask("/nothing")).status == 404
    answer = await site.ask("/e/x", method="DELETE")
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) >= {"GET", "POST"}


async def test_a_head_that_fits_no_amqp_frame_is_a_431_and_nothing_is_sent(site: Site) -> None:
    answer = await site.ask("/e/x", headers=[(b"x-large", b"x" * MAX_HEAD_BYTES)])
    assert (answer.status, len(site.hands)) == (431, 0)


async def test_a_body_above_the_limit_is_a_413_and_none_of_it_stays_held(site: Site) -> None:
    chunk = b"x" * (MAX_BODY_BYTES // 4)
    answer = await site.ask("/e/x", method="POST", body=[chunk] * 5)
    assert (answer.status, len(site.hands), site.sender.held.held) == (413, 0, 0)


async def test_a_client_that_goes_amid_its_body_sends_nothing(site: Site) -> None:
    gone = asyncio.Event()
    gone.set()
    answer = await site.ask("/e/x", method="POST", body=[b"part"], is_whole=False, gone=gone)
    assert (answer.status, len(site.hands), site.sender.held.held) == (499, 0, 0)


async def test_a_client_that_goes_while_it_waits_has_its_request_cancelled(site: Site) -> None:
    gone = asyncio.Event()
    asked = asyncio.create_task(site.ask("/e/x", gone=gone))
    envelope = await site.taken()
    gone.set()
    assert (await asked).status == 499
    recorded = await site.store.get(site.keys.future(envelope.id))
    assert recorded is not None and Result.from_bytes(recorded).status == 499


async def test_a_backend_that_has_been_down_for_a_while_is_a_503_at_once_and_one_that_restarts_is_waited_for(site: Site) -> None:
    site.down_since(site.store.now_ms() - DOWN_AFTER_MS - 1000)
    answer = await site.ask("/e/x")
    assert (answer.status, len(site.hands)) == (503, 0)
    site.down_since(site.store.now_ms())
    _, answer = await site.exchanged(Result(body=b"back"))
    assert answer.body == b"back"


async def test_what_a_middleware_left_on_the_request_travels_where_it_is_plain_data(site: Site) -> None:
    nested: list[Any] = []
    nested.append(nested)
    envelope, _ = await site.exchanged(Result(), state={"user": "ada", "connection": object(), "nested": nested})
    assert envelope.header.meta.state == {"user": "ada"}
    assert envelope.header.meta.lost_state == {"connection": "object", "nested": "list"}


async def test_readiness_says_why_and_health_does_not_depend_on_it(site: Site) -> None:
    site.is_ready = False
    ready, healthy = await site.ask("/-/readyz"), await site.ask("/-/healthz")
    assert (ready.status, json.loads(ready.body)) == (503, {"ready": False, "why": "told"})
    assert healthy.status == 200


async def test_a_path_of_ours_that_is_written_otherwise_is_not_served(site: Site) -> None:
    assert (await site.ask("/-/healthz", raw_path=b"/%2D/healthz")).status == 404


async def test_who_knows_the_id_of_a_request_that_waits_here_may_cancel_it(site: Site) -> None:
    asked = asyncio.create_task(site.ask("/e/x"))
    envelope = await site.taken()
    answer = await site.ask(f"/-/futures/{envelope.id}", method="DELETE")
    assert json.loads(answer.body) == {"id": envelope.id, "cancelled": True}
    assert (await asked).status == 499


async def test_a_request_that_is_cancelled_again_and_again_is_in_the_log_once(site: Site) -> None:
    token = [(b"authorization", f"Bearer {TOKEN}".encode())]
    logged: list[bytes] = []
    listening = [asyncio.create_task(work) for work in (site.heard.listen(), site.store.read_log(site.keys.cancelled, logged.extend))]
    first, last = mint_id(), mint_id()
    for future_id in (first, first, last):
        answer = await site.ask(f"/-/futures/{future_id}", method="DELETE", headers=token)
        assert answer.status == 202 and json.loads(answer.body)["cancelled"] == "asked"
        await until(partial(site.heard.has, future_id))
    await until(lambda: len(logged) >= 2)
    assert logged == [notice_of_request(first), notice_of_request(last)]
    for task in listening:
        task.cancel()


async def test_an_id_that_is_none_is_a_404_and_one_of_another_process_is_the_operators(site: Site) -> None:
    far = ("192.0.2.1", 1)
    assert (await site.ask("/-/futures/nonsense", method="DELETE", client=far)).status == 404
    path = f"/-/futures/{mint_id()}"
    assert (await site.ask(path, method="DELETE", client=far)).status == 403
    answer = await site.ask(path, method="DELETE", client=far, headers=[(b"authorization", f"Bearer {TOKEN}".encode())])
    assert answer.status == 202 and "Nothing is known here" in json.loads(answer.body)["detail"]


async def test_what_is_counted_goes_with_its_endpoint(site: Site) -> None:
    await site.exchanged(Result())
    token = [(b"authorization", f"Bearer {TOKEN}".encode())]
    assert b'route="/e/{key}"' in (await site.ask("/-/metrics", headers=token)).body
    site.app.forget_deleted(Desired())
    await until(lambda: not site.sender.pending)
    assert b"/e/{key}" not in (await site.ask("/-/metrics", headers=token)).body


async def test_a_connection_that_is_no_http_is_left_alone(site: Site) -> None:
    async def nothing(*_: object) -> Any:
        raise AssertionError("neither asked nor told")

    await site.app({"type": "lifespan"}, nothing, nothing)
