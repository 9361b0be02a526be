"""The results that this process waits for: of its own requests, told of in its inbox, and of others', by a poll."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..backoff import delays, keep_running
from ..errors import BadEnvelope, MQServeError, StoreUnavailable, untraced
from ..process.printable import printable
from ..process.tasks import Tasks
from ..result_bodies import with_body
from ..results import Outcome, Phase, Result, entry_of, late_result, read_entry
from ..store import Record, Store
from ..store_keys import StoreKeys

logger = logging.getLogger(__name__)

_EXPIRY_BUDGET_S = 0.5
_READ_AT_ONCE = 100
_FAILED_KEPT = 1000
_POLL_EVERY_S = 0.05
_LOOK_EVERY_S = 0.5
_IDLE_AFTER_S = 2.0  # without a write: members beat every second


@dataclass(frozen=True, slots=True)
class _Waiting:
    future: asyncio.Future[Result]
    on_end: Callable[[bool], None]
    sent_at: float  # monotonic


class PendingResults:
    """One inbox, one reader and one timer for the whole process. `run` must be running for any result to arrive."""

    def __init__(self, store: Store, keys: StoreKeys, process_id: str) -> None:
        self._store = store
        self._keys = keys
        self.inbox = keys.inbox(process_id)
        self._waiting: dict[str, _Waiting] = {}
        self._failed: dict[str, MQServeError] = {}  # the last requests that were never sent, or cancelled: no result will come
        self._deadlines: list[tuple[int, str]] = []  # a heap in store ms; entries of answered requests are skipped
        self._timer: asyncio.TimerHandle | None = None
        self._strangers: dict[str, asyncio.Future[Result]] = {}  # requests of other processes whose results are wanted here
        self._listeners: Counter[str] = Counter()  # the last one who stops waiting for a stranger's request ends its polling
        self._polling = False
        self._to_read: dict[str, None] = {}  # by key, in order of arrival: their notes may be lost, or hold no result
        self._reading = False
        self._fetching: set[str] = set()  # results whose bodies are on their way
        self._tasks = Tasks(self._ended)

    def __repr__(self) -> str:
        return f"<PendingResults of {self.inbox}, {len(self)} waiting>"

    def __len__(self) -> int:
        """Requests of this process that have no result yet."""
        return len(self._waiting)

    def __contains__(self, future_id: str) -> bool:
        """Whether it is a request of this process that has no result yet."""
        return future_id in self._waiting

    async def run(self) -> None:
        """Reads the inbox until cancelled."""
        self._tasks.start(self._refuse_what_cannot_be_stored())
        try:
            await keep_running("the reader of results", lambda: self._store.read_inbox(self.inbox, self._on_notes, self._read_again))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._tasks.cancel()
            for future in [*(waiting.future for waiting in self._waiting.values()), *self._strangers.values()]:
                future.cancel()

    def add(self, future_id: str, deadline_ms: int, on_end: Callable[[bool], None], *, sent_at: float) -> asyncio.Future[Result]:
        """For a request of this process. Ends by its deadline (plus at most a second); `on_end` is told then whether it was answered."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._failed.pop(future_id, None)  # of an id that is used again
        self._waiting[future_id] = _Waiting(future, on_end, sent_at)
        heapq.heappush(self._deadlines, (deadline_ms, future_id))
        if len(self._deadlines) > 2 * len(self._waiting) + 1000:  # most are of answered requests
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)
        if self._deadlines[0][1] == future_id:
            self._set_timer()
        return future

    def fail(self, future_id: str, error: MQServeError) -> None:
        """No result will come."""
        future = self.drop(future_id)
        if future is not None and not future.done():
            future.set_exception(error)
            self._failed[future_id] = untraced(error)
            if len(self._failed) > _FAILED_KEPT:
                del self._failed[next(iter(self._failed))]

    def drop(self, future_id: str, *, answered: bool = False) -> asyncio.Future[Result] | None:
        """Nobody waits for it any more; whoever did has this future."""
        waiting = self._waiting.pop(future_id, None)
        if waiting is None:
            return self._strangers.pop(future_id, None)
        waiting.on_end(answered)
        return waiting.future

    async def result(self, future_id: str, timeout_s: float | None) -> Result:
        """The result of any id, whoever sent it. Raises TimeoutError, which ends this wait and not the request, and what kept a request of
        this process from being sent."""
        waiting = self._waiting.get(future_id)
        if waiting is not None:
            future = waiting.future
        else:
            if (found := await self.peek(future_id)) is not None:
                return found
            if (failed := self._failed.get(future_id)) is not None:
                raise untraced(failed)
            future = self._strangers.setdefault(future_id, asyncio.get_running_loop().create_future())
            if not self._polling:
                self._polling = True
                self._tasks.start(self._poll_strangers())
        self._listeners[future_id] += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        finally:
            self._listeners[future_id] -= 1
            if not self._listeners[future_id]:
                del self._listeners[future_id]
                self._strangers.pop(future_id, None)

    async def has_result(self, future_ids: Sequence[str]) -> bool:
        """Whether one of these has an end, as one read of the store says. Raises StoreUnavailable."""
        if any(future_id in self._failed for future_id in future_ids):
            return True
        return any(raw is not None for raw in await self._store.get_many([self._keys.future(future_id) for future_id in future_ids]))

    async def first_result(self, future_ids: Sequence[str]) -> tuple[str, Result]:
        """(id, result) of whichever of these has one first; of several that have one, the first in the list."""
        waits = {asyncio.create_task(self.result(future_id, None)): future_id for future_id in future_ids}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            first = next(wait for wait in waits if wait in done)
            return waits[first], first.result()
        finally:
            for wait in waits:
                wait.cancel()

    async def _poll_strangers(self) -> None:
        """Results of requests that other processes sent have no place in our inbox: one poll for all of them."""
        try:
            while self._strangers:
                await asyncio.sleep(_POLL_EVERY_S)
                with suppress(StoreUnavailable):
                    await self._read_by_key(list(self._strangers))
        finally:
            self._polling = False

    async def peek(self, future_id: str) -> Result | None:
        """The result if it stands in the store."""
        raw = await self._store.get(self._keys.future(future_id))
        return None if raw is None else await with_body(self._store, self._keys, future_id, Result.from_bytes(raw))

    async def _refuse_what_cannot_be_stored(self) -> None:
        """While the store answers and takes no writes, a request that was sent after the first refusal has no result to come, so its caller
        is told. Results of earlier ones wait in their replicas for room.

        Members write their beat every second. While requests wait, a key is written besides that expires at once: the less time goes by
        before a refusal is known, the fewer requests are sent in vain.
        """
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._waiting and time.monotonic() - self._store.health.written_at > _LOOK_EVERY_S:
                with suppress(StoreUnavailable):
                    await self._store.probe()
            if refusal := self._store.health.refusal:
                refused_since, written_at = self._store.health.refused_since, self._store.health.written_at
                was_idle = refused_since - written_at > _IDLE_AFTER_S  # then nothing says when the refusals began: what it just sent counts
                self._fail_since(refused_since - _IDLE_AFTER_S / 2 if was_idle else refused_since, refusal)

    def _fail_since(self, refused_since: float, refusal: str) -> None:
        sent_in_vain = itertools.takewhile(lambda sent: sent[1].sent_at > refused_since, reversed(self._waiting.items()))  # the last first
        for future_id, _ in list(sent_in_vain):
            self.fail(future_id, StoreUnavailable(f"no result can be stored, since the store takes no writes: {refusal}", public=refusal))

    # Notes, and what stands under the keys.

    def _on_notes(self, raw_notes: list[bytes]) -> None:
        self._store.health.took_a_write()  # a result was stored: requests are taken again at once
        for raw in raw_notes:
            note = read_entry(raw)
            if note is None or note.id not in self._waiting:
                continue
            if note.payload:
                self._resolve(note.id, note.payload)
            else:
                self._read_soon([note.id])

    def _resolve(self, future_id: str, raw: bytes) -> None:
        try:
            result = Result.from_bytes(raw)
        except BadEnvelope as error:
            return self.fail(future_id, error)
        if result.ref:
            if future_id not in self._fetching:  # it may be read by its key again meanwhile
                self._fetching.add(future_id)
                self._tasks.start(self._resolve_by_reference(future_id, result))
        else:
            self._set(future_id, result)

    def _set(self, future_id: str, result: Result) -> None:
        future = self.drop(future_id, answered=result.outcome is not Outcome.LATE)
        if future is not None and not future.done():
            future.set_result(result)

    def _read_again(self) -> None:
        """Notes may have been lost: the keys are the truth."""
        self._read_soon(list(self._waiting))

    def _read_soon(self, future_ids: Sequence[str]) -> None:
        self._to_read.update(dict.fromkeys(future_ids))
        if self._to_read and not self._reading:
            self._reading = True
            self._tasks.start(self._read_until_read())

    async def _read_until_read(self) -> None:
        """No note comes twice: what cannot be read now is read later, as long as somebody waits for it."""
        pauses = delays()
        try:
            while wanted := [future_id for future_id in self._to_read if future_id in self._waiting][:_READ_AT_ONCE]:
                try:
                    await self._read_by_key(wanted)
                except StoreUnavailable as error:
                    logger.warning("cannot read %d results yet: %s", len(self._to_read), error)
                    await asyncio.sleep(next(pauses))
                else:
                    pauses = delays()
                    for future_id in wanted:
                        self._to_read.pop(future_id, None)
        finally:
            self._reading = False
            self._to_read.clear()

    async def _read_by_key(self, future_ids: Sequence[str]) -> None:
        """Resolves those that have a result. Raises StoreUnavailable."""
        for start in range(0, len(future_ids), _READ_AT_ONCE):
            some = future_ids[start : start + _READ_AT_ONCE]
            found = await self._store.get_many([self._keys.future(future_id) for future_id in some])
            for future_id, raw in zip(some, found, strict=True):
                if raw is not None:
                    self._resolve(future_id, raw)

    async def _resolve_by_reference(self, future_id: str, result: Result) -> None:
        try:
            for pause_s in delays():
                try:
                    return self._set(future_id, await with_body(self._store, self._keys, future_id, result))
                except StoreUnavailable as error:
                    if future_id not in self._waiting and future_id not in self._strangers:
                        return
                    logger.warning("cannot read the result of request %s yet: %s", printable(future_id), error)
                except MQServeError as error:
                    return self.fail(future_id, error)
                await asyncio.sleep(pause_s)
        finally:
            self._fetching.discard(future_id)

    # Deadlines: one timer for the earliest.

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0, self._deadlines[0][0] - self._store.now_ms()) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay_s + 0.001, self._expire)

    def _expire(self) -> None:
        now_ms = self._store.now_ms()
        late: list[str] = []
        while self._deadlines and (self._deadlines[0][0] <= now_ms or self._deadlines[0][1] not in self._waiting):
            _, future_id = heapq.heappop(self._deadlines)
            if future_id in self._waiting:
                late.append(future_id)
        if late:
            self._tasks.start(self._record_late(late))
        if self._deadlines:
            self._set_timer()

    async def _record_late(self, late: list[str]) -> None:
        """Each one's result is its lateness, unless a replica was first; whoever waits is told within `_EXPIRY_BUDGET_S`."""
        marks: dict[str, bytes | None] = {}
        recording = self._tasks.start(self._record_lateness(late, marks))
        await asyncio.wait([recording], timeout=_EXPIRY_BUDGET_S)  # it goes on beyond that: others may read what became of them
        unstored = self._store.health.refusal  # known by now: lateness is a result, too
        for future_id in late:
            self._set(future_id, late_result(Phase.RUN if marks.get(future_id) else Phase.QUEUE, unstored))

    async def _record_lateness(self, late: list[str], marks: dict[str, bytes | None]) -> None:
        try:
            marks.update(zip(late, await self._store.get_many([self._keys.start(future_id) for future_id in late]), strict=True))
            records: list[asyncio.Future[bool]] = []
            for future_id, mark in marks.items():
                raw = late_result(Phase.RUN if mark else Phase.QUEUE).to_bytes()
                records.append(self._store.record(Record(self._keys.future(future_id), raw, "", entry_of(future_id, raw), 0)))
            first = await asyncio.gather(*records)
            await self._read_by_key([future_id for future_id, fresh in zip(late, first, strict=True) if not fresh])
        except StoreUnavailable:
            pass  # they are late all the same, and those who wait must hear so

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error(
                "results of this process are not read as they should be: that is a bug in mqserve, please report it", exc_info=error
            )
