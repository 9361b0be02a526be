"""Large values: each reader gets its own, whatever becomes of the connection and of the readers beside it."""

import asyncio

import pytest
import redis.asyncio as redis

from mqserve.broker.redis.store import LARGE_BYTES, open_redis
from mqserve.broker.store_keys import StoreKeys
from tests.faults.wire import Wire

pytestmark = pytest.mark.anyio

NUMBERS = range(20)


def large(number: int) -> bytes:
    return bytes([number]) * (LARGE_BYTES + number)


async def test_each_of_many_readers_gets_its_own_value(store_url: str, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_url, namespace) as store:
        for number in NUMBERS:
            await store.set(keys.body(f"{number}"), large(number), ttl_ms=60_000)
        reads = [asyncio.create_task(store.get_large(keys.body(f"{number}"))) for number in (*NUMBERS, "none")]
        await asyncio.sleep(0)
        for gone in NUMBERS[::3]:  # its reader does not wait any more, and its reply comes all the same
            reads[gone].cancel()
        found = await asyncio.gather(*reads, return_exceptions=True)
        assert [one for one in found if not isinstance(one, BaseException)] == [
            *(large(number) for number in NUMBERS if number % 3),
            None,
        ]


async def test_a_connection_that_was_lost_between_two_reads_costs_none(store_url: str, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_url, namespace) as store, redis.from_url(store_url) as other:
        await store.set(keys.body("x"), large(7), ttl_ms=60_000)

        async def reading() -> list[dict[str, str]]:
            return [one for one in await other.client_list() if one["cmd"] == "get"]

        for _ in range(3):
            assert await store.get_large(keys.body("x")) == large(7)
            for one in await reading():
                await other.client_kill_filter(_id=one["id"])
            assert await store.get_large(keys.body("x")) == large(7)


async def test_many_reads_under_a_lost_connection_are_all_read_over_another(store_url: str, namespace: str, keys: StoreKeys) -> None:
    async with open_redis(store_url, namespace) as store, redis.from_url(store_url) as other:
        await store.set(keys.body("x"), b"x" * 4_000_000, ttl_ms=60_000)
        await store.get_large(keys.body("x"))
        reads = [asyncio.create_task(store.get_large(keys.body("x"))) for _ in range(20)]
        await asyncio.sleep(0)
        for one in await other.client_list():
            if one["cmd"] == "get":
                await other.client_kill_filter(_id=one["id"])
        assert await asyncio.gather(*reads) == [b"x" * 4_000_000] * 20


async def test_reads_under_a_connection_that_falls_silent_are_all_read_over_another(
    store_wire: Wire, namespace: str, keys: StoreKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mqserve.broker.redis.store.LARGE_SILENCE_S", 0.5)
    async with open_redis(store_wire.url, namespace) as store:
        await store.set(keys.body("x"), large(7), ttl_ms=60_000)
        await store.get_large(keys.body("x"))
        store_wire.strand()
        async with asyncio.timeout(20):  # a large value as such may take half a minute
            assert await asyncio.gather(*(store.get_large(keys.body("x")) for _ in range(20))) == [large(7)] * 20
