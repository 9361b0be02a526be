"""Waiting for jobs and following them, in any process: both stores."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mqserve.broker.calls.job_events import JobFollower, JobFollowers
from mqserve.broker.calls.pending import PendingResults
from mqserve.broker.errors import BadEnvelope, ResultGone, StoreUnavailable
from mqserve.broker.job_store import NumberedEvent
from mqserve.broker.jobs import KEPT_EVENTS, EventKind, JobEvent, JobState
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.process.tasks import Tasks
from mqserve.broker.redis.store import open_redis
from mqserve.broker.results import EVENT_KIND, INLINE_BYTES, InboxEntry, Result, entry_of
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.keeping_jobs import added, begun, ended
from tests.broker.test_redis_streams import kill_connections
from tests.broker.traffic import BUDGET_S, until
from tests.servers import PrivateRedis

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def running(store: Store, keys: StoreKeys, name: str = "p") -> AsyncIterator[PendingResults]:
    pending = PendingResults(store, keys, name)
    reader = asyncio.create_task(pending.run())
    try:
        yield pending
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


@pytest.fixture
async def pending(store: Store, keys: StoreKeys) -> AsyncIterator[PendingResults]:
    async with running(store, keys) as pending:
        yield pending


async def succeeded(store: Store, id: str = "f", result: Result | None = None, **fields: Any) -> None:
    raw = (result or Result(body=b"done")).to_bytes()
    assert await ended(store, id, raw, note=entry_of(id, raw), **fields)


async def waited(wait: asyncio.Future[Result]) -> bytes:
    async with asyncio.timeout(BUDGET_S):
        return (await wait).body


async def test_who_waits_in_any_process_gets_the_result(store: Store, keys: StoreKeys, pending: PendingResults) -> None:
    await added(store)
    async with running(store, keys, "q") as other:
        waits = [asyncio.create_task(one.job_result("f", None)) for one in (pending, pending, other)]
        await until(lambda: "f" in pending.jobs and "f" in other.jobs)
        await succeeded(store)
        assert [await waited(wait) for wait in waits] == [b"done"] * 3
        assert "f" not in pending.jobs and "f" not in other.jobs


async def test_the_result_of_a_job_that_has_ended_is_there_at_once(store: Store, pending: PendingResults) -> None:
    await succeeded(store)
    assert (await pending.job_result("f", BUDGET_S)).body == b"done"


async def test_a_large_result_comes_whole(store: Store, keys: StoreKeys, pending: PendingResults) -> None:
    for name, result in (("f", Result(body=b"x" * (INLINE_BYTES + 1))), ("g", Result(ref=keys.result_body("g")))):
        await store.set(keys.result_body("g"), b"y" * 300_000)
        wait = asyncio.create_task(pending.job_result(name, None))
        await until(lambda name=name: name in pending.jobs)  # type: ignore[misc]
        await succeeded(store, name, result)
        assert len(await waited(wait)) in (INLINE_BYTES + 1, 300_000)
    assert await store.get(keys.result_body("g")), "others may read it, too"


async def test_a_job_that_is_not_known_yet_can_be_waited_for(store: Store, pending: PendingResults) -> None:
    wait = asyncio.create_task(pending.job_result("f", None))
    await until(lambda: "f" in pending.jobs)
    await begun(store)
    await succeeded(store)
    assert await waited(wait) == b"done"


async def test_a_wait_that_ends_leaves_the_others_and_the_job_alone(store: Store, pending: PendingResults) -> None:
    await added(store)
    patient = asyncio.create_task(pending.job_result("f", None))
    with pytest.raises(TimeoutError):
        await pending.job_result("f", 0.05)
    assert "f" in pending.jobs
    await succeeded(store)
    assert await waited(patient) == b"done"


async def test_a_cancelled_wait_leaves_nothing_behind(store: Store, pending: PendingResults) -> None:
    before = asyncio.all_tasks()
    wait = asyncio.create_task(pending.job_result("f", None))
    await until(lambda: "f" in pending.jobs)
    wait.cancel()
    await until(lambda: "f" not in pending.jobs)
    pending.jobs.register_again()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_a_result_that_is_not_kept_any_more_is_said(store: Store, pending: PendingResults, keys: StoreKeys) -> None:
    await succeeded(store)
    await store.delete(keys.future("f"))
    with pytest.raises(ResultGone, match="f has succeeded"):
        await pending.job_result("f", BUDGET_S)
    with pytest.raises(ResultGone):
        await pending.job_result("f", BUDGET_S)


async def test_a_word_that_was_lost_is_made_up_for_by_the_next_registration(store: Store, keys: StoreKeys, pending: PendingResults) -> None:
    """Of one that ended while nothing was registered for it, say, since the store had lost that."""
    wait, gone = (asyncio.create_task(pending.job_result(name, None)) for name in ("f", "g"))
    await until(lambda: {"f", "g"} <= set(pending.jobs))
    for name in ("f", "g"):
        raw = Result(body=b"done").to_bytes()
        await ended(store, name, raw, note=b"not a word")
    await store.delete(keys.future("g"))
    pending.jobs.register_again()
    assert await waited(wait) == b"done"
    with pytest.raises(ResultGone):
        await waited(gone)


async def test_registrations_are_renewed_before_they_lapse(store: Store, keys: StoreKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.broker.calls.job_waits._RENEW_EVERY_S", 0.05)
    registered: list[str] = []
    wait_for = store.jobs.wait

    async def wait(future_id: str, inbox: str) -> object:
        registered.append(future_id)
        return await wait_for(future_id, inbox)

    monkeypatch.setattr(store.jobs, "wait", wait)
    async with running(store, keys) as pending:
        waits = [asyncio.create_task(pending.job_result(f"job-{number}", None)) for number in range(700)]
        await until(lambda: len(registered) >= 2100)
        for name in ("job-0", "job-699"):
            await succeeded(store, name)
        assert await waited(waits[0]) == await waited(waits[-1]) == b"done"
        for task in waits:
            task.cancel()


async def test_a_store_that_takes_no_registration_is_said_at_once(namespace: str, keys: StoreKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EmbeddedStore(namespace)
    monkeypatch.setattr(store.jobs, "wait", away)
    async with running(store, keys) as pending:
        with pytest.raises(StoreUnavailable):
            await pending.job_result("f", None)
        assert "f" not in pending.jobs


async def test_a_renewal_that_fails_is_repeated(namespace: str, keys: StoreKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EmbeddedStore(namespace)
    sound = store.jobs.wait
    async with running(store, keys) as pending:
        wait = asyncio.create_task(pending.job_result("f", None))
        await until(lambda: "f" in pending.jobs)
        raw = Result(body=b"done").to_bytes()
        await ended(store, "f", raw, note=b"lost")
        monkeypatch.setattr(store.jobs, "wait", away)
        pending.jobs.register_again()
        await asyncio.sleep(0.05)
        monkeypatch.setattr(store.jobs, "wait", sound)
        assert await waited(wait) == b"done"


async def away(future_id: str, inbox: str) -> None:
    raise StoreUnavailable("away")


async def test_ten_thousand_waits_ask_for_nothing(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    def count() -> int:
        return int(store_server.say("INFO", "stats")["total_commands_processed"])

    async with open_redis(store_server.url, namespace) as store, running(store, keys) as pending:
        waits = [asyncio.create_task(pending.job_result(f"job-{number}", None)) for number in range(10_000)]
        await until(lambda: len(list(pending.jobs)) == 10_000)

        await until(lambda: store_server.say("EXISTS", keys.waiters("job-9999")))

        async def asks_for_nothing() -> bool:
            before = count()
            await asyncio.sleep(2)
            return count() - before < 100

        await until(asks_for_nothing, 30)
        await succeeded(store, "job-5000")
        assert await waited(waits[5000]) == b"done"
        for task in waits:
            task.cancel()


async def test_ends_reach_who_waits_though_connections_are_killed(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store, running(store, keys) as pending:
        names = [f"job-{number}" for number in range(200)]
        waits = [asyncio.create_task(pending.job_result(name, None)) for name in names]
        await until(lambda: store_server.say("EXISTS", *map(keys.waiters, names)) == 200)
        for name in names:
            if name.endswith("0"):
                kill_connections(store_server)
            while True:
                try:
                    await succeeded(store, name)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(30):
            assert {result.body for result in await asyncio.gather(*waits)} == {b"done"}


async def test_who_waits_or_follows_hears_of_the_end_though_the_store_came_back_empty(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with (
        open_redis(store_server.url, namespace) as store,
        open_redis(store_server.url, namespace) as replicas,
        running(store, keys) as pending,
    ):
        await added(store)
        await begun(replicas)
        wait, follower = asyncio.create_task(pending.job_result("f", None)), await pending.followers.follow("f")
        await until(lambda: store_server.say("EXISTS", keys.waiters("f")))
        await asyncio.to_thread(store_server.stop)
        await asyncio.to_thread(store_server.start)
        await until(lambda: store_server.say("EXISTS", keys.waiters("f"), keys.followers("f")) == 2)
        await succeeded(replicas, token=b"run")
        assert await waited(wait) == b"done"
        assert [text for _, text in await all_of(follower)] == ["queued", "running", "succeeded"]


# Following.


async def all_of(follower: JobFollower) -> list[tuple[int, str]]:
    async with asyncio.timeout(BUDGET_S):
        return [(seq, event.state or event.text) async for seq, event in follower]


async def test_who_follows_gets_what_was_and_what_comes_up_to_the_end(store: Store, pending: PendingResults) -> None:
    await added(store)
    await begun(store)
    follower, later = await pending.followers.follow("f"), await pending.followers.follow("f", 2)
    store.jobs.note("f", b"run", JobEvent(EventKind.LOG, text="one"))
    store.jobs.note("f", b"run", JobEvent(EventKind.LOG, text="two"))
    await succeeded(store)
    expected = [(1, "queued"), (2, "running"), (3, "one"), (4, "two"), (5, "succeeded")]
    assert (await all_of(follower), await all_of(later)) == (expected, expected[2:])
    assert await all_of(await pending.followers.follow("f", 3)) == expected[3:]


async def test_a_reader_with_a_time_of_its_own_takes_what_is_there(store: Store, pending: PendingResults) -> None:
    await added(store)
    follower = await pending.followers.follow("f")
    assert [seq for seq, _ in await follower.more()] == [1]
    assert await follower.more(0.05) == []
    await begun(store)
    assert [event.state for _, event in await follower.more(BUDGET_S)] == ["running"]
    await succeeded(store)
    assert [event.state for _, event in await follower.more()] == ["succeeded"] and follower.is_over
    assert await follower.more() == []
    pending.followers.leave(follower)


async def test_events_that_the_inbox_did_not_bring_are_read(store: Store, keys: StoreKeys, pending: PendingResults) -> None:
    await begun(store)
    follower = await pending.followers.follow("f")
    await store.delete(keys.followers("f"))
    forget_followers(store)
    for number in range(5):
        store.jobs.note("f", b"run", JobEvent(EventKind.LOG, text=str(number)))
    await store.jobs.read("f")
    await store.jobs.follow("f", pending.inbox)
    store.jobs.note("f", b"run", JobEvent(EventKind.LOG, text="5"))
    await succeeded(store)
    assert [text for _, text in await all_of(follower)] == ["running", "0", "1", "2", "3", "4", "5", "succeeded"]


async def test_all_that_comes_in_behind_one_gap_is_read_in_few_turns(keys: StoreKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    store, tasks, reads = EmbeddedStore(), Tasks(), list[int]()
    events = store.jobs.events

    async def slowly(future_id: str, after: int = 0) -> Sequence[NumberedEvent]:
        found = await events(future_id, after)
        reads.append(len(found))
        await asyncio.sleep(0.05)  # what comes in meanwhile is not among them
        return found

    followers = JobFollowers(store, keys.inbox("p"), tasks)
    await begun(store)
    follower = await followers.follow("f")
    monkeypatch.setattr(store.jobs, "events", slowly)
    for number in range(2, 202):
        store.jobs.note("f", b"run", JobEvent(EventKind.LOG, text=str(number)))
        if number > 2:  # the inbox has lost that one
            followers.hear(InboxEntry(1, "f", EVENT_KIND, number, JobEvent(EventKind.LOG, text=str(number)).to_bytes()))
        if number == 100:
            await until(lambda: reads)
    await until(lambda: follower.heard == 201)
    assert len(reads) == 2
    assert [seq for seq, _ in await follower.more()] == list(range(1, 202))
    followers.leave(follower)


def forget_followers(store: Store) -> None:
    if isinstance(store, EmbeddedStore):
        store.jobs._jobs.get("f").followers.clear()  # type: ignore[union-attr]


async def test_the_end_is_told_also_where_the_store_has_lost_the_events(store: Store, keys: StoreKeys, pending: PendingResults) -> None:
    await begun(store)
    await succeeded(store)
    await store.delete(keys.events("f"))
    assert (await all_of(await pending.followers.follow("f", 7)))[-1][1] == "succeeded"


async def test_one_who_follows_a_job_that_is_not_known_yet_hears_of_it(store: Store, pending: PendingResults) -> None:
    follower = await pending.followers.follow("f")
    await begun(store)
    await succeeded(store)
    assert [text for _, text in await all_of(follower)] == ["running", "succeeded"]


async def test_a_reader_that_takes_nothing_holds_no_more_than_is_kept_and_goes_on_with_that(store: Store, pending: PendingResults) -> None:
    await begun(store)
    follower = await pending.followers.follow("f")
    for number in range(5 * KEPT_EVENTS):
        store.jobs.note("f", b"run", JobEvent(EventKind.LOG, text=str(number)))
    await succeeded(store)
    await store.jobs.read("f")
    await asyncio.sleep(0.1)
    assert len(follower._events) <= KEPT_EVENTS
    texts = [text for _, text in await all_of(follower)]
    assert texts[:2] == ["running", "0"] and texts[-2:] == [str(5 * KEPT_EVENTS - 1), "succeeded"]
    assert len(texts) <= 2 * KEPT_EVENTS


async def test_one_that_stops_following_leaves_nothing(store: Store, pending: PendingResults) -> None:
    before = asyncio.all_tasks()
    one, other = await pending.followers.follow("f"), await pending.followers.follow("f")
    pending.followers.leave(one)
    await begun(store)
    assert [event.state for _, event in await other.more(BUDGET_S)] == ["running"]
    pending.followers.leave(other)
    pending.followers.leave(other)
    pending.followers.register_again()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_followers_end_when_the_process_stops_reading(store: Store, keys: StoreKeys) -> None:
    async with running(store, keys) as pending:
        follower = await pending.followers.follow("f")
        taking = asyncio.create_task(all_of(follower))
        await asyncio.sleep(0.01)
    assert await taking == []


async def test_one_cannot_follow_what_is_no_record(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    store_server.say("HSET", keys.job("f"), "state", "unheard of")
    async with open_redis(store_server.url, namespace) as store, running(store, keys) as pending:
        with pytest.raises(BadEnvelope):
            await pending.followers.follow("f")
        with pytest.raises(BadEnvelope):
            await pending.job_result("f", 5)
        assert "f" not in pending.jobs


@pytest.mark.parametrize("state", [state for state in JobState if state.is_final])
def test_a_follower_ends_behind_any_final_state_whatever_its_number(state: JobState) -> None:
    """A store that lost everything counts anew."""
    follower = JobFollower("f", 10, lambda: None)
    assert follower.take(NumberedEvent(3, JobEvent(EventKind.STATE, state="running")))
    assert not follower.is_over
    assert follower.take(NumberedEvent(4, JobEvent(EventKind.STATE, state=state)))
    assert follower.is_over
