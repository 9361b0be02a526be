"""A request and its result, over both forms, with a replica of a few lines."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from mqserve.broker.calls.call import Ticket
from mqserve.broker.calls.cancellations import CANCELLED
from mqserve.broker.calls.sending import INLINE_BODY_BYTES, RequestSender
from mqserve.broker.envelope import Envelope, Header, RequestHead, mint_id
from mqserve.broker.errors import BrokerUnavailable, MQServeError, NotRouted, Overloaded, StoreUnavailable, TooLarge
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.overload import MIN_RETRY_S
from mqserve.broker.queue import Delivery, Queue, Settled
from mqserve.broker.results import INLINE_BYTES, Result, entry_of
from mqserve.broker.store import Record, Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import Hands, accepted, until

pytestmark = pytest.mark.anyio


async def test_a_request_is_answered(sender: RequestSender, replica: "EchoReplica") -> None:
    ticket = send(sender, b"hello")
    result = await answer(ticket)
    assert (result.status, result.body) == (200, b"hello")
    assert len(sender.pending) == 0


async def test_many_requests_get_each_its_own_answer(sender: RequestSender, replica: "EchoReplica") -> None:
    bodies = [b"%d" % number for number in range(300)]
    results = await asyncio.gather(*(answer(send(sender, body)) for body in bodies))
    assert [result.body for result in results] == bodies
    assert len(sender.pending) == 0


async def test_the_result_of_a_request_that_was_never_sent_is_not_waited_for(sender: RequestSender, queue: Queue) -> None:
    await queue.declare("another", 1, None)
    ticket = send(sender)
    with pytest.raises(NotRouted):
        await ticket.future
    with pytest.raises(NotRouted):
        await sender.pending.result(ticket.id, 30)


async def test_a_large_result_is_read_by_its_key(sender: RequestSender, replica: "EchoReplica") -> None:
    body = b"x" * (INLINE_BYTES + 1)
    assert (await answer(send(sender, body))).body == body


async def test_a_body_of_2_mib_travels_by_reference(sender: RequestSender, queue: Queue, store: Store) -> None:
    body = b"x" * (2 * 1024 * 1024)
    hands = await consumed(queue)
    ticket = send(sender, body)
    await hands.hold(1)
    envelope = hands.held[0].envelope()
    assert envelope.body == b""
    assert envelope.header.origin == "http"
    assert await store.get(envelope.header.ref) == body
    hands.ack_all()
    ticket.future.cancel()


async def test_a_result_with_its_body_by_reference_comes_whole(sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys) -> None:
    hands = await consumed(queue)
    ticket = send(sender)
    await hands.hold(1)
    await store.set(keys.result_body(ticket.id), b"whole")
    await recorded(store, keys, hands.held[0].envelope(), Result(status=201, ref=keys.result_body(ticket.id)))
    result = await answer(ticket)
    assert (result.status, result.body, result.ref) == (201, b"whole", "")


@pytest.mark.parametrize("is_alone", [True, False])
async def test_a_large_result_that_nobody_else_reads_leaves_the_store_once_it_is_read(
    sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys, is_alone: bool
) -> None:
    """The store would keep it for ten minutes, and be full in one."""
    hands = await consumed(queue)
    ticket = send(sender, ticket=Alone(mint_id()) if is_alone else None)
    await hands.hold(1)
    body_key = keys.result_body(ticket.id)
    await store.set(body_key, b"whole")
    await recorded(store, keys, hands.held[0].envelope(), Result(ref=body_key))
    assert (await answer(ticket)).body == b"whole"
    if is_alone:

        async def is_gone() -> bool:
            return await store.get(body_key) is None

        await until(is_gone)
    else:
        await sender.settle()
        assert (await sender.pending.result(ticket.id, 10)).body == b"whole"
    assert await store.get(keys.future(ticket.id)) is not None  # or another delivery of the request would run it again


async def test_a_result_that_names_anothers_body_does_not_get_it(
    sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys
) -> None:
    hands = await consumed(queue)
    ticket = send(sender)
    await hands.hold(1)
    await store.set(keys.body("another"), b"secret")
    await recorded(store, keys, hands.held[0].envelope(), Result(ref=keys.body("another")))
    with pytest.raises(MQServeError, match="gone from the store"):
        await answer(ticket)


async def test_the_replica_sees_what_the_caller_meant(sender: RequestSender, queue: Queue, keys: StoreKeys) -> None:
    hands = await consumed(queue)
    meta = RequestHead(path="/a", query=b"b=c", headers=((b"x", b"y"),))
    ticket = Ticket(mint_id())
    sender.send(ticket, "b", b"body", "text/plain", meta, origin="handle", timeout_s=10)
    await hands.hold(1)
    envelope = hands.held[0].envelope()
    assert (envelope.id, envelope.body, envelope.content_type, envelope.header.meta) == (ticket.id, b"body", "text/plain", meta)
    assert (envelope.header.origin, envelope.header.inbox) == ("handle", keys.inbox("test"))
    assert envelope.minted
    ticket.future.cancel()


async def test_an_unanswered_request_is_a_504_by_its_deadline_and_recorded(
    sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys
) -> None:
    await queue.declare("b", 1, None)
    begun = time.monotonic()
    ticket = send(sender, timeout_s=0.2)
    result = await answer(ticket)
    assert 0.19 < time.monotonic() - begun < 8
    assert result.status == 504
    assert result.error is not None and "(queue)" in result.error.message
    recorded_result = await store.get(keys.future(ticket.id))
    assert recorded_result is not None and Result.from_bytes(recorded_result) == result
    assert len(sender.pending) == 0


async def test_a_request_that_was_started_is_said_to_have_run_out_of_time_running(
    sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys
) -> None:
    await queue.declare("b", 1, None)
    future_id = mint_id()
    await store.set(keys.start(future_id), b"1")
    result = await answer(send(sender, timeout_s=0.2, future_id=future_id))
    assert result.error is not None and "(run)" in result.error.message


async def test_deadlines_come_in_their_own_order(sender: RequestSender, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    last, first, second = (send(sender, timeout_s=timeout_s).future for timeout_s in (1.2, 0.2, 0.7))
    late: list[object] = []
    for future in (last, first, second):
        future.add_done_callback(late.append)
    await until(lambda: len(late) == 3)
    assert late == [first, second, last]


async def test_a_result_recorded_first_beats_the_deadline(sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys) -> None:
    await queue.declare("b", 1, None)
    ticket = send(sender, timeout_s=2)
    untold = Envelope(ticket.id, b"", "text/plain", Header(origin="http"))
    await recorded(store, keys, untold, Result(body=b"just in time"))
    assert (await answer(ticket)).body == b"just in time"


async def test_a_request_for_an_unknown_backend_fails(sender: RequestSender, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    with pytest.raises(NotRouted):
        await answer(send(sender, backend="unknown"))
    assert len(sender.pending) == 0


async def test_a_request_for_a_full_backend_fails(sender: RequestSender, queue: Queue) -> None:
    await queue.declare("b", 1, max_length=1)
    kept, refused = send(sender), send(sender)
    with pytest.raises(Overloaded):
        await answer(refused)
    assert len(sender.pending) == 1
    kept.future.cancel()


async def test_how_quickly_a_backend_answered_is_forgotten_with_it(sender: RequestSender, queue: Queue) -> None:
    for backend in ("kept", "deleted"):
        await queue.declare(backend, 1, max_length=1)
        send(sender, backend=backend)
    await asyncio.sleep(MIN_RETRY_S * 1.5)  # so long has nothing moved
    sender.follow({"kept": 1})
    advised: dict[str, float] = {}
    for backend in ("kept", "deleted"):
        with pytest.raises(Overloaded) as refusal:
            await answer(send(sender, backend=backend))
        advised[backend] = refusal.value.retry_after_s
    assert advised["deleted"] == MIN_RETRY_S < advised["kept"]


async def test_what_was_sent_and_what_was_cancelled_is_settled_in_time(
    sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys
) -> None:
    await queue.declare("b", 1, None)
    tickets = [send(sender), send(sender, b"x" * (INLINE_BODY_BYTES + 1), timeout_s=30)]
    sender.cancel(tickets[0].id)
    await sender.settle()
    assert sender.held.held == 0
    assert await queue.depth("b", 1) == 2
    assert await store.get(keys.future(tickets[0].id)) == CANCELLED.to_bytes()
    for ticket in tickets:
        ticket.future.cancel()


@pytest.mark.parametrize(("body", "headers", "status"), [(b"x" * (64 * 1024 * 1024 + 1), b"", 413), (b"", b"x" * 200_000, 431)])
async def test_what_is_too_large_is_refused_at_once_and_not_waited_for(
    sender: RequestSender, body: bytes, headers: bytes, status: int
) -> None:
    with pytest.raises(TooLarge) as refusal:
        sender.send(Ticket(mint_id()), "b", body, "text/plain", RequestHead(headers=((b"h", headers),)), origin="http", timeout_s=1)
    assert refusal.value.status == status
    assert len(sender.pending) == 0


async def test_a_copy_that_no_broker_could_carry_leaves_nothing_held(sender: RequestSender, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    sender.send_shadow("b", b"x" * 1000, "text/plain", RequestHead(headers=((b"h", b"x" * 200_000),)), origin="http", timeout_s=1)
    await sender.settle()
    assert sender.held.held == 0


async def test_an_error_that_is_raised_again_does_not_hold_the_frames_of_whoever_was_told_first(
    sender: RequestSender, queue: Queue
) -> None:
    await queue.declare("b", 1, None)
    ticket = send(sender, backend="unknown")
    raised: list[MQServeError] = []
    for _ in range(2):
        with pytest.raises(NotRouted) as refusal:
            await (answer(ticket) if not raised else sender.pending.result(ticket.id, 1))
        raised.append(refusal.value)
    assert raised[0] is not raised[1] and str(raised[0]) == str(raised[1])


async def test_the_result_of_a_strangers_request_can_be_waited_for(sender: RequestSender, store: Store, keys: StoreKeys) -> None:
    stranger = Envelope(mint_id(), b"", "text/plain")
    waiting = asyncio.create_task(sender.pending.result(stranger.id, timeout_s=10))
    await recorded(store, keys, stranger, Result(body=b"theirs"))
    assert (await waiting).body == b"theirs"
    assert (await sender.pending.result(stranger.id, timeout_s=0)).body == b"theirs"


async def test_waiting_for_a_result_that_does_not_come_ends_in_time(sender: RequestSender) -> None:
    with pytest.raises(TimeoutError):
        await sender.pending.result(mint_id(), timeout_s=0.05)


async def test_one_who_stops_waiting_for_a_stranger_takes_nothing_from_the_others(
    sender: RequestSender, store: Store, keys: StoreKeys
) -> None:
    stranger = Envelope(mint_id(), b"", "text/plain")
    patient = asyncio.create_task(sender.pending.result(stranger.id, timeout_s=10))
    with pytest.raises(TimeoutError):
        await sender.pending.result(stranger.id, timeout_s=0.05)
    await recorded(store, keys, stranger, Result(body=b"theirs"))
    async with asyncio.timeout(5):
        assert (await patient).body == b"theirs"


async def test_a_cancelled_wait_for_a_stranger_leaves_no_task_behind(sender: RequestSender) -> None:
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(sender.pending.result(mint_id(), timeout_s=None))
    await until(lambda: len(asyncio.all_tasks() - before) == 2)
    waiting.cancel()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_a_wait_that_ends_does_not_end_the_request(sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys) -> None:
    hands = await consumed(queue)
    ticket = send(sender)
    with pytest.raises(TimeoutError):
        await sender.pending.result(ticket.id, timeout_s=0.05)
    await hands.hold(1)
    await recorded(store, keys, hands.held[0].envelope(), Result(body=b"in the end"))
    assert (await answer(ticket)).body == b"in the end"


async def test_a_result_that_stood_before_the_inbox_was_read_is_found(queue: Queue, store: Store, keys: StoreKeys) -> None:
    hands = await consumed(queue)
    sender = RequestSender(queue, store, keys, "late reader")
    ticket = send(sender)
    await hands.hold(1)
    untold = Envelope(ticket.id, b"", "text/plain")
    await recorded(store, keys, untold, Result(body=b"early"))
    async with running(sender):
        assert (await answer(ticket)).body == b"early"


@pytest.mark.parametrize("maybe_sent", [False, True])
async def test_a_request_is_published_again_when_the_broker_was_away(maybe_sent: bool, keys: StoreKeys) -> None:
    queue, store = QueueThatIsAway(for_publishes=2, maybe_sent=maybe_sent), EmbeddedStore()
    hands = await consumed(queue)
    async with running(RequestSender(queue, store, keys, "test")) as sender:
        ticket = send(sender)
        await hands.hold(1)
        assert hands.held[0].envelope().header.again is maybe_sent
        ticket.future.cancel()


async def test_a_request_fails_when_the_broker_stays_away(keys: StoreKeys) -> None:
    queue = QueueThatIsAway(for_publishes=1000, maybe_sent=False)
    async with running(RequestSender(queue, EmbeddedStore(), keys, "test")) as sender:
        with pytest.raises(BrokerUnavailable):
            await answer(send(sender))


class Alone(Ticket):
    """A request whose result nobody else reads, as a proxy's are."""

    reads_alone = True


def send(
    sender: RequestSender,
    body: bytes = b"",
    backend: str = "b",
    timeout_s: float = 10,
    future_id: str = "",
    ticket: Ticket | None = None,
) -> Ticket:
    ticket = ticket or Ticket(future_id or mint_id())
    sender.send(ticket, backend, body, "application/octet-stream", RequestHead(), origin="http", timeout_s=timeout_s)
    return ticket


async def answer(ticket: Ticket) -> Result:
    async with asyncio.timeout(10):
        return await ticket.future


async def recorded(store: Store, keys: StoreKeys, envelope: Envelope, result: Result) -> None:
    """The result of the request stands in the store, and its inbox, if it names one, has been told."""
    raw = result.to_bytes()
    await store.record(Record(keys.future(envelope.id), raw, envelope.header.inbox, entry_of(envelope.id, raw), store.now_ms() + 10_000))


async def consumed(queue: Queue) -> Hands:
    hands = Hands()
    await queue.declare("b", 1, None)
    await queue.consume("b", 1, 10, hands)
    return hands


@asynccontextmanager
async def running(sender: RequestSender) -> AsyncIterator[RequestSender]:
    reader = asyncio.create_task(sender.run())
    try:
        yield sender
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


class EchoReplica:
    """Answers every request with its own body."""

    def __init__(self, store: Store, keys: StoreKeys) -> None:
        self._store = store
        self._keys = keys

    def __call__(self, delivery: Delivery) -> None:
        envelope = delivery.envelope()
        raw = Result(body=envelope.body).to_bytes()
        record = Record(self._keys.future(envelope.id), raw, envelope.header.inbox, entry_of(envelope.id, raw), envelope.header.deadline)
        self._store.record(record).add_done_callback(lambda _: delivery.ack())


class QueueThatIsAway(EmbeddedQueue):
    """For the first so many publishes."""

    def __init__(self, for_publishes: int, *, maybe_sent: bool) -> None:
        super().__init__()
        self._refusals = [BrokerUnavailable("away", maybe_sent=maybe_sent) for _ in range(for_publishes)]

    def publish(self, backend: str, envelope: Envelope, settled: Settled, shard: int = 0) -> None:
        if self._refusals:
            return settled(self._refusals.pop())
        super().publish(backend, envelope, settled, shard)


@pytest.fixture
async def sender(queue: Queue, store: Store, keys: StoreKeys) -> AsyncIterator[RequestSender]:
    async with running(RequestSender(queue, store, keys, "test")) as sender:
        yield sender


@pytest.fixture
async def replica(queue: Queue, store: Store, keys: StoreKeys) -> EchoReplica:
    replica = EchoReplica(store, keys)
    await queue.declare("b", 1, None)
    await queue.consume("b", 1, 10, replica)
    return replica


class StoreThatCannotBeRead(EmbeddedStore):
    """For the first so many times, once `times` is set."""

    times = 0

    def _fails(self) -> None:
        if self.times > 0:
            self.times -= 1
            raise StoreUnavailable("away")

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        self._fails()
        return await super().get_many(keys)

    async def get_large(self, key: str) -> bytes | None:
        self._fails()
        return await super().get_large(key)


@pytest.mark.parametrize("by_reference", [False, True])
async def test_a_result_that_cannot_be_read_at_once_is_read_later(by_reference: bool) -> None:
    """Its note does not come again, so whoever waits would wait to his deadline."""
    queue, store, keys = EmbeddedQueue(), StoreThatCannotBeRead(), StoreKeys("tests")
    body = b"x" * (INLINE_BYTES + 1)
    async with running(RequestSender(queue, store, keys, "test")) as sender:
        hands = await consumed(queue)
        ticket = send(sender, timeout_s=60)
        await hands.hold(1)
        ref = keys.result_body(ticket.id)
        await store.set(ref, body)
        store.times = 3
        await recorded(store, keys, hands.held[0].envelope(), Result(ref=ref) if by_reference else Result(body=body))
        async with asyncio.timeout(10):
            assert (await ticket.future).body == body


async def test_the_body_of_a_request_that_the_queue_refuses_does_not_stay(
    sender: RequestSender, queue: Queue, store: Store, keys: StoreKeys
) -> None:
    await queue.declare("b", 1, max_length=1)
    await accepted(queue, Envelope("first", b"", "text/plain"))
    ticket = send(sender, b"x" * (INLINE_BODY_BYTES + 1), timeout_s=30)
    with pytest.raises(Overloaded):
        await ticket.future

    async def is_gone() -> bool:
        return await store.get(keys.body(ticket.id)) is None

    await until(is_gone)


async def test_the_body_of_a_strangers_result_is_fetched_once() -> None:
    """Strangers' results are looked for again and again, and a large body may take its time."""

    class SlowStore(EmbeddedStore):
        fetched = 0

        async def get_large(self, key: str) -> bytes | None:
            self.fetched += 1
            await asyncio.sleep(0.5)
            return await super().get_large(key)

    queue, store, keys = EmbeddedQueue(), SlowStore(), StoreKeys("tests")
    async with running(RequestSender(queue, store, keys, "test")) as sender:
        stranger = mint_id()
        waiting = asyncio.create_task(sender.pending.result(stranger, timeout_s=30))
        await until(lambda: sender.pending._strangers)
        ref = keys.result_body(stranger)
        await store.set(ref, b"whole")
        await store.set(keys.future(stranger), Result(ref=ref).to_bytes())
        assert (await waiting).body == b"whole" and store.fetched == 1
