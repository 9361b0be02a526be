"""Following documents in the store. The value is read, never the event (level-triggered), so a lost notification costs only time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from .errors import StoreUnavailable
from .process.ticks import next_tick_s
from .store import Store

T = TypeVar("T")

_LOOK_AGAIN_S = 0.25
READ_AGAIN_S = 2.0  # a notification may be lost, so the document is read this often anyway


async def follow(store: Store, *keys: str, again: Callable[[], bool] = lambda: False) -> AsyncIterator[list[bytes | None]]:
    """Yields the documents now, after each change of one of them, and every READ_AGAIN_S while `again()` is true. Yields nothing while
    the store is away: callers keep their last good documents."""
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
                async with asyncio.timeout(next_tick_s(READ_AGAIN_S)):
                    await changed.wait()
    finally:
        store.unwatch(changed)


async def until(store: Store, look: Callable[[], Awaitable[T | None]], budget_s: float) -> T:
    """Calls `look` now and after each change until it returns something other than None, and returns that. Retries while the store is
    away.

    Raises TimeoutError after `budget_s` (StoreUnavailable if the store was away to the end), and any other error of `look`.
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
