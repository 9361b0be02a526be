"""A member's beat in the store. Through the beats the controller sees nodes, proxies and replicas without connecting to any of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from ...broker.errors import StoreUnavailable
from ...broker.process.rate_limited_log import RateLimitedLog
from ...broker.process.ticks import next_tick_s
from ...broker.store import Store

logger = logging.getLogger(__name__)

LATE_S = 4.0  # a beat that is later than this shows that its own process stood still


class Presence:
    """Writes `beat()` to the field every `every_s`, and at once after `tell`."""

    def __init__(self, store: Store, key: str, field: str, beat: Callable[[], bytes], every_s: float) -> None:
        self._store = store
        self._key = key
        self._field = field
        self._beat = beat
        self._every_s = every_s
        self._now = asyncio.Event()
        self._writing = asyncio.Lock()  # one write at a time, so that an older one cannot land last
        self._left = False
        self._log = RateLimitedLog(logger)
        self._steady_since = time.monotonic()

    def __repr__(self) -> str:
        return f"<Presence {self._field}>"

    @property
    def steady_s(self) -> float:
        """The time since a beat was last late or refused. A process that stood still itself cannot tell whether other members did."""
        return time.monotonic() - self._steady_since

    def tell(self) -> None:
        """Writes a beat soon, because something changed that others wait for."""
        self._now.set()

    async def beat_forever(self) -> None:
        last = time.monotonic()
        while True:
            if time.monotonic() - last > self._every_s + LATE_S:
                self._steady_since = time.monotonic()
            last = time.monotonic()
            await self.beat()
            with suppress(TimeoutError):
                async with asyncio.timeout(next_tick_s(self._every_s)):
                    await self._now.wait()

    async def beat(self) -> bool:
        """Writes one beat; returns whether the store took it."""
        async with self._writing:
            return not self._left and await self._write()

    async def _write(self) -> bool:
        urgent = self._now.is_set()
        self._now.clear()
        try:
            await self._store.put_field(self._key, self._field, self._beat())
            if urgent:
                await self._store.announce()
        except StoreUnavailable as error:
            self._log.say(f"cannot report {self._field}: {error}")
            self._steady_since = time.monotonic()
            return False
        self._log.over()
        return True

    async def leave(self, *, with_last_words: bool) -> None:
        """Removes the field, or, after a failure, leaves a last beat for the operator to read. Call it before `beat_forever` is
        cancelled: a write that is cancelled under way may still land after this one."""
        async with self._writing:
            self._left = True
            self._now.set()
            if with_last_words:
                await self._write()
                return
            try:
                await self._store.drop_fields(self._key, self._field)
                await self._store.announce()
            except StoreUnavailable as error:
                logger.warning("cannot report the end of %s: %s", self._field, error)
