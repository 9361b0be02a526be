"""What happens to jobs, as a process follows it: the inbox tells of each event, and the store has what the inbox did not bring."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ..errors import BadEnvelope, StoreUnavailable
from ..job_store import NumberedEvent
from ..jobs import KEPT_EVENTS, EventKind, JobEvent, JobRecord, JobState
from ..process.tasks import Tasks
from ..results import InboxEntry
from ..store import Store
from .job_waits import Registrations

logger = logging.getLogger(__name__)

_FINAL = frozenset(state.value for state in JobState if state.is_final)


class JobFollower:
    """One reader of the events of a job, in their order: `async for` yields each once, and ends behind the final state.

    Use it in `JobFollowers.follow`. It waits also for a job that is not known yet. `more` is for readers with a time of their own.
    """

    def __init__(self, id: str, after: int, read_on: Callable[[], None]) -> None:
        self.id = id
        self._read_on = read_on  # reads behind `heard` from the store
        self.heard = after  # the number of the last event that came in
        self.has_ended = False  # whether the final state has come in
        self._events: deque[NumberedEvent] = deque()
        self._news = asyncio.Event()
        self._is_stopped = False
        self._is_behind = False  # whether some were dropped, since the reader takes too few

    def __repr__(self) -> str:
        return f"<JobFollower of {self.id} up to {self.heard}, {len(self._events)} to take>"

    def __aiter__(self) -> JobFollower:
        return self

    async def __anext__(self) -> NumberedEvent:
        while not self._events:
            if self.is_over:
                raise StopAsyncIteration
            await self._wait()
        event = self._events.popleft()
        self._catch_up()
        return event

    async def more(self, timeout_s: float | None = None) -> list[NumberedEvent]:
        """Waits until there is something, and takes it all. Returns nothing at the end, and after `timeout_s`."""
        if not self._events and not self.is_over:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wait()
        taken = list(self._events)
        self._events.clear()
        self._catch_up()
        return taken

    @property
    def is_over(self) -> bool:
        """Whether no more comes in."""
        return self.has_ended or self._is_stopped

    def take(self, numbered: NumberedEvent) -> bool:
        """Takes an event that came in. Returns False if one before it did not."""
        seq, event = numbered
        is_final = event.kind is EventKind.STATE and event.state in _FINAL
        if self.is_over or (seq <= self.heard and not is_final):
            return True
        if self._is_full():
            return True
        if seq > self.heard + 1:
            return False
        self._add(numbered, is_final)
        return True

    def take_all(self, events: list[NumberedEvent], record: JobRecord | None) -> None:
        """Takes what the store has now; those before the first one are not kept any more. A job that has ended has no more."""
        for numbered in events:
            if self._is_full():
                return
            self.heard = max(self.heard, numbered.seq - 1)
            self.take(numbered)
        if record is not None and record.state.is_final and not self.has_ended:
            self._add(NumberedEvent(self.heard + 1, JobEvent(EventKind.STATE, record.ended_ms, record.state)), True)

    def stop(self) -> None:
        self._is_stopped = True
        self._news.set()

    def _is_full(self) -> bool:
        """Whether the reader holds as many as are kept, so that it can read the later ones again."""
        self._is_behind = self._is_behind or len(self._events) >= KEPT_EVENTS
        return self._is_behind

    def _catch_up(self) -> None:
        if self._is_behind and not self._events:
            self._is_behind = False
            self._read_on()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _add(self, numbered: NumberedEvent, is_final: bool) -> None:
        if self.is_over:
            return
        self.heard, self.has_ended = max(self.heard, numbered.seq), is_final
        self._events.append(numbered)
        self._news.set()


class JobFollowers:
    """All followers of this process."""

    def __init__(self, store: Store, inbox: str, tasks: Tasks) -> None:
        self._store = store
        self._inbox = inbox
        self._tasks = tasks
        self._followers: dict[str, list[JobFollower]] = {}
        self._healing: dict[str, bool] = {}  # jobs that are read from the store now, each with whether that is to be done again
        self._registrations = Registrations(tasks, self._read, lambda: list(self._followers))

    def __repr__(self) -> str:
        return f"<JobFollowers of {len(self._followers)} jobs>"

    async def follow(self, future_id: str, after: int = 0) -> JobFollower:
        """Begins to follow the events behind the number `after`. Call `leave` at the end. Raises StoreUnavailable, and BadEnvelope for what
        is no record."""
        follower = JobFollower(future_id, after, lambda: self._heal_soon(future_id))
        self._followers.setdefault(future_id, []).append(follower)
        self._registrations.begin()
        try:
            await self._read(future_id)
        except BaseException:
            self.leave(follower)
            raise
        return follower

    def leave(self, follower: JobFollower) -> None:
        followers = self._followers.get(follower.id, [])
        if follower in followers:
            followers.remove(follower)
            if not followers:
                del self._followers[follower.id]

    def hear(self, entry: InboxEntry) -> None:
        """Takes an inbox entry of kind EVENT_KIND."""
        followers = self._followers.get(entry.id)
        if not followers:
            return
        try:
            event = JobEvent.from_bytes(entry.payload)
        except BadEnvelope as error:
            logger.warning("leaving out an event: %s", error)
            return
        if not all([follower.take(NumberedEvent(entry.seq, event)) for follower in followers]):
            self._heal_soon(entry.id)

    def register_again(self) -> None:
        self._registrations.renew_now()

    def stop(self) -> None:
        """Ends all, since this process stops reading."""
        for followers in self._followers.values():
            for follower in followers:
                follower.stop()

    def _heal_soon(self, future_id: str) -> None:
        """Has the job read once for all that comes in behind one gap."""
        if future_id not in self._healing:
            self._tasks.start(self._heal(future_id))
        self._healing[future_id] = True

    async def _heal(self, future_id: str) -> None:
        try:
            while self._healing[future_id]:  # what came in meanwhile may be younger than what was read
                self._healing[future_id] = False
                await self._read(future_id)
        except (StoreUnavailable, BadEnvelope) as error:  # the next renewal reads again
            logger.warning("cannot read the events of job %s yet: %s", future_id, error)
        finally:
            del self._healing[future_id]

    async def _read(self, future_id: str) -> None:
        """Registers, and then reads what came before."""
        record = await self._store.jobs.follow(future_id, self._inbox)
        followers = list(self._followers.get(future_id, ()))
        if not followers:
            return
        events = await self._store.jobs.events(future_id, min(follower.heard for follower in followers))
        for follower in followers:
            follower.take_all(list(events), record)
