"""Followers see the documents as they are now and after every change; over both stores."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest

from mqserve.broker.documents import READ_AGAIN_S, follow, until
from mqserve.broker.errors import BackendFailed, StoreUnavailable
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store import Store
from mqserve.broker.store_keys import StoreKeys

pytestmark = pytest.mark.anyio

Documents = list[bytes | None]


async def test_a_follower_sees_the_documents_as_they_are_and_then_each_change(store: Store, keys: StoreKeys) -> None:
    await store.set(keys.desired, b"1")
    async with following(store, keys.desired, keys.observed) as seen:
        assert await anext(seen) == [b"1", None]
        await store.replace(keys.observed, None, b"2")
        assert await anext(seen) == [b"1", b"2"]
        await store.replace(keys.desired, b"1", None)
        assert await anext(seen) == [None, b"2"]


async def test_a_follower_sees_nothing_when_nothing_changed(store: Store, keys: StoreKeys) -> None:
    async with following(store, keys.desired) as seen:
        assert await anext(seen) == [None]
        await store.announce()
        await store.replace(keys.observed, None, b"not followed")
        await store.replace(keys.desired, None, b"followed")
        assert await anext(seen) == [b"followed"]


async def test_a_change_that_was_not_announced_is_seen_all_the_same(store: Store, keys: StoreKeys) -> None:
    async with following(store, keys.desired) as seen:
        await anext(seen)
        await store.set(keys.desired, b"quiet")
        async with asyncio.timeout(READ_AGAIN_S + 2):
            assert await anext(seen) == [b"quiet"]


async def test_a_follower_keeps_its_documents_while_the_store_is_away(keys: StoreKeys) -> None:
    store = StoreThatGoesAway()
    async with following(store, keys.desired) as seen:
        await anext(seen)
        store.away = True
        await store.replace(keys.desired, None, b"new")
        coming = asyncio.ensure_future(anext(seen))
        await store.asked_in_vain.wait()
        assert not coming.done()
        store.away = False
        await store.announce()
        assert await coming == [b"new"]


async def test_looking_until_something_is_found_ends_with_it(store: Store, keys: StoreKeys) -> None:
    looking = asyncio.create_task(until(store, lambda: store.get(keys.desired), budget_s=10))
    await store.replace(keys.desired, None, b"found")
    assert await looking == b"found"


async def test_looking_in_vain_ends_with_the_budget(store: Store, keys: StoreKeys) -> None:
    with pytest.raises(TimeoutError):
        await until(store, lambda: store.get(keys.desired), budget_s=0.05)


async def test_what_the_look_raises_ends_the_looking(store: Store) -> None:
    async def look() -> None:
        raise BackendFailed("no")

    with pytest.raises(BackendFailed, match="no"):
        await until(store, look, budget_s=10)


async def test_a_store_that_is_away_is_asked_again(store: Store) -> None:
    answers = iter([StoreUnavailable("away"), None, "found"])

    async def look() -> str | None:
        answer = next(answers)
        if isinstance(answer, StoreUnavailable):
            raise answer
        return answer

    assert await until(store, look, budget_s=10) == "found"


async def test_a_store_that_stays_away_is_named(store: Store) -> None:
    async def look() -> None:
        raise StoreUnavailable("gone")

    with pytest.raises(StoreUnavailable, match="gone"):
        await until(store, look, budget_s=0.05)


class StoreThatGoesAway(EmbeddedStore):
    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.asked_in_vain = asyncio.Event()

    async def get_documents(self, keys: Sequence[str]) -> Documents:
        if self.away:
            self.asked_in_vain.set()
            raise StoreUnavailable("away")
        return await super().get_documents(keys)


@asynccontextmanager
async def following(store: Store, *keys: str) -> AsyncIterator[AsyncIterator[Documents]]:
    async with asyncio.timeout(10), aclosing(follow(store, *keys)) as seen:  # type: ignore[type-var]
        yield seen
