"""The rhythm of the loop that times a replica's requests: quick with something to time, slow at rest."""

import asyncio
import time

import pytest

from mqserve.broker.store_keys import StoreKeys
from mqserve.replicas.rhythm import QUICK_S, SLOW_S, Rhythm
from tests.broker.traffic import until
from tests.replicas.parts import Serving, request

pytestmark = pytest.mark.anyio


async def resting(rhythm: Rhythm) -> None:
    while not rhythm.rests:
        await rhythm.next()


async def test_a_loop_with_something_to_time_has_quick_turns_for_ever() -> None:
    rhythm = Rhythm(lambda: False)
    for _ in range(30):
        began = time.monotonic()
        await rhythm.next()
        assert time.monotonic() - began >= QUICK_S * 0.9 and not rhythm.rests


async def test_an_idle_loop_rests_after_a_second_and_a_wake_ends_the_turn_at_once() -> None:
    rhythm = Rhythm(lambda: True)
    began = time.monotonic()
    turning = asyncio.create_task(resting(rhythm))
    await until(lambda: rhythm.rests)
    assert time.monotonic() - began >= SLOW_S * 0.9
    rhythm.wake()
    began = time.monotonic()
    await until(lambda: not rhythm.rests)
    assert time.monotonic() - began < SLOW_S / 2
    turning.cancel()


async def test_a_run_on_a_replica_that_was_at_rest_gets_its_start_mark_as_soon_as_on_a_busy_one(keys: StoreKeys) -> None:
    async with Serving() as serving:
        tuning = asyncio.create_task(serving.server.tune_forever())
        await until(lambda: serving.server._rhythm.rests)
        await serving.send(request())
        job = await serving.taken()
        job.started = began = time.monotonic()

        async def is_marked() -> bool:
            return await serving.store.get(keys.start("b/order-17")) is not None

        await until(is_marked)
        assert time.monotonic() - began < SLOW_S / 2
        tuning.cancel()
