"""Those who wait for a change on one loop."""

import asyncio

import pytest

from mqserve.broker.process.waiters import Waiters

pytestmark = pytest.mark.anyio


async def test_waits_that_time_out_leave_nothing_behind() -> None:
    waiters = Waiters()
    for _ in range(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await waiters.wait()
    assert repr(waiters) == "<Waiters, 0 of them>"


async def test_all_who_wait_are_woken() -> None:
    waiters = Waiters()
    tasks = [asyncio.create_task(waiters.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiters.wake()
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)
    assert repr(waiters) == "<Waiters, 0 of them>"
