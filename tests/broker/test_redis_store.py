"""What only the store on Redis goes through: losses, freezes, restarts."""

import asyncio
import time

import pytest
import redis

from mqserve.broker.errors import StoreUnavailable
from mqserve.broker.redis.result_writer import FLUSH_BYTES
from mqserve.broker.redis.store import RedisStore, open_redis
from mqserve.broker.store import Record
from mqserve.broker.store_keys import StoreKeys
from tests.broker.traffic import until
from tests.faults.wire import Wire
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
    monkeypatch.setattr("mqserve.broker.redis.store._CLOCK_EVERY_S", 0.3)
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
