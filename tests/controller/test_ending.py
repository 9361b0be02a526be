"""The end of an instance: as long as it takes, and nothing is said to be done that is not."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mqserve.broker.errors import InstanceError
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.settings import Settings
from mqserve.broker.store_keys import StoreKeys
from mqserve.connections import Connections
from mqserve.controller.lease import InstanceClaim, claim_instance, forget, has_ended, renew_instance
from mqserve.controller.state.documents import Backend, Desired, HttpOptions
from mqserve.controller.state.reading import read_desired
from mqserve.instance.starting import StartOptions, running_instance, shut_down

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
NO_GUARD = ("nothing stands here", None)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    """With little time for the end of an instance."""
    monkeypatch.setattr("mqserve.instance.starting.SHUTDOWN_BUDGET_S", 0.3)
    return Connections(Settings.read(), EmbeddedQueue(), EmbeddedStore(), KEYS, "test")


async def claim(connections: Connections, graceful_shutdown_timeout_s: float = 0) -> InstanceClaim:
    """An instance with one backend."""
    claim = await claim_instance(connections.store, KEYS, "", HttpOptions(), detached=True)
    backend = Backend("b", "sha", "b", {"graceful_shutdown_timeout_s": graceful_shutdown_timeout_s})
    await connections.store.set(KEYS.desired, Desired(instance=claim.id, backends={"b": backend}).to_bytes())
    return claim


@asynccontextmanager
async def meanwhile(work: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
    async def forever() -> None:
        while True:
            await asyncio.sleep(0.05)
            await work()

    task = asyncio.create_task(forever())
    try:
        yield
    finally:
        task.cancel()


async def test_an_instance_that_still_drains_is_not_cleared_under_its_controller(connections: Connections) -> None:
    held = await claim(connections)
    async with meanwhile(lambda: renew_instance(connections.store, KEYS, held.id, "a", NO_GUARD)):
        with pytest.raises(InstanceError, match=r"still drains after 0\.3 s"):
            await shut_down(connections, held.id)
    desired = read_desired(await connections.store.get(KEYS.desired))
    assert desired.closing and set(desired.backends) == {"b"}


async def test_an_instance_that_nobody_leads_is_cleared_by_who_ends_it(connections: Connections) -> None:
    held = await claim(connections)
    await shut_down(connections, held.id)
    assert await connections.store.get_many([KEYS.desired, KEYS.instance]) == [None, None]
    assert await has_ended(connections.store, KEYS, held.id)


async def test_an_end_has_the_time_that_the_slowest_replica_may_take(connections: Connections) -> None:
    held = await claim(connections, graceful_shutdown_timeout_s=30)
    ending = asyncio.create_task(shut_down(connections, held.id))
    async with meanwhile(lambda: renew_instance(connections.store, KEYS, held.id, "a", NO_GUARD)):
        await asyncio.wait([ending], timeout=1)
        assert not ending.done()
        await forget(connections.store, KEYS, held.id)
        await connections.store.announce()
        await ending


async def test_an_owner_ends_what_it_started_although_the_instance_cannot_be_cleared(connections: Connections) -> None:
    before = asyncio.all_tasks()
    async with running_instance(connections, StartOptions(HttpOptions(location="NoServer"))):
        assert await connections.store.fields(KEYS.beats)
        await connections.store.set(KEYS.desired, b"no document")
    assert not await connections.store.fields(KEYS.beats), "its node runs on"
    assert asyncio.all_tasks() == before
