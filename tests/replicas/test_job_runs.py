"""Jobs of one replica beside those of another: who has the lease of a job, what a run without it may write, and what is given back."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mqserve.broker.envelope import Envelope, Header, JobHead
from mqserve.broker.errors import BrokerUnavailable, StoreUnavailable
from mqserve.broker.jobs import LEASE_MS, Attempt, Begun, JobFacts, JobRecord, JobState, Run
from mqserve.broker.memory import jobs as memory_jobs
from mqserve.broker.memory.jobs import EmbeddedJobs
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.queue import Settled
from mqserve.broker.result_bodies import with_body
from mqserve.broker.result_files import MAX_IN_STORE, ResultFiles
from mqserve.broker.results import ErrorInfo, Result
from mqserve.broker.store_keys import StoreKeys
from mqserve.replicas import job_runs
from mqserve.replicas.stages import KeptJob
from tests.broker.traffic import until
from tests.replicas.parts import MINTED, Serving, request

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")


def a_job(**header: Any) -> Envelope:
    """Of a handle."""
    return Envelope(MINTED, b"x", "text/plain", Header(origin="handle", job=JobHead(created_ms=1000), **header))


async def record_of(serving: Serving, job_id: str = MINTED) -> JobRecord:
    record = await serving.store.jobs.read(job_id)
    assert record is not None
    return record


async def state_is(serving: Serving, state: JobState, job_id: str = MINTED) -> None:
    async def holds() -> bool:
        record = await serving.store.jobs.read(job_id)
        return record is not None and record.state is state

    await until(holds)


async def begun_by(serving: Serving) -> KeptJob:
    """The only job that is to run."""
    job = await serving.taken()
    assert isinstance(job, KeptJob)
    return job


async def takes_nothing_more(serving: Serving) -> None:
    serving.server.want({})
    await until(lambda: not serving.server._consumers.generations)


def beside(serving: Serving, **config: Any) -> Serving:
    """Another replica of the same backend."""
    return Serving(serving.queue, serving.store, replica_id="b#2", tunes=True, **config)


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_jobs, "LEASE_MS", 200)
    monkeypatch.setattr(job_runs, "RENEW_EVERY_S", 0.05)


async def test_a_job_is_begun_in_its_record_before_it_runs() -> None:
    async with Serving() as serving:
        await serving.send_job(a_job())
        job = await begun_by(serving)
        record = await record_of(serving)
        assert (record.state, [run.replica for run in record.attempts]) == (JobState.RUNNING, ["b#1"])
        serving.end(job, Result(body=b"done"))
        await serving.settled()
        record = await record_of(serving)
        assert (record.state, record.status, record.has_result) == (JobState.SUCCEEDED, 200, True)


async def test_a_second_copy_waits_for_the_lease_and_is_acked_when_the_job_has_its_result(short_leases: None) -> None:
    async with Serving(tunes=True) as first:
        await first.send_job(a_job())
        job = await begun_by(first)
        async with beside(first) as second:
            await first.send_job(a_job(again=True))
            await until(lambda: first.server.running + second.server.running == 2)
            await asyncio.sleep(0.6)  # three leases
            assert len(first.worker.jobs) + len(second.worker.jobs) == 1, "the first one renews its lease"
            first.end(job, Result(body=b"done"))
            await first.settled()
            await second.settled()
            assert not second.worker.jobs
    assert len((await record_of(first)).attempts) == 1


async def test_a_second_copy_that_comes_when_the_time_to_begin_is_over_does_not_end_the_run() -> None:
    async with Serving(tunes=True) as first:
        sent = a_job(deadline=first.store.now_ms() + 300)
        await first.send_job(sent)
        job = await begun_by(first)
        await until(lambda: first.store.now_ms() > sent.header.deadline)
        async with beside(first) as second:
            await takes_nothing_more(first)
            await first.send_job(sent)
            await until(lambda: second.server.running == 1)
            assert (await record_of(first)).state is JobState.RUNNING
            first.end(job, Result(body=b"done"))
            await first.settled()
    assert (await record_of(first)).state is JobState.SUCCEEDED


async def test_a_copy_that_waits_for_a_lease_keeps_no_other_job_out() -> None:
    async with Serving(tunes=True) as first:
        await first.send_job(a_job())
        job = await begun_by(first)
        async with beside(first) as second:
            await takes_nothing_more(first)
            await first.send_job(a_job(again=True))
            await until(lambda: second.server.running == 1)
            await first.send_job(msgspec.structs.replace(a_job(), id="0" * 32))
            other = await begun_by(second)
            assert other.envelope.id == "0" * 32
            second.end(other, Result())
            first.end(job, Result())
            await first.settled()


async def test_what_a_frozen_replica_ran_runs_elsewhere_and_its_waking_changes_nothing(short_leases: None) -> None:
    async with Serving() as frozen:
        await frozen.send_job(a_job())
        stale = await begun_by(frozen)
        async with beside(frozen) as other:
            await takes_nothing_more(frozen)
            await frozen.send_job(a_job(again=True))  # as RabbitMQ does when the connection is lost
            job = await begun_by(other)
            assert job.envelope.attempt == 2
            stale.words.progress(0.9, "of the stale run")
            frozen.server._turns.check_jobs()  # it wakes up
            assert (await record_of(other)).progress is None
            other.end(job, Result(body=b"of the second run"))
            await other.settled()
            frozen.end(stale, Result(body=b"of the first run"))
            await frozen.settled()
    record = await record_of(other)
    assert [run.replica for run in record.attempts] == ["b#1", "b#2"] and record.state is JobState.SUCCEEDED
    raw = await other.store.get(KEYS.future(MINTED))
    assert raw is not None and Result.from_bytes(raw).body == b"of the second run"


async def test_a_late_success_counts_if_it_is_the_first_result(short_leases: None) -> None:
    async with Serving() as frozen:
        await frozen.send_job(a_job())
        stale = await begun_by(frozen)
        async with beside(frozen) as other:
            await takes_nothing_more(frozen)
            await frozen.send_job(a_job(again=True))
            job = await begun_by(other)
            frozen.end(stale, Result(body=b"of the first run"))
            await frozen.settled()
            other.end(job, Result(body=b"of the second run"))
            await other.settled()
    raw = await other.store.get(KEYS.future(MINTED))
    assert raw is not None and Result.from_bytes(raw).body == b"of the first run"


class CallersQueue(EmbeddedQueue):
    """Notes the replies to a direct publisher."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: list[bytes] = []

    def reply(self, envelope: Envelope, reply_to: str, settled: Settled) -> None:
        self.replies.append(envelope.body)
        settled(None)


@pytest.mark.parametrize("waits_at_a_queue", [False, True])
async def test_a_late_failure_does_not_count_beside_another_run(short_leases: None, waits_at_a_queue: bool) -> None:
    queue, sent = CallersQueue(), request(reply_to="caller") if waits_at_a_queue else a_job()
    job_id = sent.future_id("b")
    async with Serving(queue) as frozen:
        await frozen.send_job(sent)
        stale = await begun_by(frozen)
        async with beside(frozen) as other:
            await takes_nothing_more(frozen)
            await frozen.send_job(sent)
            job = await begun_by(other)
            fail(frozen, stale)
            await until(lambda: not frozen.server.running)
            assert (await record_of(frozen, job_id)).state is JobState.RUNNING and not queue.replies
            other.end(job, Result(body=b"of the second run"))
            await other.settled()
    assert (await record_of(other, job_id)).state is JobState.SUCCEEDED
    assert queue.replies == ([b"of the second run"] if waits_at_a_queue else [])


async def test_a_late_failure_beside_another_run_is_no_dead_letter(short_leases: None) -> None:
    retry = {"attempts": 1, "on": ["OSError"]}
    async with Serving(retry=retry) as frozen:
        await frozen.send_job(a_job())
        stale = await begun_by(frozen)
        async with beside(frozen, retry=retry) as other:
            await takes_nothing_more(frozen)
            await frozen.send_job(a_job(again=True))
            job = await begun_by(other)
            fail(frozen, stale)
            await until(lambda: not frozen.server.running)
            assert await frozen.queue.count_dead("b") == 0
            fail(other, job)
            await other.settled()
            assert await frozen.queue.count_dead("b") == 1


async def test_of_two_runs_with_large_results_only_the_file_of_the_first_stays(short_leases: None, tmp_path: Path) -> None:
    store = EmbeddedStore("tests", ResultFiles(tmp_path, "tests"))
    async with Serving(store=store) as frozen:
        await frozen.send_job(a_job())
        stale = await begun_by(frozen)
        async with beside(frozen) as other:
            await takes_nothing_more(frozen)
            await frozen.send_job(a_job(again=True))
            job = await begun_by(other)
            other.end(job, Result(body=b"2" * (MAX_IN_STORE + 1)))
            await other.settled()
            frozen.end(stale, Result(body=b"1" * (MAX_IN_STORE + 1)))
            await frozen.settled()
    raw = await store.get(KEYS.future(MINTED))
    assert raw is not None
    result = Result.from_bytes(raw)
    assert result.file is not None and (await with_body(store, KEYS, MINTED, result)).body[:1] == b"2"
    assert len(os.listdir(tmp_path / "tests")) == 1


async def test_a_job_that_a_drain_gives_back_begins_elsewhere_at_once_and_that_is_no_attempt() -> None:
    async with Serving(graceful_shutdown_timeout_s=0) as first:
        await first.send_job(a_job())
        job = await begun_by(first)
        job.started = 1.0
        async with beside(first) as second:
            await first.server.drain(0)
            async with asyncio.timeout(LEASE_MS / 1000 - 1):  # none lapses meanwhile
                again = await begun_by(second)
            assert again.envelope.attempt == 1
            second.end(again, Result())
            await second.settled()
    assert [run.replica for run in (await record_of(second)).attempts] == ["b#2"]


async def test_a_job_that_began_in_time_and_was_given_back_runs_again_after_that_time() -> None:
    async with Serving(graceful_shutdown_timeout_s=0) as first:
        expires_ms = first.store.now_ms() + 300
        await first.send_job(a_job(deadline=expires_ms))
        (await begun_by(first)).started = 1.0
        async with beside(first) as second:
            await takes_nothing_more(second)
            await first.server.drain(0)
            await until(lambda: second.store.now_ms() > expires_ms)
            second.server.want({1: 1})
            second.end(await begun_by(second), Result())
            await second.settled()
    assert (await record_of(second)).state is JobState.SUCCEEDED


async def test_jobs_without_a_place_wait_and_a_drain_gives_them_back() -> None:
    async with Serving(max_concurrent_queries=1, job_slots=5, graceful_shutdown_timeout_s=0) as serving:
        for number in range(3):
            await serving.send_job(msgspec.structs.replace(a_job(), id=f"{number}" * 32))
        await until(lambda: serving.server.running == 3)
        await begun_by(serving)
        await serving.server.drain(0)
        assert await serving.queue.count_jobs("b", 1) == 3
        assert all(record.attempts == () for record in await serving.store.jobs.list())


async def test_a_job_whose_runs_killed_max_attempts_replicas_is_a_dead_letter_and_has_failed(short_leases: None) -> None:
    async with Serving(tunes=True, max_attempts=2) as serving:
        for number in (b"1", b"2"):
            await serving.store.jobs.begin(Run(MINTED, number, f"dead {number.decode()}", facts=job_facts(), now_ms=2000))
            await asyncio.sleep(0.3)  # its lease lapses
        await serving.send_job(a_job())
        await serving.settled()
        assert not serving.worker.jobs
        async with serving.queue.dead_letters("b") as letters:
            (letter,) = [letter async for letter in letters]
    assert [run.replica for run in letter.death.attempts] == ["dead 1", "dead 2"] and letter.is_job
    record = await record_of(serving)
    assert (record.state, record.status, len(record.attempts)) == (JobState.FAILED, 500, 2)


def job_facts() -> JobFacts:
    return JobFacts("b", created_ms=1000)


@pytest.mark.parametrize("record", ["kept", "lost"])
async def test_with_at_most_once_delivery_a_job_that_may_have_run_is_answered_502(short_leases: None, record: str) -> None:
    async with Serving(tunes=True, delivery="at_most_once") as serving:
        if record == "kept":
            await serving.store.jobs.begin(Run(MINTED, b"1", "dead", facts=job_facts(), now_ms=2000))
            await asyncio.sleep(0.3)
            await serving.send_job(a_job())
        else:
            await takes_nothing_more(serving)
            await serving.send_job(a_job())
            taken: list[Any] = []
            taking = await serving.queue.consume("b", 1, 1, taken.append, jobs=True)
            await until(lambda: taken)
            await taking.cancel()
            taken[0].requeue()
            serving.server.want({1: 1})
        await state_is(serving, JobState.FAILED)
        await serving.settled()
        assert not serving.worker.jobs
    assert (await record_of(serving)).status == 502


class AwayJobs(EmbeddedJobs):
    """Begins nothing while the store is away."""

    away = True

    async def begin(self, run: Run) -> Begun:
        if self.away:
            raise StoreUnavailable("it is away")
        return await super().begin(run)


async def test_while_the_store_is_away_jobs_go_back_and_then_run() -> None:
    store = EmbeddedStore("tests")
    store.jobs = jobs = AwayJobs(store.jobs._keys, store.jobs._values, store.jobs._post, store.jobs._now_ms)
    async with Serving(store=store, tunes=True) as serving:
        await serving.send_job(a_job())
        await asyncio.sleep(0.3)
        assert not serving.worker.jobs
        jobs.away = False
        serving.end(await begun_by(serving), Result())
        await serving.settled()
    assert len((await record_of(serving)).attempts) == 1


async def test_a_direct_publisher_needs_no_header_and_gets_a_record() -> None:
    async with Serving() as serving:
        await serving.send_job(request(priority=3))
        job = await begun_by(serving)
        record = await record_of(serving, "b/order-17")
        assert (record.facts.backend, record.facts.priority) == ("b", 3) and record.facts.created_ms
        serving.end(job, Result(body=b"done"))
        await serving.settled()
    assert (await record_of(serving, "b/order-17")).state is JobState.SUCCEEDED


async def test_a_message_without_an_id_runs_and_leaves_no_record() -> None:
    async with Serving() as serving:
        await serving.send_job(request(id=""))
        serving.end(await begun_by(serving), Result())
        await serving.settled()
        assert list(await serving.store.jobs.list()) == []


class LaterQueue(EmbeddedQueue):
    """Notes what is to run later, and may refuse it."""

    def __init__(self) -> None:
        super().__init__()
        self.later_ones: list[tuple[Envelope, float]] = []
        self.is_away = False
        self.refused = 0

    def publish_later(self, backend: str, envelope: Envelope, delay_s: float, settled: Settled) -> None:
        if self.is_away:
            self.refused += 1
            return settled(BrokerUnavailable("it is away"))
        self.later_ones.append((envelope, delay_s))
        settled(None)


def fail(serving: Serving, job: KeptJob, error: str = "OSError") -> None:
    """As the worker does when the user's code has raised."""
    job.error_names = (error, "Exception")
    serving.end(job, Result(status=500, error=ErrorInfo(error, "no luck")))


async def test_a_job_to_be_tried_again_is_published_before_its_message_is_acked() -> None:
    queue = LaterQueue()
    async with Serving(queue, retry={"attempts": 3, "backoff_s": 5, "jitter": False}) as serving:
        await serving.send_job(a_job())
        fail(serving, await begun_by(serving))
        await serving.settled()
        ((again, delay_s),) = queue.later_ones
        assert delay_s == 5 and again.persistent and again.body == b"x"
        assert again.header.job is not None and again.header.job.tries == 1 and again.header.job.created_ms == 1000
        record = await record_of(serving)
        assert record.state is JobState.QUEUED and record.attempts[0].error == "OSError: no luck" and not record.has_result


async def test_a_job_whose_next_try_the_broker_does_not_take_runs_again_at_once() -> None:
    queue = LaterQueue()
    queue.is_away = True
    async with Serving(queue, tunes=True, retry={"attempts": 3, "on": ["OSError"]}) as serving:
        await serving.send_job(a_job())
        fail(serving, await begun_by(serving))
        await until(lambda: queue.refused)
        queue.is_away = False
        job = await begun_by(serving)
        assert job.envelope.attempt == 2
        fail(serving, job)
        await serving.settled()
    assert [envelope.header.job and envelope.header.job.tries for envelope, _ in queue.later_ones] == [1]


class AwayTries(EmbeddedJobs):
    """Notes no next try while the store is away."""

    away = True
    asked = 0

    async def try_again(self, id: str, token: bytes, attempt: Attempt, facts: JobFacts) -> bool:
        self.asked += 1
        if self.away:
            raise StoreUnavailable("it is away")
        return await super().try_again(id, token, attempt, facts)


async def test_a_failed_job_that_went_back_meanwhile_is_not_published_a_second_time() -> None:
    """The message that went back to the queue is its next try."""
    queue, store = LaterQueue(), EmbeddedStore("tests")
    store.jobs = jobs = AwayTries(store.jobs._keys, store.jobs._values, store.jobs._post, store.jobs._now_ms)
    async with Serving(queue, store, retry={"attempts": 3, "jitter": False}) as serving:
        await serving.send_job(a_job())
        fail(serving, await begun_by(serving))
        await until(lambda: jobs.asked)
        assert not serving.server._settlement.give_back_unstored(), "as a drain does"
        await takes_nothing_more(serving)
        jobs.away = False
        await until(lambda: serving.server._settlement.give_back_unstored())
    record = await record_of(serving)
    assert record.state is JobState.QUEUED and record.attempts[0].error == "OSError: no luck"
    assert not queue.later_ones


async def test_the_last_failure_is_the_result_and_the_message_a_dead_letter_with_its_history() -> None:
    async with Serving(LaterQueue(), retry={"attempts": 2, "on": ["OSError"]}) as serving:
        earlier = Run(MINTED, b"1", "b#9", facts=job_facts(), now_ms=2000)
        await serving.store.jobs.begin(earlier)
        await serving.store.jobs.try_again(MINTED, b"1", Attempt(1, ended_ms=2500, error="OSError: at first", again_ms=2600), job_facts())
        await serving.send_job(msgspec.structs.replace(a_job(), header=Header(origin="handle", job=JobHead(created_ms=1000, tries=1))))
        job = await begun_by(serving)
        assert job.envelope.attempt == 2
        fail(serving, job)
        await serving.settled()
        async with serving.queue.dead_letters("b") as letters:
            (letter,) = [letter async for letter in letters]
        assert "failed 2 times" in letter.death.reason
        assert [run.ended for run in letter.death.attempts] == ["OSError: at first", "OSError: no luck"]
        record = await record_of(serving)
        assert record.state is JobState.FAILED and record.has_result


async def test_who_waits_at_a_queue_for_the_reply_gets_the_first_failure() -> None:
    queue = LaterQueue()
    async with Serving(queue, retry={"on": ["OSError"]}) as serving:
        await serving.send_job(request(reply_to="caller"))
        fail(serving, await begun_by(serving))
        await serving.settled()
    assert queue.later_ones == [] and (await record_of(serving, "b/order-17")).state is JobState.FAILED


async def test_a_job_that_never_ran_in_its_time_has_expired_and_one_that_did_was_still_running() -> None:
    async with Serving(job_timeout_s=7) as serving:
        for started, state, words in ((0.0, JobState.EXPIRED, "still waited"), (1.0, JobState.FAILED, "still running after 7 s")):
            sent = msgspec.structs.replace(a_job(), id=f"{started:032.0f}")
            await serving.send_job(sent)
            job = await begun_by(serving)
            job.started, job.deadline = started, time.monotonic()
            serving.worker.jobs.remove(job)
            serving.server.on_done(job, job.unwanted_result)
            await serving.settled()
            assert (await record_of(serving, sent.id)).state is state
            raw = await serving.store.get(KEYS.future(sent.id))
            assert raw is not None and words in str(Result.from_bytes(raw).error)


async def test_the_end_of_a_backend_ends_its_jobs() -> None:
    async with Serving(graceful_shutdown_timeout_s=0, max_concurrent_queries=1, job_slots=2) as serving:
        await serving.send_job(a_job())
        await serving.send_job(msgspec.structs.replace(a_job(), id="0" * 32))
        await until(lambda: serving.server.running == 2)
        await begun_by(serving)
        serving.server.will_end("backend 'b' was deleted", keeps_queue=False, at_once=True)
        await serving.server.drain(0)
        await serving.settled()
        assert [(record.state, record.status) for record in await serving.store.jobs.list()] == [(JobState.FAILED, 503)] * 2


async def test_the_end_of_an_instance_that_keeps_its_queues_keeps_its_jobs() -> None:
    async with Serving(graceful_shutdown_timeout_s=0) as serving:
        await serving.send_job(a_job())
        (await begun_by(serving)).started = 1.0
        serving.server.will_end("the instance was shut down", keeps_queue=True, at_once=True)
        await serving.server.drain(0)
        assert await serving.queue.count_jobs("b", 1) == 1
        assert not (await record_of(serving)).has_result


async def test_a_result_is_kept_for_as_long_as_the_sender_says() -> None:
    async with Serving(result_ttl_s=100) as serving:
        await serving.send_job(a_job())
        assert serving.server._settlement._job_ends.result_ttl_ms(a_job()) == 100_000
        asked = msgspec.structs.replace(a_job(), header=Header(origin="handle", job=JobHead(result_ttl_s=7)))
        assert serving.server._settlement._job_ends.result_ttl_ms(asked) == 7_000


async def test_a_replica_that_may_not_take_jobs_takes_requests() -> None:
    class WithoutJobs(EmbeddedQueue):
        async def consume(self, *arguments: Any, jobs: bool = False, **named: Any) -> Any:
            if jobs:
                raise BrokerUnavailable("ACCESS_REFUSED")
            return await super().consume(*arguments, jobs=jobs, **named)

    async with Serving(WithoutJobs()) as serving:
        await serving.send(request())
        serving.end(await serving.taken(), Result())
        await serving.settled()
