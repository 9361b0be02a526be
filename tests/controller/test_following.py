"""Following the documents: nobody goes back to what a store that failed over still has of them, unless it stays."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.state.documents import Desired, Observed
from mqserve.controller.state.following import follow_state

pytestmark = pytest.mark.anyio

KEYS = StoreKeys("tests")
OLDER, KNOWN = Desired(instance="i", version=3), Desired(instance="i", version=5)


class Followed:
    """What a proxy or a replica has of the documents."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store
        self._following: AsyncIterator[tuple[Desired | None, Observed | None]] = follow_state(store, KEYS)

    async def after(self, *documents: Desired | Observed) -> tuple[Desired | None, Observed | None]:
        for document in documents:
            await self._store.set(KEYS.desired if isinstance(document, Desired) else KEYS.observed, document.to_bytes())
        await self._store.announce()
        async with asyncio.timeout(20):
            return await anext(self._following)


async def test_an_older_copy_is_not_followed_and_what_is_written_over_it_is() -> None:
    followed = Followed(EmbeddedStore())
    observed = Observed(epoch=1, version=9)
    assert await followed.after(KNOWN, observed) == (KNOWN, observed)
    assert await followed.after(OLDER, Observed(epoch=1, version=7)) == (KNOWN, observed)
    restored, written = Desired(epoch=2, instance="i", version=3), Observed(epoch=1, version=10)
    assert await followed.after(restored, written) == (restored, written)


async def test_an_older_copy_that_stays_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no controller outlived the failure: it is all there is."""
    monkeypatch.setattr("mqserve.controller.state.following.DOUBTED_FOR_S", 0.1)
    followed = Followed(EmbeddedStore())
    assert await followed.after(KNOWN) == (KNOWN, None)
    assert await followed.after(OLDER) == (KNOWN, None)
    async with asyncio.timeout(20):
        while await followed.after() != (OLDER, None):
            await asyncio.sleep(0.05)


async def test_another_instance_begins_anew() -> None:
    followed = Followed(EmbeddedStore())
    await followed.after(KNOWN, Observed(epoch=4, version=9))
    new, observed = Desired(instance="another", version=1), Observed(epoch=1, version=1)
    assert await followed.after(observed, new) == (new, observed)
