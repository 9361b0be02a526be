"""The outbox: the ends of jobs from which something follows. The leading controller sees to that, and then removes the entry, so it is done
again where the leader dies in between; whatever follows has an id that makes a second time recognizable.

An entry whose sequel cannot be sent yet stays and is tried again later; it holds up no other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ..broker.backoff import keep_running
from ..broker.errors import BadEnvelope, MQServeError
from ..broker.job_store import PlacedEnd
from ..broker.jobs import EndNote, Sequel
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.process.tasks import Tasks
from ..broker.store import Store
from ..broker.store_keys import StoreKeys

logger = logging.getLogger(__name__)

READ_AT_ONCE = 100
SENT_AT_ONCE = 64
HELD = 10_000  # entries that wait for another try; beyond that nothing new is read
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LOOK_SELDOM_EVERY_S = 60.0  # beside being woken: a wake-up may be lost

Send = Callable[[EndNote], Awaitable[None]]
"""Sees to what follows from an end. Raises MQServeError if it cannot yet, BadEnvelope if it never will."""


class Outbox:
    """Works while it is told to (`go_on`, `stop`). `sequels` says who sees to what."""

    def __init__(self, store: Store, keys: StoreKeys, sequels: Mapping[Sequel, Send]) -> None:
        self._store = store
        self._key = keys.ends
        self._sequels = sequels
        self._work: list[asyncio.Task[None]] = []
        self._arrived = asyncio.Event()
        self._sending = Tasks()
        self._slots = asyncio.Semaphore(SENT_AT_ONCE)
        self._again: dict[str, tuple[float, float]] = {}  # by place: when it is tried again (monotonic), and the pause before that
        self._in_hand: set[str] = set()  # places of entries that are being sent
        self._removed: set[str] = set()  # places of entries that were removed since the reader has asked for more
        self._away, self._trouble, self._odd = RateLimitedLog(logger), RateLimitedLog(logger), RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<Outbox, {len(self._in_hand)} in hand, {len(self._again)} wait{'' if self._work else ', stopped'}>"

    def go_on(self) -> None:
        if not self._work:
            works = (("the reader of the outbox", self._read_forever), ("the listener to the outbox", self._listen))
            self._work = [asyncio.create_task(keep_running(what, work), name=what) for what, work in works]

    async def stop(self) -> None:
        work, self._work = self._work, []
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        self._sending.cancel()
        await self._sending.wait(LONGEST_PAUSE_S)
        self._again.clear()
        self._in_hand.clear()
        self._slots = asyncio.Semaphore(SENT_AT_ONCE)  # one that was cancelled before it began has given nothing back

    async def send_all(self) -> None:
        """Goes through the outbox once. Raises StoreUnavailable."""
        await self._read()
        await self._sending.wait(LONGEST_PAUSE_S)

    async def _listen(self) -> None:
        await self._store.read_log(self._key, lambda _: self._arrived.set())

    async def _read_forever(self) -> None:
        while True:
            self._arrived.clear()
            try:
                await self._read()
                self._away.over()
            except MQServeError as error:
                self._away.say(f"what follows from the ends of jobs waits: {error}")
                await asyncio.sleep(FIRST_PAUSE_S)
                continue
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._arrived.wait()
            except TimeoutError:
                pass

    def _pause_s(self) -> float:
        """Returns for how long nothing is tried again. Thousands of entries may wait for that, each to its own time: the outbox is not read
        for each of them."""
        if self._in_hand:
            return FIRST_PAUSE_S  # one of them may fail meanwhile
        soonest = min((at for at, _ in self._again.values()), default=float("inf"))
        return min(LOOK_SELDOM_EVERY_S, max(FIRST_PAUSE_S, soonest - time.monotonic()))

    async def _read(self) -> None:
        """Begins with all entries whose time has come. Raises StoreUnavailable."""
        after, seen = "", set[str]()
        while entries := await self._entries_behind(after):
            for entry in entries:
                seen.add(entry.place)
                if self._is_due(entry.place):
                    await self._slots.acquire()
                    self._in_hand.add(entry.place)
                    self._sending.start(self._send(entry))
            after = entries[-1].place
            if len(self._again) >= HELD:
                return
        self._again = {place: again for place, again in self._again.items() if place in seen or place in self._in_hand}

    async def _entries_behind(self, place: str) -> Sequence[PlacedEnd]:
        self._removed.clear()
        return await self._store.jobs.ends(READ_AT_ONCE, place)

    def _is_due(self, place: str) -> bool:
        again_at, _ = self._again.get(place, (0.0, 0.0))
        return place not in self._in_hand and place not in self._removed and again_at <= time.monotonic()

    async def _send(self, entry: PlacedEnd) -> None:
        try:
            await self._send_sequels(entry.note)
            await self._store.jobs.drop_ends(entry.place)
            self._removed.add(entry.place)
            self._again.pop(entry.place, None)
        except MQServeError as error:
            self._put_off(entry.place)
            self._trouble.say(f"what follows from the end of a job waits: {error}")
        except Exception:
            self._put_off(entry.place)
            logger.exception("what follows from the end of a job waits: that is a bug in mqserve, please report it")
        finally:
            self._in_hand.discard(entry.place)
            self._slots.release()

    async def _send_sequels(self, raw: bytes) -> None:
        try:
            note = EndNote.from_bytes(raw)
        except BadEnvelope as error:
            return self._odd.say(f"an entry of the outbox is dropped: {error}")
        for sequel in note.sequels:
            try:
                await self._sequels[sequel](note)
            except BadEnvelope as error:  # all senders may write here
                self._odd.say(f"nothing follows from the end of a job ({sequel.value}): {error}")

    def _put_off(self, place: str) -> None:
        _, pause_s = self._again.get(place, (0.0, FIRST_PAUSE_S / 2))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._again[place] = (time.monotonic() + pause_s, pause_s)
