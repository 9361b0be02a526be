"""Jobs on their way: accepted once the broker has them, recorded, cancelled, expired, and sent once more."""

import asyncio

import pytest

from mqserve.broker.calls.job_sending import JobSender, JobTerms
from mqserve.broker.calls.pending import PendingResults
from mqserve.broker.calls.sending import INLINE_BODY_BYTES, MAX_BODY_BYTES, REPUBLISH_EVERY_S
from mqserve.broker.envelope import Envelope, RequestHead, mint_id
from mqserve.broker.errors import (
    BadEnvelope,
    BadSignature,
    BrokerUnavailable,
    JobGoesOn,
    NotRouted,
    Overloaded,
    ResultGone,
    StoreUnavailable,
    TooLarge,
    UnknownJob,
)
from mqserve.broker.job_store import OnDone
from mqserve.broker.jobs import JOB_RESULT_TTL_S, JobEnd, JobFacts, JobState, Run
from mqserve.broker.later import DueJob
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.overload import HeldBytes
from mqserve.broker.queue import Queue, Settled
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from mqserve.broker.values.codecs import PICKLE, decode_value, encode_value
from mqserve.broker.values.signing import SealScope, Signer
from tests.broker.keeping_jobs import FACTS, begun, ended, state_of
from tests.broker.traffic import BUDGET_S, Hands, until

pytestmark = pytest.mark.anyio

META = RequestHead(endpoint="e", path="/a", headers=((b"x", b"y"),))


@pytest.fixture
async def hands(queue: Queue) -> Hands:
    """A consumer of the backend's jobs, which settles none."""
    return await consumed(queue)


@pytest.fixture
def sender(queue: Queue, store: Store, keys: StoreKeys, signer: Signer) -> JobSender:
    return JobSender(queue, store, keys, HeldBytes(), signer)


async def consumed(queue: Queue) -> Hands:
    hands = Hands()
    await queue.declare("b", 1, None)
    await queue.consume("b", 1, 100, hands, jobs=True)
    return hands


async def submitted(sender: JobSender, id: str = "", body: bytes = b"body", terms: JobTerms | None = None, backend: str = "b") -> str:
    id = id or mint_id()
    async with asyncio.timeout(BUDGET_S):
        await sender.submit(id, backend, body, "text/plain", META, origin="http", terms=terms or JobTerms())
    return id


async def test_a_job_is_accepted_with_its_message_and_its_record(sender: JobSender, store: Store, hands: Hands) -> None:
    terms = JobTerms(expires_ms=2**41, result_ttl_s=60, priority=3, tag="t", retry_of="another")
    id = await submitted(sender, terms=terms)
    record = await store.jobs.read(id)
    await hands.hold(1)
    envelope = hands.held[0].envelope()
    assert record is not None and record.state is JobState.QUEUED
    assert record.facts == JobFacts("b", "e", record.facts.created_ms, 2**41, 0, 3, "t", "another")
    assert (envelope.id, envelope.body, envelope.content_type, envelope.priority) == (id, b"body", "text/plain", 3)
    assert envelope.header.meta == META and envelope.header.deadline == 2**41 and envelope.header.inbox == ""
    head = envelope.header.job
    assert head is not None
    assert (head.created_ms, head.result_ttl_s, head.tag, head.retry_of) == (record.facts.created_ms, 60, "t", "another")
    assert sender.held.held == 0


async def test_many_jobs_of_one_turn_are_all_accepted(sender: JobSender, store: Store, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    ids = await asyncio.gather(*(submitted(sender) for _ in range(300)))
    assert {await state_of(store, id) for id in ids} == {"queued"}
    assert await queue.count_jobs("b", 1) == 300


async def test_a_large_body_travels_by_reference_and_is_kept_as_long_as_the_job(
    sender: JobSender, store: Store, keys: StoreKeys, hands: Hands
) -> None:
    body = b"x" * (INLINE_BODY_BYTES + 1)
    id = await submitted(sender, body=body)
    await hands.hold(1)
    envelope = hands.held[0].envelope()
    assert envelope.body == b"" and envelope.header.ref == keys.body(id)
    assert await store.get_large(keys.body(id)) == body
    assert sender.held.held == 0


async def test_a_job_waits_for_its_time(keys: StoreKeys, signer: Signer) -> None:
    queue, store = EmbeddedQueue(), EmbeddedStore()
    sender, hands, due = JobSender(queue, store, keys, HeldBytes(), signer), await consumed(queue), list[DueJob]()
    await queue.later.consume(1, due.append)  # as the leading controller does
    soon = await submitted(sender, terms=JobTerms(not_before_ms=store.now_ms() + 300))
    at_once = await submitted(sender, terms=JobTerms(not_before_ms=store.now_ms() - 300))
    await hands.hold(1)
    assert hands.held[0].envelope().id == at_once
    record = await store.jobs.read(soon)
    assert record is not None and record.facts.not_before_ms > record.facts.created_ms
    await until(lambda: due)
    assert due[0].envelope().id == soon and store.now_ms() >= record.facts.not_before_ms


# What is refused.


async def test_what_cannot_be_accepted_is_said(sender: JobSender, store: Store, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    with pytest.raises(NotRouted):
        await submitted(sender, "f", backend="unknown")
    with pytest.raises(TooLarge):
        await submitted(sender, "f", b"x" * (MAX_BODY_BYTES + 1))
    with pytest.raises(StoreUnavailable, match="nearly full"):
        await sender.submit("f", "b", b"", "text/plain", META, origin="http", refusal="the store is nearly full")
    sender.held.take(128 * 1024 * 1024)
    with pytest.raises(Overloaded):
        await submitted(sender, "f")
    sender.held.give(128 * 1024 * 1024)
    assert await store.jobs.read("f") is None and sender.held.held == 0


async def test_a_head_that_no_broker_could_carry_is_refused(sender: JobSender, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    with pytest.raises(TooLarge):
        await sender.submit("f", "b", b"", "text/plain", RequestHead(headers=((b"h", b"x" * 200_000),)), origin="http")
    assert sender.held.held == 0


async def test_the_body_of_a_job_that_is_refused_does_not_stay(sender: JobSender, store: Store, keys: StoreKeys, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    with pytest.raises(NotRouted):
        await submitted(sender, "f", b"x" * (INLINE_BODY_BYTES + 1), backend="unknown")

    async def is_gone() -> bool:
        return await store.get(keys.body("f")) is None

    await until(is_gone)


class QueueThatIsAway(EmbeddedQueue):
    """For the first so many publishes."""

    def __init__(self, for_publishes: int, *, maybe_sent: bool) -> None:
        super().__init__()
        self.refusals = [BrokerUnavailable("away", maybe_sent=maybe_sent) for _ in range(for_publishes)]

    def publish_job(self, backend: str, envelope: Envelope, settled: Settled) -> None:
        if self.refusals:
            return settled(self.refusals.pop())
        super().publish_job(backend, envelope, settled)


@pytest.mark.parametrize("maybe_sent", [False, True])
async def test_a_job_is_published_again_when_the_broker_was_away(maybe_sent: bool, keys: StoreKeys, signer: Signer) -> None:
    queue = QueueThatIsAway(2, maybe_sent=maybe_sent)
    hands = await consumed(queue)
    await submitted(JobSender(queue, EmbeddedStore(), keys, HeldBytes(), signer))
    await hands.hold(1)
    assert hands.held[0].envelope().header.again is maybe_sent


async def test_a_job_that_may_run_once_only_is_not_published_again_if_the_broker_may_have_it(keys: StoreKeys, signer: Signer) -> None:
    queue, store = QueueThatIsAway(1, maybe_sent=True), EmbeddedStore()
    with pytest.raises(BrokerUnavailable):
        await submitted(JobSender(queue, store, keys, HeldBytes(), signer), "f", terms=JobTerms(once=True))
    assert await store.jobs.read("f") is None


async def test_a_job_fails_when_the_broker_stays_away(keys: StoreKeys, signer: Signer) -> None:
    sender = JobSender(QueueThatIsAway(1000, maybe_sent=False), EmbeddedStore(), keys, HeldBytes(), signer)
    with pytest.raises(BrokerUnavailable):
        await submitted(sender)
    assert sender.held.held == 0


async def test_a_delayed_job_waits_a_moment_for_the_queue_of_those_that_wait(queue: Queue, store: Store, sender: JobSender) -> None:
    """The leader declares it behind those of the first backends."""
    await queue.declare("b", 1, None)
    task = asyncio.create_task(submitted(sender, terms=JobTerms(not_before_ms=store.now_ms() + 60_000)))
    await asyncio.sleep(0.5)  # it is refused meanwhile, once or more
    await queue.later.declare()
    record = await store.jobs.read(await task)
    assert record is not None and record.state is JobState.QUEUED


async def test_a_job_whose_record_cannot_be_written_is_accepted_all_the_same(
    keys: StoreKeys, signer: Signer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its replica writes the record."""
    queue, store = EmbeddedQueue(), EmbeddedStore()
    monkeypatch.setattr(store.jobs, "add_then", lambda id, facts, on_done, message: on_done(StoreUnavailable("away")))
    hands = await consumed(queue)
    await submitted(JobSender(queue, store, keys, HeldBytes(), signer))
    await hands.hold(1)
    assert "accepted without a record" in caplog.text


async def test_a_caller_who_leaves_does_not_keep_an_accepted_job_from_its_record(keys: StoreKeys, signer: Signer) -> None:
    class SlowQueue(EmbeddedQueue):
        settled: Settled

        def publish_job(self, backend: str, envelope: Envelope, settled: Settled) -> None:
            self.settled = settled

    queue, store = SlowQueue(), EmbeddedStore()
    sender = JobSender(queue, store, keys, HeldBytes(), signer)
    leaving = asyncio.create_task(submitted(sender, "f"))
    await until(lambda: hasattr(queue, "settled"))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    queue.settled(None)
    assert await state_of(store) == "queued" and sender.held.held == 0


async def test_a_caller_who_leaves_while_the_broker_is_away_leaves_nothing_behind(keys: StoreKeys, signer: Signer) -> None:
    queue, store = QueueThatIsAway(1, maybe_sent=False), EmbeddedStore()
    sender, hands = JobSender(queue, store, keys, HeldBytes(), signer), await consumed(queue)
    leaving = asyncio.create_task(submitted(sender, "f", b"x" * (INLINE_BODY_BYTES + 1)))
    await until(lambda: not queue.refusals)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.sleep(3 * REPUBLISH_EVERY_S)
    assert not hands.held and await store.get(keys.body("f")) is None and sender.held.held == 0


# Ends that a sender writes.


async def test_a_job_is_cancelled_once_and_whoever_waits_is_told(sender: JobSender, store: Store, keys: StoreKeys, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    heard: list[bytes] = []
    listening = asyncio.create_task(store.read_log(keys.cancelled, heard.extend))
    pending = PendingResults(store, keys, "p")
    reading = asyncio.create_task(pending.run())
    id = await submitted(sender)
    wait = asyncio.create_task(pending.job_result(id, BUDGET_S))
    await until(lambda: id in pending.jobs)
    assert await sender.cancel(id) and not await sender.cancel(id)
    assert (await wait).status == 499
    assert await state_of(store, id) == "cancelled"
    await until(lambda: any(id.encode() in entry for entry in heard))
    done = await submitted(sender)
    await ended(store, done)
    assert not await sender.cancel(done)
    with pytest.raises(UnknownJob):
        await sender.cancel("unknown")
    for task in (listening, reading):
        task.cancel()
    await asyncio.gather(listening, reading, return_exceptions=True)


def noted_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns for how many ms each end that is recorded from now on is kept."""
    kept_ms: list[int] = []
    end_then = store.jobs.end_then

    def noting(end: JobEnd, on_done: OnDone) -> None:
        kept_ms.append(end.result_ttl_ms)
        end_then(end, on_done)

    monkeypatch.setattr(store.jobs, "end_then", noting)
    return kept_ms


async def test_the_end_of_a_job_that_waits_is_kept_until_its_message_has_come(
    sender: JobSender, store: Store, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of a delayed job cannot be taken back: a replica that finds no end would run it after all."""
    kept_ms = noted_ends(store, monkeypatch)
    await queue.declare("b", 1, None)
    await queue.later.declare()
    month_ms = 30 * 24 * 3600 * 1000
    assert await sender.cancel(await submitted(sender, terms=JobTerms(not_before_ms=store.now_ms() + month_ms)))
    running = await submitted(sender)
    await begun(store, id=running)
    assert await sender.cancel(running)
    assert kept_ms[0] > month_ms > kept_ms[1]


async def test_the_end_of_a_job_that_runs_is_kept_as_long_as_its_replica_would_keep_its_result(
    sender: JobSender, store: Store, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_ms = noted_ends(store, monkeypatch)
    await queue.declare("b", 1, None)
    for kept_s in (3600, 0, 1):
        id = await submitted(sender)
        await store.jobs.begin(Run(id, b"run", "r", FACTS, now_ms=2000, result_ttl_s=kept_s))
        assert await sender.cancel(id)
    assert kept_ms == [3_600_000, JOB_RESULT_TTL_S * 1000, 600_000], "until its message cannot come again, at least"


async def test_a_job_that_was_not_begun_in_time_has_expired(sender: JobSender, store: Store, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    late = await submitted(sender, terms=JobTerms(expires_ms=store.now_ms() - 10_000))
    record = await sender.look(late)
    assert record is not None and (record.state, record.status, record.has_result) == (JobState.EXPIRED, 504, True)
    just_now = await submitted(sender, terms=JobTerms(expires_ms=store.now_ms() - 100))
    record = await sender.look(just_now)
    assert record is not None and record.state is JobState.QUEUED, "a replica may just begin it"
    assert await sender.look("unknown") is None


async def test_a_job_that_has_begun_does_not_expire(sender: JobSender, store: Store, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    id = await submitted(sender, terms=JobTerms(expires_ms=store.now_ms() - 10_000))
    await begun(store, id=id)
    await store.jobs.give_back(id, b"run", FACTS)
    await begun(store, b"another", id)
    record = await sender.look(id)
    assert record is not None and record.state is JobState.RUNNING


# Once more.


async def test_a_job_that_has_ended_is_sent_once_more_as_another(sender: JobSender, store: Store, hands: Hands) -> None:
    terms = JobTerms(expires_ms=store.now_ms() + 60_000, result_ttl_s=60, priority=2, tag="t")
    id, new = await submitted(sender, terms=terms), mint_id()
    with pytest.raises(JobGoesOn, match="is queued"):
        await sender.retry(id, new)
    await ended(store, id, state=JobState.FAILED)
    facts = await sender.retry(id, new)
    await hands.hold(2)
    first, second = (delivery.envelope() for delivery in hands.held)
    assert (second.id, second.body, second.content_type, second.priority) == (new, first.body, first.content_type, 2)
    assert second.header.meta == META and second.header.job is not None
    assert (second.header.job.retry_of, second.header.job.result_ttl_s, second.header.job.tag) == (id, 60, "t")
    assert abs(facts.expires_ms - facts.created_ms - 60_000) < 1000 and facts.retry_of == id
    assert await state_of(store, new) == "queued" and await state_of(store, id) == "failed"


async def test_a_sealed_body_is_sealed_for_the_new_job(sender: JobSender, store: Store, hands: Hands, signer: Signer) -> None:
    id, new = mint_id(), mint_id()
    content_type, body = encode_value({1, 2}, signer, SealScope("request", "b", id))
    await sender.submit(id, "b", body, content_type, META, origin="handle")
    await ended(store, id)
    await sender.retry(id, new)
    await hands.hold(2)
    again = hands.held[1].envelope()
    assert again.content_type == PICKLE and again.header.origin == "handle"
    assert decode_value(again.body, again.content_type, signer, SealScope("request", "b", new)) == {1, 2}


async def test_a_large_body_is_sent_once_more(sender: JobSender, store: Store, keys: StoreKeys, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    body, new = b"x" * (INLINE_BODY_BYTES + 1), mint_id()
    id = await submitted(sender, body=body)
    await ended(store, id, state=JobState.FAILED)
    await sender.retry(id, new)
    assert await store.get_large(keys.body(new)) == body
    await store.delete(keys.body(id))
    with pytest.raises(ResultGone, match="body of job"):
        await sender.retry(id, mint_id())


async def test_large_bodies_are_read_one_at_a_time(sender: JobSender, store: Store, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows how large they are before that."""
    await queue.declare("b", 1, None)
    ids = [await submitted(sender, body=b"x" * (INLINE_BODY_BYTES + 1)) for _ in range(5)]
    for id in ids:
        await ended(store, id, state=JobState.FAILED)
    get_large, uncounted, most = store.get_large, 0, 0

    async def reading(key: str) -> bytes | None:
        nonlocal uncounted, most
        uncounted += 1
        most = max(most, uncounted)
        found = await get_large(key)
        await asyncio.sleep(0.01)
        uncounted -= 1
        return found

    monkeypatch.setattr(store, "get_large", reading)
    await asyncio.gather(*(sender.retry(id, mint_id()) for id in ids))
    assert most == 1 and sender.held.held == 0


async def test_a_job_whose_message_is_not_kept_is_not_sent_once_more(sender: JobSender, store: Store) -> None:
    with pytest.raises(UnknownJob):
        await sender.retry("unknown", mint_id())
    await begun(store)
    await ended(store)
    with pytest.raises(ResultGone, match="send it again"):
        await sender.retry("f", mint_id())


async def test_a_message_that_is_kept_a_moment_after_the_end_of_its_job_is_sent_once_more(
    sender: JobSender, store: Store, keys: StoreKeys, hands: Hands
) -> None:
    """RabbitMQ delivers a message before it confirms it, so a short run ends before its sender has written the record."""
    id = await submitted(sender)
    kept = await store.jobs.message(id)
    assert kept is not None
    await store.delete(keys.message(id))
    await ended(store, id, ended_ms=store.now_ms())
    retried = asyncio.create_task(sender.retry(id, mint_id()))
    await asyncio.sleep(0.05)  # so that it finds none at first
    await store.set(keys.message(id), kept)
    assert (await retried).retry_of == id


async def test_a_message_that_this_instance_did_not_keep_is_not_sent(
    sender: JobSender, store: Store, keys: StoreKeys, queue: Queue
) -> None:
    """A retry seals what it sends, and must not vouch for what anybody wrote into the store."""
    await queue.declare("b", 1, None)
    id = await submitted(sender)
    await ended(store, id)
    kept = await store.jobs.message(id)
    assert kept is not None
    stranger = JobSender(queue, store, keys, HeldBytes(), Signer([], "n"))
    with pytest.raises(BadEnvelope):
        await stranger.retry(id, mint_id())
    other = await submitted(sender)
    for forged in (b"", b"\xc1", kept, kept[:-1] + b"?"):
        await store.delete(keys.message(other))
        await store.set(keys.message(other), forged)
        await ended(store, other)
        with pytest.raises(BadSignature):
            await sender.retry(other, mint_id())


async def test_without_a_key_messages_are_kept_as_they_are(store: Store, keys: StoreKeys, queue: Queue) -> None:
    await queue.declare("b", 1, None)
    sender = JobSender(queue, store, keys, HeldBytes(), Signer([], "n"))
    id = await submitted(sender)
    await ended(store, id)
    assert (await sender.retry(id, mint_id())).retry_of == id
    await store.set(keys.message(id), b"\xc1")
    with pytest.raises(BadEnvelope, match="does not parse"):
        await sender.retry(id, mint_id())
