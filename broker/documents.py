"""Following documents in the store: level-triggered, so that a lost message costs only time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from .errors import StoreUnavailable
from .store import Store

T = TypeVar("T")

_LOOK_AGAIN_S = 0.25
READ_AGAIN_S = 2.0  # a hint may be lost: the document is read this often anyway


async def follow(store: Store, *keys: str, again: Callable[[], bool] = lambda: False) -> AsyncIterator[list[bytes | None]]:
    """The documents now, and after every change of one of them, and as long as `again` says so every few seconds; while the store is away,
    nothing: keep the last good ones."""
    changed = store.watch()
    last: list[bytes | None] | None = None
    try:
        while True:
            changed.clear()
            with suppress(StoreUnavailable):
                documents = await store.get_documents(keys)
                if documents != last or again():
                    last = documents
                    yield documents
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_AGAIN_S):
                    await changed.wait()
    finally:
        store.unwatch(changed)


async def until(store: Store, look: Callable[[], Awaitable[T | None]], budget_s: float) -> T:
    """What `look` finds, looking again at every change. A store that is away is asked again, it may come back.

    Raises TimeoutError after `budget_s` (StoreUnavailable if the store was away to the end), and whatever else `look` raises.
    """
    changed = store.watch()
    away: StoreUnavailable | None = None
    try:
        async with asyncio.timeout(budget_s):
            while True:
                changed.clear()
                try:
                    if (found := await look()) is not None:
                        return found
                    away = None
                except StoreUnavailable as error:
                    away = error
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await changed.wait()
    except TimeoutError:
        if away is not None:
            raise away from None
        raise
    finally:
        store.unwatch(changed)
