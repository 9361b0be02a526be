"""Jobs that are left when their backend goes: each gets an end before its queue is deleted."""

import pytest
from msgspec.structs import replace

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.job_store import OnDone
from mqserve.broker.jobs import JobEnd, JobState
from mqserve.broker.memory.expiring import Expiring
from mqserve.broker.memory.jobs import EmbeddedJobs
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Queue
from mqserve.broker.results import Result
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.job_ends import Leftovers
from tests.broker.test_later import Trusting, job_due_in
from tests.broker.traffic import publish_job, until

pytestmark = pytest.mark.anyio


async def test_every_job_that_is_left_fails_and_the_queue_is_empty(queue: Queue, store: Store, keys: StoreKeys) -> None:
    await queue.declare("b", 1, None)
    jobs = [job_due_in(store, 0) for _ in range(300)]
    for job in jobs:
        assert await publish_job(queue, job) is None
    leftovers = Leftovers(queue, store, Trusting())
    await until(lambda: leftovers.end_some("b", 1))
    results = [Result.from_bytes(raw or b"") for raw in await store.get_many([keys.future(job.id) for job in jobs])]
    assert {(result.status, result.error and result.error.type) for result in results} == {(503, "mqserve.BackendGone")}
    record = await store.jobs.read(jobs[0].id)
    assert record is not None and record.state is JobState.FAILED
    await until(lambda: queue.delete("b", 1, only_if_empty=True))


async def test_a_job_that_has_a_result_keeps_it(queue: Queue, store: Store, keys: StoreKeys) -> None:
    await queue.declare("b", 1, None)
    job = job_due_in(store, 0)
    assert await publish_job(queue, job) is None
    assert await store.set(keys.future(job.id), Result(backend="b", body=b"done").to_bytes(), ttl_ms=60_000)
    await until(lambda: Leftovers(queue, store, Trusting()).end_some("b", 1))
    assert Result.from_bytes(await store.get(keys.future(job.id)) or b"").body == b"done"


async def test_a_job_of_a_direct_publisher_ends_under_its_own_key_and_one_without_a_key_is_dropped(
    queue: Queue, store: Store, keys: StoreKeys
) -> None:
    await queue.declare("b", 1, None)
    job = job_due_in(store, 0)
    for direct in (replace(job.without_header(), id="order-1"), replace(job.without_header(), id="")):
        assert await publish_job(queue, direct) is None
    await until(lambda: Leftovers(queue, store, Trusting()).end_some("b", 1))
    assert Result.from_bytes(await store.get(keys.future("b/order-1")) or b"").status == 503


class SilentJobs(EmbeddedJobs):
    """Answers an end when the test says so."""

    def __init__(self, store: EmbeddedStore, keys: StoreKeys) -> None:
        super().__init__(keys, Expiring(), store.post, store.now_ms)
        self.asked: list[OnDone] = []

    def end_then(self, end: JobEnd, on_done: OnDone) -> None:
        self.asked.append(on_done)


async def test_a_job_whose_end_is_still_being_recorded_counts_as_left(queue: Queue, keys: StoreKeys) -> None:
    """Otherwise its queue would be deleted before it comes back."""
    store = EmbeddedStore()
    store.jobs = silent = SilentJobs(store, keys)
    await queue.declare("b", 1, None)
    assert await publish_job(queue, job_due_in(store, 0)) is None
    assert not await Leftovers(queue, store, Trusting()).end_some("b", 1)
    assert silent.asked and await queue.count_jobs("b", 1) == 0
    silent.asked[0](StoreUnavailable("it is away"))
    await until(lambda: queue.count_jobs("b", 1))


async def test_a_queue_that_is_not_there_has_no_jobs_left(queue: Queue, store: Store) -> None:
    assert await Leftovers(queue, store, Trusting()).end_some("b", 1)
