"""Which queues a replica takes from: the generations that are wanted, as long as it can store what it answers."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ..broker.backoff import delays
from ..broker.errors import MQServeError
from ..broker.queue import Consumption, Delivery, Queue
from ..broker.store import Store

logger = logging.getLogger(__name__)

STORE_AWAY_S = 3.0
_LOOK_EVERY_S = 0.25


class Consumers:
    """Owns the consumers of one replica; only `keep_forever` starts any.

    `on_delivery(generation, delivery)` hands over; `prefetch()` says how many at a time; `settle()` is called now and then while the
    store is away, gives back what waits for it, and says whether all is stored again.
    """

    def __init__(
        self,
        backend: str,
        queue: Queue,
        store: Store,
        prefetch: Callable[[], int],
        on_delivery: Callable[[int, Delivery], None],
        settle: Callable[[], bool],
    ) -> None:
        self._backend = backend
        self._queue = queue
        self._store = store
        self._prefetch = prefetch
        self._on_delivery = on_delivery
        self._settle = settle
        self._wanted: tuple[int, ...] = ()
        self._consumptions: dict[int, Consumption] = {}
        self._look = asyncio.Event()
        self.paused = False
        self.moved_at = -math.inf  # monotonic: when a later generation than the first was taken up

    def __repr__(self) -> str:
        return f"<Consumers of generations {self.generations} of {self._backend}{', paused' if self.paused else ''}>"

    @property
    def generations(self) -> tuple[int, ...]:
        return tuple(self._consumptions)

    def want(self, generations: tuple[int, ...]) -> None:
        """Exactly these, soon."""
        self._wanted = generations
        self._look.set()

    def tune(self) -> None:
        for consumption in self._consumptions.values():
            consumption.set_prefetch(self._prefetch())

    async def keep_forever(self, on_taken: Callable[[], None]) -> None:
        """Until cancelled. While nothing can be stored for long it takes nothing: others may reach the store. `on_taken` is called after
        each change."""
        last_seen, not_before, pauses = time.monotonic(), 0.0, delays()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._look.wait()
            self._look.clear()
            now = time.monotonic()
            trouble = self._store.health.trouble
            if not trouble:
                last_seen = now
            if not self.paused and now - last_seen > STORE_AWAY_S:
                logger.warning(
                    "a replica of %s takes no requests until it can store results again: %s", self._backend, self._store.health.trouble
                )
                self.paused = True
                await self.stop()
            if self.paused and self._settle() and not self._store.health.trouble:
                logger.warning("a replica of %s can store results again and takes requests", self._backend)
                self.paused = False
            if self.paused or now < not_before or set(self._wanted) == set(self._consumptions):
                continue
            try:
                await self._take(self._wanted)
                pauses = delays()
                on_taken()
            except MQServeError as error:
                logger.warning("a replica of %s cannot take from its queue yet: %s", self._backend, error)
                not_before = time.monotonic() + next(pauses)

    async def _take(self, generations: tuple[int, ...]) -> None:
        """Raises BrokerUnavailable; what it has by then it keeps."""
        for generation in generations:
            if generation not in self._consumptions:
                if generation > 1:
                    self.moved_at = time.monotonic()
                consuming = self._queue.consume(self._backend, generation, self._prefetch(), partial(self._on_delivery, generation))
                self._consumptions[generation] = await consuming
        for generation in [kept for kept in self._consumptions if kept not in generations]:
            await self._consumptions.pop(generation).cancel()

    async def stop(self) -> None:
        """No delivery follows; those in hand can still be settled."""
        consumptions, self._consumptions = self._consumptions, {}
        await asyncio.gather(*[consumption.cancel() for consumption in consumptions.values()])
