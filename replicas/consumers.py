"""The consumers of one replica: for each generation of its queues one of requests, and one of jobs. They pause while the store is away and
during slow calls, so that other replicas get the messages."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from ..broker.backoff import delays
from ..broker.errors import BrokerUnavailable, MQServeError
from ..broker.process.ticks import next_tick_s
from ..broker.queue import Consumption, Delivery, Queue
from ..broker.store import Store

logger = logging.getLogger(__name__)

STORE_AWAY_S = 3.0
_LOOK_EVERY_S = 0.25
_LOOK_AT_REST_EVERY_S = 1.0  # while the store is well and the wanted generations are taken
_WITHOUT_JOBS_S = 10.0  # after the broker has not let us consume jobs
_HEAD_START_S = 0.02  # for a job to arrive, and to begin, before requests that would keep it out


class Lane(NamedTuple):
    """One kind of messages of a backend. `on_delivery(generation, delivery)` gets each, `prefetch()` returns the prefetch."""

    prefetch: Callable[[], int]
    on_delivery: Callable[[int, Delivery], None]
    jobs: bool = False


class Consumers:
    """Owns the consumers of one replica; only `keep_forever` starts any.

    While the store is away, `settle()` is called repeatedly: it requeues the messages that wait for the store, and returns whether no
    result is left to store. `on_held_off()` is called once the consumers are stopped after `hold_off`.
    """

    def __init__(
        self,
        backend: str,
        queue: Queue,
        store: Store,
        lanes: Sequence[Lane],
        settle: Callable[[], bool],
        on_held_off: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._queue = queue
        self._store = store
        self._lanes = lanes
        self._settle = settle
        self._on_held_off = on_held_off
        self._wanted: Mapping[int, int] = {}  # generation -> its number of queues
        self._consumptions: dict[tuple[int, Lane], Consumption] = {}
        self._jobs_first = False
        self._no_jobs_before = 0.0  # monotonic
        self._look = asyncio.Event()
        self.paused = False  # the store is away
        self.held_off = False  # a call is slow
        self._latest = 1  # the latest generation that it has consumed
        self.moved_at = -math.inf  # monotonic: when it first consumed the latest generation, if that is not the first one

    def __repr__(self) -> str:
        state = f"{', paused' if self.paused else ''}{', held off' if self.held_off else ''}"
        return f"<Consumers of generations {self.generations} of {self._backend}{state}>"

    @property
    def generations(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(generation for generation, _ in self._consumptions))

    def want(self, generations: Mapping[int, int]) -> None:
        """Makes `keep_forever` consume exactly these generations, each with its number of queues."""
        self._wanted = generations
        self._look.set()

    def hold_off(self, *, jobs_first: bool) -> None:
        """Makes `keep_forever` stop the consumers until `go_on`, since requests would wait here behind a slow call. `jobs_first`: jobs come
        next, or else requests do; where one call runs at a time, one kind would never get a turn otherwise."""
        self.held_off, self._jobs_first = True, jobs_first
        self._look.set()

    def go_on(self) -> None:
        """Takes back `hold_off`."""
        self.held_off = False
        self._look.set()

    def tune(self) -> None:
        for (_, lane), consumption in self._consumptions.items():
            consumption.set_prefetch(lane.prefetch())

    async def keep_forever(self, on_taken: Callable[[], None]) -> None:
        """Runs until cancelled. Stops consuming when the store has been away for STORE_AWAY_S, since other replicas may reach it.
        `on_taken` is called whenever the wanted generations have been taken up."""
        last_seen, not_before, pauses, trouble = time.monotonic(), 0.0, delays(), ""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S if trouble or not self._is_at_rest else next_tick_s(_LOOK_AT_REST_EVERY_S)):
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
            if self.held_off and self._consumptions:
                await self.stop()
                self._on_held_off()  # not before: the broker would send here again what it gives back
            if self.paused or self.held_off or now < not_before or self._has_wanted:
                continue
            try:
                await self._take(self._wanted)
                pauses = delays()
                on_taken()
            except MQServeError as error:
                logger.warning("a replica of %s cannot take from its queue yet: %s", self._backend, error)
                not_before = time.monotonic() + next(pauses)

    @property
    def _is_at_rest(self) -> bool:
        return not (self.paused or self.held_off) and self._has_wanted

    @property
    def _has_wanted(self) -> bool:
        missing = {(generation, lane) for generation in self._wanted for lane in self._lanes_now} - self._consumptions.keys()
        return not missing and all([generation in self._wanted for generation, _ in self._consumptions])

    @property
    def _lanes_now(self) -> list[Lane]:
        return [lane for lane in self._lanes if not lane.jobs or time.monotonic() >= self._no_jobs_before]

    async def _take(self, generations: Mapping[int, int]) -> None:
        """Consumes exactly these generations. Raises BrokerUnavailable if it cannot take requests; the consumers that it started before
        that stay."""
        jobs_first, self._jobs_first = self._jobs_first, False
        for lane in sorted(self._lanes_now, key=lambda lane: lane.jobs is not jobs_first):
            if not lane.jobs:
                await self._take_from(lane, generations)
                continue
            try:
                await self._take_from(lane, generations)
            except BrokerUnavailable as error:  # an earlier version's controller has no such queue, or our user may not read it
                self._no_jobs_before = time.monotonic() + _WITHOUT_JOBS_S
                logger.warning("a replica of %s takes requests and no jobs yet: %s", self._backend, error)
            if jobs_first:
                await asyncio.sleep(_HEAD_START_S)
        for generation, lane in [kept for kept in self._consumptions if kept[0] not in generations]:
            await self._consumptions.pop((generation, lane)).cancel()

    async def _take_from(self, lane: Lane, generations: Mapping[int, int]) -> None:
        for generation, shards in generations.items():
            if (generation, lane) not in self._consumptions:
                if generation > self._latest:
                    self._latest, self.moved_at = generation, time.monotonic()
                take = partial(lane.on_delivery, generation)
                consumption = await self._queue.consume(self._backend, generation, lane.prefetch(), take, shards, jobs=lane.jobs)
                self._consumptions[generation, lane] = consumption

    async def stop(self) -> None:
        """Cancels the consumers. No delivery follows; earlier ones can still be settled."""
        consumptions, self._consumptions = self._consumptions, {}
        await asyncio.gather(*[consumption.cancel() for consumption in consumptions.values()])
