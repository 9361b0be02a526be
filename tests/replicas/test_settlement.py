"""What becomes of a delivery when broker or store fail at the wrong moment: it is run once, answered once, and held against nobody."""

import asyncio
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from mqserve.broker.calls.cancellations import notice_of_request
from mqserve.broker.envelope import Envelope, Header
from mqserve.broker.errors import BrokerUnavailable, MQServeError, Overloaded, StoreUnavailable
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Settled
from mqserve.broker.results import Result
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.codecs import check_plain
from mqserve.replicas.admission import NOT_STARTED
from mqserve.replicas.prefetch import prefetch
from mqserve.replicas.settlement import INLINE_RESULT_BYTES
from tests.broker.traffic import publish, until
from tests.replicas.parts import MINTED, Serving, minted, request

pytestmark = pytest.mark.anyio

LARGE = b"x" * (INLINE_RESULT_BYTES + 1)


class QueueThatRefusesReplies(EmbeddedQueue):
    """For the first so many."""

    def __init__(self, times: int, make_error: Callable[[], MQServeError]) -> None:
        super().__init__()
        self._times = times
        self._make_error = make_error
        self.replies: list[Envelope] = []

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        if self._times > 0:
            self._times -= 1
            return settled(self._make_error())
        self.replies.append(envelope)
        settled(None)


class StoreThatIsAway(EmbeddedStore):
    """For the first so many calls of a kind."""

    def __init__(self, kind: str, times: int, *, does_it: bool = False) -> None:
        super().__init__()
        self._kind, self._times, self._does_it = kind, times, does_it

    async def _maybe(self, kind: str, call: Any) -> Any:
        if kind == self._kind and self._times > 0:
            self._times -= 1
            if self._does_it:
                await call
            else:
                call.close()
            raise StoreUnavailable("away")
        return await call

    async def get(self, key: str) -> bytes | None:
        return await self._maybe("get", super().get(key))  # type: ignore[no-any-return]

    async def set(self, key: str, value: bytes, **how: Any) -> bool:
        return await self._maybe("set", super().set(key, value, **how))  # type: ignore[no-any-return]


# Replies.


@pytest.mark.parametrize("message_id", ["", "order-17"])
async def test_a_reply_that_the_callers_full_queue_refuses_is_dropped_and_the_request_not_run_again(message_id: str) -> None:
    queue = QueueThatRefusesReplies(1, lambda: Overloaded("full"))
    async with Serving(queue) as serving:
        await serving.send(request(id=message_id, reply_to="caller"))
        serving.end(await serving.taken(), Result(body=b"done"))
        await serving.settled()
        assert not serving.worker.jobs and not queue.replies and await queue.depth("b", 1) == 0


async def test_an_answer_that_amqp_cannot_carry_is_dropped_and_the_request_not_run_again() -> None:
    class PackingQueue(EmbeddedQueue):
        def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
            envelope.to_amqp()
            settled(None)

    queue = PackingQueue()
    async with Serving(queue) as serving:
        await serving.send(request(id="", reply_to="caller"))
        serving.end(await serving.taken(), Result(content_type="x" * 300))
        await serving.settled()
        assert not serving.worker.jobs and await queue.depth("b", 1) == 0


async def test_a_reply_that_cannot_be_sent_for_a_while_is_sent_later_and_the_request_not_run_again() -> None:
    queue = QueueThatRefusesReplies(3, lambda: BrokerUnavailable("an alarm"))
    async with Serving(queue) as serving:
        await serving.send(request(id="", reply_to="caller"))
        serving.end(await serving.taken(), Result(body=b"done"))
        await serving.settled()
        assert [reply.body for reply in queue.replies] == [b"done"]
        assert not serving.worker.jobs and await queue.depth("b", 1) == 0


# Results.


async def test_a_large_result_is_kept_until_the_store_takes_it_and_the_request_not_run_again(keys: StoreKeys) -> None:
    store = StoreThatIsAway("set", 3)
    async with Serving(store=store) as serving:
        await serving.send(minted())
        serving.end(await serving.taken(), Result(body=LARGE))
        await serving.settled()
        raw = await store.get(keys.future(MINTED))
        assert raw is not None and await store.get(Result.from_bytes(raw).ref) == LARGE
        assert not serving.worker.jobs


async def test_a_second_run_leaves_no_large_body_behind_the_result_of_the_first(keys: StoreKeys) -> None:
    """The proxy has read the first one's body, and deleted it."""
    async with Serving() as lost:
        await lost.send(minted())
        await lost.taken()
    async with Serving(lost.queue, lost.store) as serving:
        job = await serving.taken()
        assert job.delivery.redelivered
        first = Result(ref=keys.result_body(MINTED)).to_bytes()
        await serving.store.set(keys.future(MINTED), first)
        serving.end(job, Result(body=LARGE))
        await serving.settled()
        assert await serving.store.get(keys.result_body(MINTED)) is None
        assert await serving.store.get(keys.future(MINTED)) == first


async def test_who_publishes_by_amqp_finds_a_body_of_1_mib_in_its_result(keys: StoreKeys) -> None:
    """The protocol says so; our own processes find a body of that size under a key of its own."""
    body = b"x" * (1024 * 1024)
    async with Serving() as serving:
        for envelope, is_inline in ((request(id="order-17"), True), (minted(), False)):
            await serving.send(envelope)
            serving.end(await serving.taken(), Result(body=body))
            await serving.settled()
            raw = await serving.store.get(keys.future(envelope.future_id("b")))
            assert raw is not None and (Result.from_bytes(raw).body == body) is is_inline


async def test_a_body_that_travelled_by_reference_goes_with_its_answer(keys: StoreKeys) -> None:
    async with Serving() as serving:
        await serving.store.set(keys.body(MINTED), b"large")
        await serving.send(minted(ref=keys.body(MINTED)))
        job = await serving.taken()
        assert job.envelope.body == b"large" == await serving.store.get(keys.body(MINTED))
        serving.end(job, Result())
        await serving.settled()
        assert await serving.store.get(keys.body(MINTED)) is None


async def test_an_answered_request_that_comes_again_needs_no_body(keys: StoreKeys) -> None:
    async with Serving() as serving:
        await serving.store.set(keys.future(MINTED), Result(backend="b").to_bytes())
        await serving.send(minted(ref=keys.body(MINTED), again=True))
        await serving.settled()
        assert not serving.worker.jobs


async def test_a_body_that_is_lost_is_nobodys_bad_request(keys: StoreKeys) -> None:
    async with Serving() as serving:
        await serving.send(minted(ref=keys.body(MINTED)))
        await serving.settled()
        raw = await serving.store.get(keys.future(MINTED))
        assert raw is not None and Result.from_bytes(raw).status == 500


async def test_a_result_whose_body_is_lost_is_an_error_and_not_an_empty_answer(keys: StoreKeys) -> None:
    queue = QueueThatRefusesReplies(0, lambda: Overloaded(""))
    async with Serving(queue) as serving:
        await serving.store.set(keys.future("b/order-17"), Result(backend="b", ref=keys.body("b/order-17.result")).to_bytes())
        await serving.send(request(reply_to="caller"))
        await serving.settled()
        assert [reply.status for reply in queue.replies] == [500]


async def test_a_result_of_another_backend_is_not_taken_for_an_answer(keys: StoreKeys) -> None:
    """Names may hold a slash: `order-17` of backend `b` and `17` of a backend `b/order` are not the same, though these may be."""
    async with Serving() as serving:
        await serving.store.set(keys.future("b/order-17"), Result(backend="b/order").to_bytes())
        await serving.send(request())
        await serving.settled()
        async with serving.queue.dead_letters("b") as letters:
            assert [letter.id async for letter in letters] == ["order-17"]


# Marks.


async def test_a_callers_own_id_can_be_used_again_though_its_run_was_marked(keys: StoreKeys) -> None:
    async with Serving() as serving:
        await serving.send(request())
        job = await serving.taken()
        job.started, job.mark = 1.0, b"a mark"
        await serving.store.set(keys.start("b/order-17"), b"a mark")
        serving.end(job, Result())
        await serving.settled()

        async def is_forgotten() -> bool:
            return await serving.store.get(keys.start("b/order-17")) is None

        await until(is_forgotten)


async def test_a_mark_whose_answer_was_lost_is_taken_away_before_the_request_goes_back(keys: StoreKeys) -> None:
    store = StoreThatIsAway("set", 1, does_it=True)
    async with Serving(store=store, delivery="at_most_once") as serving:
        await serving.send(request())
        serving.end(await serving.taken(), Result(body=b"done"))  # the second time
        await serving.settled()
        raw = await store.get(keys.future("b/order-17"))
        assert raw is not None and (Result.from_bytes(raw).status, Result.from_bytes(raw).body) == (200, b"done")


async def test_a_run_of_another_replica_is_not_unmarked(keys: StoreKeys) -> None:
    async with Serving(store=StoreThatIsAway("get", 1), delivery="at_most_once") as serving:
        await serving.store.set(keys.start("b/order-17"), b"another's mark")
        await serving.send(request())
        await serving.settled()
        raw = await serving.store.get(keys.future("b/order-17"))
        assert raw is not None and Result.from_bytes(raw).status == 502
        assert await serving.store.get(keys.start("b/order-17")) == b"another's mark"


# Deadlines and cancellation.


async def test_no_sender_may_have_a_request_run_longer_than_rabbitmq_waits_for_its_ack() -> None:
    async with Serving() as serving:
        hours = 3 * 3600 * 1000
        await serving.send(request(header=Header(deadline=serving.store.now_ms() + hours)))
        job = await serving.taken()
        assert job.deadline - asyncio.get_running_loop().time() < 26 * 60


async def test_a_request_that_is_cancelled_while_it_is_looked_up_does_not_run(keys: StoreKeys) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    class SlowStore(EmbeddedStore):
        async def get(self, key: str) -> bytes | None:
            if key == keys.future(MINTED):
                asked.set()
                await go_on.wait()
            return await super().get(key)

    async with Serving(store=SlowStore()) as serving:
        await serving.send(minted(again=True))
        await asked.wait()
        await serving.store.append_log(keys.cancelled, notice_of_request(MINTED))
        await until(lambda: bool(serving.server._giving_up._cancellations))
        go_on.set()
        await serving.settled()
        assert not serving.worker.jobs


# What is only looked at.


async def test_looking_whether_a_body_parses_makes_nothing_of_it() -> None:
    """Four MiB of empty maps would be hundreds of MiB of dicts."""
    count = 4 * 1024 * 1024
    body = b"\xdd" + count.to_bytes(4) + b"\x80" * count
    tracemalloc.start()
    try:
        check_plain(body, "application/msgpack")
        check_plain(b"[" + b"{}," * (count // 4) + b"{}]", "application/json")
        assert tracemalloc.get_traced_memory()[1] < 3 * count
    finally:
        tracemalloc.stop()


async def test_a_copy_that_is_not_run_leaves_the_body_to_the_one_that_is(keys: StoreKeys) -> None:
    """While the binding moves to a new generation a message may lie in both queues."""
    async with Serving(generations=(1, 2)) as serving:
        await serving.store.set(keys.body(MINTED), b"large")
        assert await publish(serving.queue, minted(ref=keys.body(MINTED))) is None  # to both
        job = await serving.taken()
        await until(lambda: serving.server.running == 1)  # the other one is settled
        assert job.envelope.body == b"large" == await serving.store.get(keys.body(MINTED))


# At most once.

ONCE: dict[str, Any] = {"delivery": "at_most_once"}
START = "b/order-17"


async def result_of(serving: Serving, keys: StoreKeys) -> Result:
    raw = await serving.store.get(keys.future(START))
    assert raw is not None
    return Result.from_bytes(raw)


async def test_what_was_given_back_before_it_ran_runs_elsewhere(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store, **ONCE) as first:
        await first.send(request())
        await first.taken()
        await first.server.drain(0)
        assert await store.get(keys.start(START)) == NOT_STARTED
    async with Serving(queue, store, **ONCE) as second:
        second.end(await second.taken(), Result(body=b"done"))
        await second.settled()
        assert (await result_of(second, keys)).body == b"done"


async def test_what_came_when_a_replica_drained_runs_elsewhere(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store, **ONCE) as first:
        first.server._draining = True  # the moment between its decision and the end of its consumer
        await first.send(request())
        await until(lambda: store_has(store, keys.start(START)))
    async with Serving(queue, store, **ONCE) as second:
        second.end(await second.taken(), Result(body=b"done"))
        await second.settled()
        assert (await result_of(second, keys)).body == b"done"


async def test_what_may_have_run_is_not_run_again_though_its_mark_is_lost(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store, **ONCE) as first:
        await first.send(request())
        job = await first.taken()
        job.started = 1.0
        await store.delete(keys.start(START))  # Redis lost its data
        await first.server.abandon()
    async with Serving(queue, store, **ONCE) as second:
        await second.settled()
        assert not second.worker.jobs and (await result_of(second, keys)).status == 502


async def test_what_another_replica_had_is_not_said_to_be_unstarted_by_one_that_drains(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store, **ONCE) as first:
        await first.send(request())
        (await first.taken()).started = 1.0
        await store.delete(keys.start(START))
        await first.server.abandon()
    async with Serving(queue, store, **ONCE) as second:
        second.server._draining = True
        await until(lambda: nothing_held(second))
        assert await store.get(keys.start(START)) != NOT_STARTED


async def test_a_store_that_is_away_for_a_moment_costs_no_request_its_only_run(keys: StoreKeys) -> None:
    async with Serving(store=StoreThatIsAway("set", 3), **ONCE) as serving:
        await serving.send(request())
        serving.end(await serving.taken(), Result(body=b"done"))
        await serving.settled()
        assert (await result_of(serving, keys)).body == b"done"


async def test_no_request_is_looked_ahead_for_that_would_be_lost_with_its_replica() -> None:
    assert prefetch(1, 8, 0.0001, may_look_ahead=False) == 1 < prefetch(1, 8, 0.0001)


async def store_has(store: EmbeddedStore, key: str) -> bool:
    return await store.get(key) is not None


async def nothing_held(serving: Serving) -> bool:
    return not serving.server.running
