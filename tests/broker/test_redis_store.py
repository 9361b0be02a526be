"""What only the store on Redis goes through: losses, freezes, restarts."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis

from mqserve.broker.calls.call import Ticket
from mqserve.broker.calls.pending import PendingResults
from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.overload import Pace
from mqserve.broker.redis.batch_writer import FLUSH_BYTES
from mqserve.broker.redis.hot_wire import HotWire
from mqserve.broker.redis.store import RedisStore, open_redis
from mqserve.broker.results import Result, entry_of
from mqserve.broker.store import Record, Store
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import until
from tests.faults.wire import Wire
from tests.instances import NOISE_S
from tests.ports import free_port
from tests.servers import PrivateRedis

pytestmark = pytest.mark.anyio


async def test_a_store_that_is_not_there_is_said_in_time_and_without_the_password(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqserve.broker.redis.store.CONNECT_BUDGET_S", 1.0)
    url = f"redis://user:hunter2@127.0.0.1:{free_port()}/0"
    begun = time.monotonic()
    with pytest.raises(StoreUnavailable) as refusal:
        async with open_redis(url, namespace):
            pass
    assert time.monotonic() - begun < 10
    assert "hunter2" not in str(refusal.value)
    assert "user:***@127.0.0.1" in str(refusal.value)
    assert "MQSERVE_STORE_URL" in str(refusal.value)


async def test_the_state_of_a_store_shows_no_password(namespace: str) -> None:
    assert "hunter2" not in repr(RedisStore("redis://:hunter2@somewhere/0", namespace))


async def test_a_result_recorded_while_the_store_is_frozen_is_written_after_it(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        store_server.freeze()
        written = store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=store.now_ms() + 60_000))
        await until(lambda: not store.health.connected)
        store_server.thaw()
        await written
        assert await store.get(keys.future("f")) == b"result"


async def test_a_result_whose_time_is_spent_is_given_up_while_the_store_is_frozen(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        store_server.freeze()
        with pytest.raises(StoreUnavailable):
            await store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=store.now_ms()))


async def test_a_call_to_a_frozen_store_ends_in_seconds(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        store_server.freeze()
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.get(keys.desired)
        assert time.monotonic() - begun < 15


async def test_scripts_are_known_again_after_a_restart(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        await asyncio.to_thread(store_server.stop)
        await asyncio.to_thread(store_server.start)
        assert await store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=store.now_ms() + 10_000))
        assert await store.replace(keys.desired, None, b"new")


async def test_a_script_that_the_server_has_forgotten_is_said_again(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_server.url, namespace) as store:
        store_server.say("SCRIPT", "FLUSH")
        store.mark(keys.start("f"), b"1", 60_000)
        assert await store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=0))
        assert await store.get_many([keys.start("f"), keys.future("f")]) == [b"1", b"result"]


async def test_a_result_whose_answer_was_lost_is_written_again_and_is_still_the_first(
    store_wire: Wire, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_wire.url, namespace) as store:
        store_wire.hold_answers()
        written = store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=0))  # which the writer would not try again
        await asyncio.sleep(0.1)
        store_wire.reset()
        store_wire.mend()
        assert await written is True


async def test_a_result_whose_answer_does_not_come_is_given_up_in_time_and_the_next_goes_over_a_new_connection(
    store_wire: Wire, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_wire.url, namespace) as store:
        store_wire.blackhole()
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=0))
        assert 2 < time.monotonic() - begun < 3 + NOISE_S and store.health.trouble
        store_wire.strand()  # what was asked before stays unanswered
        assert await store.record(Record(keys.future("g"), b"result", "", b"", deadline_ms=store.now_ms() + 30_000))
        assert not store.health.trouble


async def test_a_result_that_a_full_store_refuses_says_so_and_is_written_once_there_is_room(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_server.url, namespace) as store:
        store_server.limit_memory("1")
        with pytest.raises(StoreUnavailable, match=r"takes no writes \(OOM\)"):
            await store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=0))
        assert store.health.refusal == "it is full" and store.health.connected
        store.drop_soon(keys.body("f"))  # needs no memory, and says nothing about what does
        written = store.record(Record(keys.future("g"), b"result", "", b"", deadline_ms=store.now_ms() + 30_000))
        await asyncio.sleep(0.2)
        assert not written.done() and store.health.refusal
        store_server.limit_memory()
        assert await written and not store.health.trouble


async def test_a_user_who_may_not_write_results_is_told_which_right_he_lacks(
    store_server: PrivateRedis, namespace: str, keys: StoreKeys
) -> None:
    rights = ("-@all", "+script|load", "+time", "+ping", "+evalsha", "+eval", "+set", "+select", f"%R~mqserve:{namespace}:*")
    store_server.say("ACL", "SETUSER", namespace, "on", ">word", *rights)
    try:
        async with open_redis(store_server.url.replace("://", f"://{namespace}:word@"), namespace) as store:
            with pytest.raises(StoreUnavailable, match=f"does not let user '{namespace}' do what .*EVALSHA mqserve:{namespace}:future"):
                await store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=0))
            assert store.health.refusal == "it does not let this process write"
    finally:
        store_server.say("ACL", "DELUSER", namespace)


async def test_an_inbox_reader_goes_on_after_its_connection_was_killed(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    notes: list[bytes] = []
    gaps: list[float] = []
    inbox = keys.inbox("p")
    async with open_redis(store_server.url, namespace) as store:
        reader = asyncio.create_task(store.read_inbox(inbox, notes.extend, lambda: gaps.append(time.monotonic())))
        await until(lambda: len(gaps) == 1)
        kill_all_connections(store_server)
        await until(lambda: len(gaps) == 2)
        assert store.health.connected
        await store.record(Record(keys.future("f"), b"result", inbox, b"note", deadline_ms=store.now_ms() + 10_000))
        await until(lambda: notes == [b"note"])
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def test_a_process_that_only_reads_leaves_a_demoted_server(namespace: str, keys: StoreKeys) -> None:
    with PrivateRedis() as old, PrivateRedis() as new, Wire(old.url) as wire:
        async with open_redis(wire.url, namespace) as store:
            gaps: list[float] = []
            reader = asyncio.create_task(store.read_inbox(keys.inbox("p"), lambda notes: None, lambda: gaps.append(time.monotonic())))
            await until(lambda: len(gaps) == 1)
            await asyncio.sleep(0.1)  # until the server has its BLMPOP
            wire.lead_to(new.url)  # what is open stays open
            old.say("REPLICAOF", "127.0.0.1", new.port)
            await until(lambda: len(gaps) == 2)
            assert await store.set(keys.desired, b"x", ttl_ms=1000)
            assert await store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=0))
            assert new.say("EXISTS", keys.desired, keys.future("f")) == 2
            old.say("REPLICAOF", "NO", "ONE")  # a primary waits for its copies before it ends
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


async def test_what_is_popped_for_a_connection_that_only_the_server_believes_in_is_read_by_key(
    store_url: str, store_wire: Wire, namespace: str, keys: StoreKeys, short_blocks: float
) -> None:
    """A connection ends here and not there. What the server pops for it is lost, until its BLMPOPs are over: then all is read again."""
    async with waiting(store_wire.url, namespace, keys) as (store, pending), open_redis(store_url, namespace) as replica:
        await asyncio.to_thread(store_wire.reset_clients)
        swallowed = [ask(pending, store, f"swallowed {number}") for number in range(2)]
        until_redialled = ask(pending, store, "read at the first gap")
        await replica.record(answer_to(keys, pending, "read at the first gap"))
        await until_redialled
        for number in range(2):  # one for each BLMPOP of the old connection, which the server serves first
            await replica.record(answer_to(keys, pending, f"swallowed {number}"))
        async with asyncio.timeout(short_blocks + 2):
            await asyncio.gather(*swallowed)


async def test_a_partition_without_a_fin_costs_no_result(
    store_url: str, store_wire: Wire, namespace: str, keys: StoreKeys, short_blocks: float
) -> None:
    async with waiting(store_wire.url, namespace, keys) as (store, pending), open_redis(store_url, namespace) as replica:
        await asyncio.to_thread(store_wire.strand)
        results: list[asyncio.Future[Result]] = []
        until_healed = time.monotonic() + short_blocks
        while time.monotonic() < until_healed:
            results.append(ask(pending, store, f"{len(results)}"))
            await replica.record(answer_to(keys, pending, f"{len(results) - 1}"))
            await asyncio.sleep(0.05)
        async with asyncio.timeout(2 * short_blocks + 2):
            await asyncio.gather(*results)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> float:
    """The inbox's BLMPOPs block for half a second; returns for how long those of a broken connection may take entries."""
    for name, value in (("BLOCK_S", 0.5), ("REPLY_S", 1.0), ("SWALLOWING_S", 1.5)):
        monkeypatch.setattr(f"mqserve.broker.redis.inbox.{name}", value)
    return 1.5


@asynccontextmanager
async def waiting(url: str, namespace: str, keys: StoreKeys) -> AsyncIterator[tuple[Store, PendingResults]]:
    """A process that waits for results, and whose reader has begun."""
    async with open_redis(url, namespace) as store:
        pending = PendingResults(store, keys, "p")
        running = asyncio.create_task(pending.run())
        try:
            early = ask(pending, store, "early")
            await store.record(answer_to(keys, pending, "early"))
            await early
            yield store, pending
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def ask(pending: PendingResults, store: Store, future_id: str) -> asyncio.Future[Result]:
    ticket = Ticket(future_id)
    ticket.deadline_ms = store.now_ms() + 60_000
    ticket.pace, ticket.sent_at = Pace(), time.monotonic()
    pending.add(ticket)
    return ticket.future


def answer_to(keys: StoreKeys, pending: PendingResults, future_id: str) -> Record:
    raw = Result(backend="b", body=b"well").to_bytes()
    return Record(keys.future(future_id), raw, pending.inbox, entry_of(future_id, raw), deadline_ms=0)


async def test_watchers_are_woken_when_their_subscription_comes_back(store_server: PrivateRedis, namespace: str) -> None:
    async with open_redis(store_server.url, namespace) as store:
        changed = store.watch()
        await until(changed.is_set)
        changed.clear()
        kill_all_connections(store_server)
        await until(changed.is_set)


def kill_all_connections(server: PrivateRedis) -> None:
    with redis.Redis.from_url(server.url) as client:
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


@pytest.mark.parametrize(("policy", "says"), [("allkeys-lru", "set maxmemory-policy to noeviction"), ("noeviction", "")])
async def test_a_store_that_would_forget_when_it_is_full_is_a_concern(
    store_server: PrivateRedis, namespace: str, policy: str, says: str
) -> None:
    store_server.limit_memory("100mb", policy)
    async with open_redis(store_server.url, namespace) as store:
        misconfiguration = await store.misconfiguration()
        assert misconfiguration.endswith(says) and bool(misconfiguration) == bool(says)


async def test_large_results_are_written_in_calls_of_a_bounded_size(store_server: PrivateRedis, namespace: str, keys: StoreKeys) -> None:
    """One call with all of them would take longer than its time on a slow link, and be sent again and again."""
    count, megabyte = 12, b"x" * 1024 * 1024
    async with open_redis(store_server.url, namespace) as store:
        store_server.say("CONFIG", "RESETSTAT")
        deadline_ms = store.now_ms() + 60_000
        assert all(await asyncio.gather(*(store.record(Record(keys.future(str(n)), megabyte, "", b"", deadline_ms)) for n in range(count))))
        said = store_server.say("INFO", "commandstats")
        text = said if isinstance(said, str) else repr(said)
        calls = int(text.split("cmdstat_evalsha")[1].split("calls")[1].lstrip("'=: ").split(",")[0])
        assert calls >= count * len(megabyte) / FLUSH_BYTES


async def test_a_look_at_the_clock_that_takes_long_is_not_believed(
    store_wire: Wire, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqserve.broker.redis.clock.CLOCK_EVERY_S", 0.3)
    async with open_redis(store_wire.url, namespace) as store:

        def offset_ms() -> float:
            return store.now_ms() - time.monotonic() * 1000

        before = offset_ms()
        store_wire.hold_answers()
        await asyncio.sleep(1.2)  # so long, and only on its way back: half of that is what the look would be off by
        store_wire.mend()
        seen = []
        for _ in range(50):  # until after the next look
            seen.append(abs(offset_ms() - before))
            await asyncio.sleep(0.01)
        assert max(seen) < 200


async def test_a_beat_is_written_over_a_new_connection_when_the_old_one_breaks_or_is_silent(
    store_wire: Wire, namespace: str, keys: StoreKeys
) -> None:
    async with open_redis(store_wire.url, namespace) as store:
        for number, fault in enumerate((store_wire.reset, store_wire.finish, store_wire.strand)):
            fault()
            await store.put_field(keys.beats, "node", b"%d" % number)
            assert (await store.fields(keys.beats))["node"] == b"%d" % number
        assert store.health.connected


async def test_beats_and_results_that_meet_a_lost_connection_open_one_between_them(store_url: str, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_url, namespace) as store:
        wire = store._wire
        dials, dial = [], wire._dial

        async def counted() -> HotWire:
            dials.append(1)
            return await dial()

        wire._dial = counted
        wire.hang_up()
        written = store.record(Record(keys.future("f"), b"result", "", b"", deadline_ms=store.now_ms() + 60_000))
        await asyncio.gather(*(store.put_field(keys.beats, f"node {number}", b"1") for number in range(5)))
        assert await written and len(await store.fields(keys.beats)) == 5
        assert len(dials) == 1
