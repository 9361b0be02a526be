"""What only jobs on Redis go through: lost answers, restarts, foreign keys, memory, and how many calls many of them cost."""

import asyncio
import time

import pytest

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.jobs import (
    LEASE_MS,
    MESSAGE_TTL_S,
    UNENDED_TTL_S,
    WAIT_TTL_S,
    Attempt,
    Done,
    EndNote,
    EventKind,
    JobEvent,
    JobFacts,
    JobState,
    Leased,
    event_entry,
)
from mqserve.broker.redis import job_script
from mqserve.broker.redis.batch_writer import FLUSH_BATCH, FLUSH_BYTES
from mqserve.broker.redis.job_script import JobSteps, Step
from mqserve.broker.redis.store import open_redis
from mqserve.broker.results import entry_of
from mqserve.broker.store import StoreClosed
from mqserve.broker.store_keys import StoreKeys
from tests.broker.keeping_jobs import FACTS, added, begun, end_of, ended, state_of
from tests.broker.test_redis_streams import kill_connections
from tests.broker.test_store_contract import reading
from tests.broker.traffic import BUDGET_S, until
from tests.faults.wire import Wire
from tests.instances import NOISE_S
from tests.servers import PrivateRedis

pytestmark = pytest.mark.anyio


# How many calls.


async def test_all_steps_of_a_turn_go_in_few_calls(store_server: PrivateRedis, namespace: str) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store)  # which opens the connection, and says the script
        store_server.say("CONFIG", "RESETSTAT")
        names = [f"job-{number}" for number in range(1000)]
        await asyncio.gather(*(added(store, name) for name in names))
        await asyncio.gather(*(begun(store, b"run", name) for name in names))
        await asyncio.gather(*(ended(store, name) for name in names))
        calls = store_server.say("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
    assert 24 <= calls < 100


async def test_a_batch_of_large_messages_is_divided(store_url: str, namespace: str) -> None:
    message = b"x" * (FLUSH_BYTES // 3)
    async with open_redis(store_url, namespace) as store:
        await asyncio.gather(*(added(store, str(number), message=message) for number in range(10)))
        for number in range(10):
            assert await store.jobs.message(str(number)) == message
            await ended(store, str(number), result_ttl_ms=1)


# How long what is kept.


async def test_each_key_expires_in_its_time(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    def ttl_s(key: str) -> float:
        return round(float(store_server.say("PTTL", key)) / 1000)

    async with open_redis(store_server.url, namespace) as store:
        await added(store, message=b"message")
        await store.set(keys.body("f"), b"body", ttl_ms=UNENDED_TTL_S * 1000)
        await store.jobs.wait("f", keys.inbox("p"))
        await store.jobs.follow("f", keys.inbox("p"))
        unended = (keys.job("f"), keys.message("f"), keys.events("f"), keys.waiting("b"))
        assert {ttl_s(key) for key in unended} == {UNENDED_TTL_S}
        assert ttl_s(keys.waiters("f")) == ttl_s(keys.followers("f")) == WAIT_TTL_S
        await begun(store)
        assert ttl_s(keys.lease("f")) == LEASE_MS / 1000
        await ended(store, result_ttl_ms=3_000_000, token=b"run")
        assert [ttl_s(key) for key in (keys.future("f"), keys.job("f"), keys.events("f"))] == [3000, 6000, 3000]
        assert ttl_s(keys.message("f")) == ttl_s(keys.body("f")) == MESSAGE_TTL_S
        assert store_server.say("EXISTS", keys.lease("f"), keys.waiting("b")) == 0
        await added(store, "g", message=b"message")
        await ended(store, "g", result_ttl_ms=3_000_000, state=JobState.FAILED)
        assert ttl_s(keys.message("g")) == 3000


async def test_ids_whose_records_have_expired_leave_the_list(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        for number in range(1000):
            await added(store, str(number), JobFacts("b", created_ms=number + 1))
            await begun(store, id=str(number))
            await ended(store, str(number), result_ttl_ms=1)
        assert store_server.say("ZCARD", keys.jobs) < 500
        assert store_server.say("EXISTS", keys.waiting("b"), keys.ends) == 0


async def test_each_end_from_which_something_follows_is_in_the_outbox_once(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store)
        for _ in range(3):
            await ended(store, callback="https://hooks.example/")
        await ended(store, result=b"another", callback="https://hooks.example/")
        await ended(store, "g", state=JobState.EXPIRED)
        found = [EndNote.from_bytes(fields[b"end"]) for _, fields in store_server.say("XRANGE", keys.ends, "-", "+")]
    assert found == [EndNote("f", JobState.SUCCEEDED, found[0].ended_ms, callback="https://hooks.example/")]


# The connection ends, or leads nowhere.


async def test_steps_whose_answers_were_lost_are_taken_once(store_wire: Wire, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_wire.url, namespace) as store, reading(store, keys.inbox("p")) as notes:
        await added(store, "another")
        await store.jobs.wait("f", keys.inbox("p"))
        for step in (
            lambda: added(store),
            lambda: begun(store),
            lambda: store.jobs.try_again("f", b"run", Attempt(1, ended_ms=5, error="no"), FACTS),
            lambda: begun(store, b"second"),
            lambda: store.jobs.give_back("f", b"second", FACTS),
            lambda: begun(store, b"third"),
            lambda: ended(store, token=b"third"),
        ):
            store_wire.hold_answers()
            taken = asyncio.create_task(step())
            await asyncio.sleep(0.1)
            store_wire.reset()
            store_wire.mend()
            outcome = await taken
            assert outcome in (None, True, Leased(1), Leased(2))
        record = await store.jobs.read("f")
        assert record is not None and record.state is JobState.SUCCEEDED and [attempt.number for attempt in record.attempts] == [1, 2]
        states = [event.state for _, event in await store.jobs.events("f")]
        assert states == ["queued", "running", "queued", "running", "queued", "running", "succeeded"]
        await until(lambda: b"note of result" in notes)


async def test_events_whose_answers_were_lost_are_added_once(store_wire: Wire, namespace: str) -> None:
    async with open_redis(store_wire.url, namespace) as store:
        for run in (b"run", b"second"):  # the numbers begin anew with each run
            await begun(store, run)
            for word in ("one", "two"):
                store_wire.hold_answers()
                store.jobs.note("f", run, JobEvent(EventKind.LOG, text=word))
                await asyncio.sleep(0.1)
                store_wire.reset()
                store_wire.mend()
            await store.jobs.give_back("f", run, FACTS)
        words = [event.text or event.state for _, event in await store.jobs.events("f")]
    assert words == 2 * ["running", "one", "two", "queued"]


async def test_no_step_is_taken_for_callers_who_do_not_wait_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_script, "_ANSWER_S", 0.05)
    sent: list[Step] = []
    steps = JobSteps(lambda batch, on_taken: sent.extend(batch))  # which answers nothing
    async with asyncio.timeout(BUDGET_S):
        outcomes = await asyncio.gather(*(steps.take(Step("read", str(n), {})) for n in range(5_000)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
    steps._written(StoreUnavailable("no answer"))
    await until(lambda: not steps._buffer)
    assert len(sent) == FLUSH_BATCH, "what nobody waits for is not sent"


async def test_a_partition_without_a_fin_is_said_in_time(store_wire: Wire, namespace: str) -> None:
    async with open_redis(store_wire.url, namespace) as store:
        await added(store)
        store_wire.blackhole()
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await begun(store)
        with pytest.raises(StoreUnavailable):
            await store.jobs.read("f")
        assert 2 < time.monotonic() - started < 6 + NOISE_S and store.health.trouble
        store_wire.mend()
        store_wire.reset()

        async def is_back() -> bool:
            try:
                return await begun(store) == Leased(1)
            except StoreUnavailable:
                return False

        await until(is_back)


async def test_a_script_that_the_server_has_forgotten_is_said_again(store_server: PrivateRedis, namespace: str) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store)
        store_server.say("SCRIPT", "FLUSH")
        assert await begun(store) == Leased(1)


async def test_connections_that_are_killed_all_the_time_lose_no_step(store_server: PrivateRedis, namespace: str) -> None:
    async with open_redis(store_server.url, namespace) as store:

        async def live(name: str) -> None:
            for step in (lambda: added(store, name), lambda: begun(store, name.encode(), name), lambda: ended(store, name)):
                while True:
                    try:
                        await step()
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.01)

        lives = [asyncio.create_task(live(f"job-{number}")) for number in range(500)]
        for _ in range(20):
            kill_connections(store_server)
            await asyncio.sleep(0.01)
        await asyncio.gather(*lives)
        assert {await state_of(store, f"job-{number}") for number in range(500)} == {"succeeded"}
        record = await store.jobs.read("job-7")
        assert record is not None and len(record.attempts) == 1


async def test_a_store_that_is_closed_tells_who_waits(store_server: PrivateRedis, namespace: str) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store)
        store_server.freeze()
        outcomes: list[bool | Exception] = []
        store.jobs.end_then(end_of(), outcomes.append)
        store.jobs.end_then(end_of("g"), outcomes.append)
        closing = asyncio.create_task(store.close())
        await closing
        store_server.thaw()
    assert len(outcomes) == 2 and all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    store.jobs.end_then(end_of("h"), outcomes.append)
    assert isinstance(outcomes[-1], StoreClosed)


# The server comes back without its data.


async def test_a_run_goes_on_and_ends_on_a_server_that_lost_everything(store_server: PrivateRedis, namespace: str) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store)
        await begun(store)
        store_server.say("FLUSHALL")
        assert await store.jobs.renew("f", b"run")
        store.jobs.note("f", b"run", JobEvent(EventKind.LOG, 5))
        assert await store.jobs.read("f") is None
        assert await ended(store, token=b"run")
        assert await state_of(store) == "succeeded"
        assert await begun(store, b"another") == Done(b"result")


# What the server refuses.


async def test_a_full_store_refuses_steps_and_says_so(store_server: PrivateRedis, namespace: str) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store)
        store_server.limit_memory("1")
        with pytest.raises(StoreUnavailable, match="it is full"):
            await ended(store)
        assert "full" in store.health.refusal
        assert await state_of(store) == "queued"
        store_server.limit_memory()
        assert await ended(store)
        assert not store.health.refusal


@pytest.mark.parametrize("kind", ["job", "message", "lease", "events", "waiters", "followers", "future"])
async def test_a_key_of_another_type_is_replaced_and_the_job_lives_on(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys, kind: str
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store, "sound")
        command = ("HSET", getattr(keys, kind)("f"), "x", "y") if kind != "job" else ("SET", keys.job("f"), "x")
        store_server.say(*command)
        await asyncio.gather(added(store, message=b"message"), added(store, "too"))
        assert await begun(store) == Leased(1)
        await store.jobs.wait("f", keys.inbox("p"))
        await store.jobs.follow("f", keys.inbox("p"))
        await ended(store, token=b"run")
        assert await state_of(store) == "succeeded" and await state_of(store, "too") == "queued"
        assert store.health.noted or kind == "message"


async def test_an_inbox_of_another_type_keeps_no_end_from_being_recorded(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await store.jobs.wait("f", keys.inbox("odd"))
        store_server.say("SET", keys.inbox("odd"), "x")
        assert await ended(store)
        assert store_server.say("LRANGE", keys.inbox("odd"), "0", "-1") == [b"note of result"]


async def test_events_and_records_of_other_shapes_are_left_out(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await added(store)
        for entry in (b"\xc1", entry_of("f", b"result"), event_entry("f", 2, b"\xc1")):
            store_server.say("RPUSH", keys.events("f"), entry)
        assert [seq for seq, _ in await store.jobs.events("f")] == [1]
        store_server.say("HSET", keys.job("odd"), "facts", b"\xc1")
        store_server.say("ZADD", keys.jobs, "5", "odd", "6", "gone")
        assert [record.id for record in await store.jobs.list()] == ["f"]
        assert FACTS.backend == "b"
