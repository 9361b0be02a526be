"""Requests that are delivered again: which of them are suspects, and what is held against them."""

import asyncio
from typing import Any

import pytest

from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.process.tasks import Tasks
from mqserve.broker.results import Result
from mqserve.broker.store import OnRecorded, Record
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.state.config import BackendConfig
from mqserve.replicas.admission import ALONE_AFTER, NOT_STARTED
from mqserve.replicas.stages import Job
from tests.broker.traffic import until
from tests.replicas.parts import Serving, request

pytestmark = pytest.mark.anyio

START = "b/order-17"
EIGHT: dict[str, Any] = {"max_concurrent_queries": 8}


async def die_with(queue: EmbeddedQueue, store: EmbeddedStore, times: int) -> None:
    """So many replicas get all that waits, and die before any of it starts."""
    for _ in range(times):
        async with Serving(queue, store, **EIGHT) as replica:
            await until(lambda replica=replica: replica.worker.jobs)  # type: ignore[misc]


async def test_what_waits_in_replicas_that_die_is_never_set_aside(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store, **EIGHT) as first:
        await first.send(request())
        await first.taken()
    await die_with(queue, store, 30)
    async with Serving(queue, store, **EIGHT) as last:
        job = await last.taken()
        assert job.suspect and job.envelope.attempt == 1
        last.end(job, Result(body=b"done"))
        await last.settled()
    assert not await queue.count_dead("b")


async def test_what_was_given_back_before_it_ran_is_no_suspect_until_its_next_replica_dies(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store) as first:
        await first.send(request())
        await first.taken()
        await first.server.drain(0)
        assert await store.get(keys.start(START)) == NOT_STARTED
    async with Serving(queue, store) as second:
        assert not (await second.taken()).suspect
        assert await store.get(keys.start(START)) is None and await store.get(keys.redeliveries(START)) is None
    async with Serving(queue, store) as third:
        assert (await third.taken()).suspect
        await third.server.drain(0)
    assert await store.get(keys.start(START)) is None  # a suspect stays one
    async with Serving(queue, store) as fourth:
        assert (await fourth.taken()).suspect


async def test_a_message_that_is_alone_after_some_redeliveries_is_marked_before_anything_else_is_done_with_it(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store, **EIGHT) as first:
        await first.send(request())
        await first.taken()
    await die_with(queue, store, ALONE_AFTER - 1)
    assert await store.get(keys.start(START)) is None
    await die_with(queue, store, 1)
    assert await store.get(keys.start(START))
    async with Serving(queue, store, replica_id="b#2", max_attempts=1) as last:
        await until(lambda: queue.count_dead("b"))
        await last.settled()


async def test_a_message_in_company_is_not_marked_before_it_runs(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store, **EIGHT) as first:
        first.worker.run_s = 0.00001
        first.server._consumers.tune()
        await first.send(request())
        await first.send(request(id="order-18"))
        await until(lambda: len(first.worker.jobs) == 2)
    for _ in range(ALONE_AFTER + 1):
        async with Serving(queue, store, **EIGHT) as replica:
            replica.worker.run_s = 0.00001
            replica.server._consumers.tune()
            await until(lambda replica=replica: len(replica.worker.jobs) == 2)  # type: ignore[misc]
            assert not replica.worker.jobs[1].mark


class SlowToRecord(EmbeddedStore):
    """Keeps results until it is `let`."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()
        self._tasks = Tasks()

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        self._tasks.start(self._record_later(record, on_recorded))

    async def _record_later(self, record: Record, on_recorded: OnRecorded) -> None:
        await self.let.wait()
        super().record_then(record, on_recorded)


async def test_a_suspect_does_not_start_before_the_results_of_earlier_ones_are_stored(keys: StoreKeys) -> None:
    """Or it would kill the replica while they are held to be still running."""
    store = SlowToRecord()
    async with Serving(store=store, **EIGHT) as serving:
        await serving.send(request())
        job = await serving.taken()
        job.suspect, job.started = True, 1.0
        await serving.server.before_suspects([job])
        assert await store.get(keys.start(START))
        serving.end(job, Result(body=b"done"))
        next_one = Job(request(id="order-18"), 1, job.delivery, suspect=True)
        waiting = asyncio.create_task(serving.server.before_suspects([next_one]))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.shield(waiting)
        assert await store.get(keys.start("b/order-18")) is None
        store.let.set()
        await waiting
        assert await store.get(keys.start("b/order-18")) and await store.get(keys.future(START))


async def test_a_request_that_waits_behind_a_slow_call_goes_back_and_none_is_taken_until_that_has_ended(keys: StoreKeys) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    async with Serving(queue, store) as serving:
        tuning = asyncio.create_task(serving.server.tune_forever())
        serving.worker.run_s = 0.00001
        serving.server._consumers.tune()
        for number in range(5):
            await serving.send(request(id=f"order-{number}"))
        await until(lambda: len(serving.worker.jobs) == 5)
        serving.worker.jobs[0].started = 1.0
        serving.worker.blocked_s = 0.03
        await until(lambda: queue.depth("b", 1))
        assert await queue.depth("b", 1) == 4 and serving.server.running == 1
        serving.worker.blocked_s = 0.0
        serving.end(serving.worker.jobs[0], Result(body=b"done"))
        await until(lambda: len(serving.worker.jobs) == 4)
        assert [job.envelope.id for job in serving.worker.jobs] == [f"order-{number}" for number in range(1, 5)]
        assert not any(job.suspect for job in serving.worker.jobs)
        tuning.cancel()


async def test_a_replica_that_may_not_look_ahead_any_more_goes_on_taking_requests() -> None:
    async with Serving() as serving:
        tuning = asyncio.create_task(serving.server.tune_forever())
        serving.worker.blocked_s = 0.03
        await serving.send(request())
        await until(lambda: serving.server._consumers.held_off and not serving.server.running)
        serving.server.configure(BackendConfig(delivery="at_most_once"))
        assert await serving.taken()
        tuning.cancel()


async def test_a_slow_call_does_not_make_the_store_be_asked_about_every_request() -> None:
    """As after a move to a later generation of the queue, when messages may be in two."""
    async with Serving(generations=(2,)) as serving:
        consumers = serving.server._consumers
        moved_at = consumers.moved_at
        consumers.hold_off(jobs_first=False)
        await until(lambda: not consumers.generations)
        consumers.go_on()
        await until(lambda: consumers.generations)
        assert consumers.moved_at == moved_at
