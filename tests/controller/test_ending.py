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
from mqserve.controller.lease import Claim, claim_instance, forget, has_ended, renew_instance
from mqserve.controller.state.documents import Backend, Desired, HttpOptions
from mqserve.instance.starting import StartOptions, running_instance, shut_down
from mqserve.links import Links

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
NO_GUARD = ("nothing stands here", None)


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> Links:
    """With little time for the end of an instance."""
    monkeypatch.setattr("mqserve.instance.starting.SHUTDOWN_BUDGET_S", 0.3)
    return Links(Settings.read(), EmbeddedQueue(), EmbeddedStore(), KEYS, "test")


async def claim(links: Links, graceful_shutdown_timeout_s: float = 0) -> Claim:
    """An instance with one backend."""
    claim = await claim_instance(links.store, KEYS, "", HttpOptions(), detached=True)
    backend = Backend("b", "sha", "b", {"graceful_shutdown_timeout_s": graceful_shutdown_timeout_s})
    await links.store.set(KEYS.desired, Desired(instance=claim.id, backends={"b": backend}).to_bytes())
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


async def test_an_instance_that_still_drains_is_not_cleared_under_its_controller(links: Links) -> None:
    held = await claim(links)
    async with meanwhile(lambda: renew_instance(links.store, KEYS, held.id, "a", NO_GUARD)):
        with pytest.raises(InstanceError, match=r"still drains after 0\.3 s"):
            await shut_down(links, held.id)
    desired = Desired.from_bytes(await links.store.get(KEYS.desired))
    assert desired.closing and set(desired.backends) == {"b"}


async def test_an_instance_that_nobody_leads_is_cleared_by_who_ends_it(links: Links) -> None:
    held = await claim(links)
    await shut_down(links, held.id)
    assert await links.store.get_many([KEYS.desired, KEYS.instance]) == [None, None]
    assert await has_ended(links.store, KEYS, held.id)


async def test_an_end_has_the_time_that_the_slowest_replica_may_take(links: Links) -> None:
    held = await claim(links, graceful_shutdown_timeout_s=30)
    ending = asyncio.create_task(shut_down(links, held.id))
    async with meanwhile(lambda: renew_instance(links.store, KEYS, held.id, "a", NO_GUARD)):
        await asyncio.wait([ending], timeout=1)
        assert not ending.done()
        await forget(links.store, KEYS, held.id)
        await links.store.announce()
        await ending


async def test_an_owner_ends_what_it_started_although_the_instance_cannot_be_cleared(links: Links) -> None:
    before = asyncio.all_tasks()
    async with running_instance(links, StartOptions(HttpOptions(location="NoServer"))):
        assert await links.store.fields(KEYS.beats)
        await links.store.set(KEYS.desired, b"no document")
    assert not await links.store.fields(KEYS.beats), "its node runs on"
    assert asyncio.all_tasks() == before
