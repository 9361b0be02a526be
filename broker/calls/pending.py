"""The results that this process waits for. The inbox announces those of its own requests, and of all jobs that it waits for; results of
other processes' requests are polled."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from ..backoff import delays, keep_running
from ..errors import BadEnvelope, MQServeError, StoreUnavailable, untraced
from ..process.printable import printable
from ..process.tasks import Tasks
from ..result_bodies import with_body
from ..results import CHUNK_KIND, EVENT_KIND, InboxEntry, Outcome, Phase, Result, entry_of, late_result, read_entry
from ..store import Record, Store
from ..store_keys import StoreKeys
from .call import Call, Ticket
from .incoming import IncomingStream
from .incoming_streams import IncomingStreams
from .job_events import JobFollowers
from .job_waits import JobWaits

logger = logging.getLogger(__name__)

_EXPIRY_BUDGET_S = 0.5
_READ_AT_ONCE = 100
_FAILED_KEPT = 1000
_POLL_EVERY_S = 0.05
_LOOK_EVERY_S = 0.5
_IDLE_AFTER_S = 2.0  # members write a heartbeat every second, so a pause this long means that nothing tried to write


class PendingResults:
    """One inbox, one reader and one timer for the whole process. `run` must be running for any result to arrive. With `leaves_files`
    results whose bodies are files come without them."""

    def __init__(self, store: Store, keys: StoreKeys, process_id: str, *, leaves_files: bool = False) -> None:
        self._store = store
        self._keys = keys
        self._leaves_files = leaves_files
        self.inbox = keys.inbox(process_id)
        self._waiting: dict[str, Call] = {}
        self._failed: dict[str, MQServeError] = {}  # error of each of the latest requests that failed before a result could come
        self._deadlines: list[tuple[int, str]] = []  # a heap of (store time in ms, id); entries of answered requests are skipped
        self._timer: asyncio.TimerHandle | None = None
        self._strangers: dict[str, asyncio.Future[Result]] = {}  # requests of other processes whose results are awaited here
        self._listeners: Counter[str] = Counter()  # callers per awaited id; when the last one stops waiting, polling for the id ends
        self._polling = False
        self._to_read: dict[str, None] = {}  # ids to read by key, oldest first: their inbox entry may be lost, or held no result
        self._reading = False
        self._fetching: set[str] = set()  # ids of results whose bodies are being read
        self._tasks = Tasks(self._ended)
        self.jobs = JobWaits(store, self.inbox, self._tasks, self._read_soon, self.fail)
        self.followers = JobFollowers(store, self.inbox, self._tasks)
        self.on_session: Callable[[InboxEntry], None] = lambda entry: None
        self.streams = IncomingStreams(
            store, keys, self.inbox, self._tasks, on_head=self._on_head, on_loss=self._on_loss, on_result=self._resolve
        )

    def __repr__(self) -> str:
        return f"<PendingResults of {self.inbox}, {len(self)} waiting>"

    def __len__(self) -> int:
        """Requests of this process that have no answer yet, and streamed answers that it reads."""
        return len(self._waiting) + len(self.streams)

    def __contains__(self, future_id: str) -> bool:
        """Whether it is a request of this process that has no answer yet, and none has begun."""
        return future_id in self._waiting

    async def run(self) -> None:
        """Reads the inbox until cancelled."""
        self._tasks.start(self._fail_while_refused())
        try:
            await keep_running("the reader of results", lambda: self._store.read_inbox(self.inbox, self._on_notes, self._read_again))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._tasks.cancel()
            waiting, self._waiting = self._waiting, {}  # nothing else may end them now
            for call in waiting.values():
                call.abandoned()
            self.streams.stop()
            self.followers.stop()
            for future in self._strangers.values():
                future.cancel()

    def add(self, call: Call) -> None:
        """Registers a request of this process. It ends by its deadline (plus at most a second)."""
        self._failed.pop(call.id, None)  # a caller's own id may be used again after a failure
        self._waiting[call.id] = call
        heapq.heappush(self._deadlines, (call.deadline_ms, call.id))
        if len(self._deadlines) > 2 * len(self._waiting) + 1000:  # most entries belong to answered requests: rebuild the heap without them
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)
        if self._deadlines[0][1] == call.id:
            self._set_timer()

    def fail(self, future_id: str, error: MQServeError) -> None:
        """Ends the wait with `error`, because no result will come."""
        call, stranger = self.drop(future_id), self._strangers.pop(future_id, None)
        was_read = self.streams.fail(future_id, error)
        if call is None and stranger is None and not was_read:
            return
        self._failed[future_id] = untraced(error)
        if len(self._failed) > _FAILED_KEPT:
            del self._failed[next(iter(self._failed))]
        if call is not None:
            call.failed(error)
        if stranger is not None and not stranger.done():
            stranger.set_exception(error)

    def get(self, future_id: str) -> Call | None:
        return self._waiting.get(future_id)

    def drop(self, future_id: str, *, answered: bool = False) -> Call | None:
        """Removes a request of this process and returns it, so that the caller can end it. Returns None for an unknown id."""
        call = self._waiting.pop(future_id, None)
        if call is not None:
            call.ended(by_result=answered)
        return call

    async def result(self, future_id: str, timeout_s: float | None) -> Result:
        """Waits for the result of any id, whichever process sent the request. Raises TimeoutError, which ends this wait and not the
        request, or the error that kept a request of this process from being sent."""
        call = self._waiting.get(future_id)
        if isinstance(call, Ticket):
            future = call.future
        else:
            if (found := await self.peek(future_id)) is not None:
                return found
            if (failed := self._failed.get(future_id)) is not None:
                raise untraced(failed)
            future = self._stranger(future_id)
            if not self._polling:
                self._polling = True
                self._tasks.start(self._poll_strangers())
        with self._listening(future_id):
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)

    async def job_result(self, future_id: str, timeout_s: float | None) -> Result:
        """Waits for the result of a job, whichever process sent it, without asking for it again and again; also of one that is not known
        yet. Raises TimeoutError, which ends this wait and not the job, ResultGone for a job whose result is not kept any more, and
        StoreUnavailable."""
        future = self._stranger(future_id)  # before it is registered: its end may be told at once
        with self._listening(future_id):
            async with asyncio.timeout(timeout_s):
                await self.jobs.register(future_id)
                return await asyncio.shield(future)

    def _stranger(self, future_id: str) -> asyncio.Future[Result]:
        return self._strangers.setdefault(future_id, asyncio.get_running_loop().create_future())

    @contextmanager
    def _listening(self, future_id: str) -> Iterator[None]:
        self._listeners[future_id] += 1
        try:
            yield
        finally:
            self._listeners[future_id] -= 1
            if not self._listeners[future_id]:
                del self._listeners[future_id]
                self._strangers.pop(future_id, None)
                self.jobs.drop(future_id)

    async def has_result(self, future_ids: Sequence[str]) -> bool:
        """Whether at least one of these requests has a result or has failed; reads the store once. Raises StoreUnavailable."""
        if any(future_id in self._failed for future_id in future_ids):
            return True
        return any(raw is not None for raw in await self._store.get_many([self._keys.future(future_id) for future_id in future_ids]))

    async def first_result(self, future_ids: Sequence[str]) -> tuple[str, Result]:
        """Returns (id, result) of the request that is done first; if several are done already, the first in the list."""
        for future_id in future_ids if len(future_ids) > 1 else ():  # one after the other: reads at the same time may end in any order
            if future_id not in self._waiting and (found := await self.peek(future_id)) is not None:
                return future_id, found
        waits = {asyncio.create_task(self.result(future_id, None)): future_id for future_id in future_ids}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            first = next(wait for wait in waits if wait in done)
            return waits[first], first.result()
        finally:
            for wait in waits:
                wait.cancel()

    async def _poll_strangers(self) -> None:
        """Polls for the results of other processes' requests, with one read for all of them: their replicas do not write to our inbox."""
        try:
            while polled := [future_id for future_id in self._strangers if future_id not in self.jobs]:
                await asyncio.sleep(_POLL_EVERY_S)
                with suppress(StoreUnavailable):
                    await self._read_by_key(polled)
        finally:
            self._polling = False

    async def peek(self, future_id: str) -> Result | None:
        """The result if the store has it, else None."""
        result = await self.peek_head(future_id)
        return None if result is None else await self._with_body(future_id, result)

    async def _with_body(self, future_id: str, result: Result) -> Result:
        if result.file is not None and self._leaves_files:
            return result
        return await with_body(self._store, self._keys, future_id, result)

    async def peek_head(self, future_id: str) -> Result | None:
        """The result if the store has it, without a body that has a key of its own."""
        raw = await self._store.get(self._keys.future(future_id))
        return None if raw is None else Result.from_bytes(raw)

    async def _fail_while_refused(self) -> None:
        """Fails the requests that were sent after the store began to refuse writes, because their results cannot be stored. Requests sent
        earlier keep waiting: their replicas hold the results until the store has room.

        Members write a heartbeat every second. While requests wait, `probe` also writes a key that expires at once: the sooner a refusal
        is known, the fewer requests are sent in vain.
        """
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._waiting and time.monotonic() - self._store.health.written_at > _LOOK_EVERY_S:
                with suppress(StoreUnavailable):
                    await self._store.probe()
            if refusal := self._store.health.refusal:
                refused_since, written_at = self._store.health.refused_since, self._store.health.written_at
                # no write tells when the refusals began, so requests sent just before count too
                was_idle = refused_since - written_at > _IDLE_AFTER_S
                self._fail_since(refused_since - _IDLE_AFTER_S / 2 if was_idle else refused_since, refusal)

    def _fail_since(self, refused_since: float, refusal: str) -> None:
        # the latest first
        sent_in_vain = itertools.takewhile(lambda sent: sent[1].sent_at > refused_since, reversed(self._waiting.items()))
        for future_id, _ in list(sent_in_vain):
            self.fail(future_id, StoreUnavailable(f"no result can be stored, since the store takes no writes: {refusal}", public=refusal))

    # Inbox entries, and results read by key.

    def _on_notes(self, raw_notes: list[bytes]) -> None:
        self._store.health.took_a_write()  # a replica stored a result, so the store takes writes again
        for raw in raw_notes:
            note = read_entry(raw)
            if note is None:
                continue
            if note.kind:
                self._on_other(note)
            elif note.id not in self._waiting and note.id not in self.streams and note.id not in self._strangers:
                continue
            elif note.payload:
                self._resolve(note.id, note.payload)
            else:
                self._read_soon([note.id])

    def _on_other(self, note: InboxEntry) -> None:
        if note.kind == CHUNK_KIND:
            self._on_frame(note)
        elif note.kind == EVENT_KIND:
            self.followers.hear(note)
        else:
            self.on_session(note)

    def _on_frame(self, note: InboxEntry) -> None:
        if note.id in self._waiting:
            self.streams.expect(note.id)
        self.streams.hear(note.id, note.seq, note.payload)

    def _on_head(self, stream: IncomingStream) -> None:
        if (call := self.drop(stream.id, answered=True)) is not None:
            call.began(stream)
        else:
            stream.abandon()  # it is late, or was cancelled

    def _on_loss(self, stream: IncomingStream) -> None:
        if (call := self.drop(stream.id)) is not None:
            call.failed(StoreUnavailable("the beginning of the answer is not in the store any more: send the request again"))

    def _resolve(self, future_id: str, raw: bytes) -> None:
        try:
            result = Result.from_bytes(raw)
        except BadEnvelope as error:
            return self.fail(future_id, error)
        if result.ref:
            if future_id not in self._fetching:  # a result may be read by key twice
                self._fetching.add(future_id)
                self._tasks.start(self._resolve_by_reference(future_id, result))
        elif result.frames:
            self._end_stream(future_id, result)
        else:
            self._set(future_id, result)

    def _end_stream(self, future_id: str, result: Result) -> None:
        """The answer is in frames, some of which may still have to be read."""
        if future_id in self._waiting:
            self.streams.expect(future_id)
        self.streams.ends(future_id, result)
        self._tell_strangers(future_id, result)

    def _set(self, future_id: str, result: Result) -> None:
        if (call := self.drop(future_id, answered=result.error is None or result.outcome is not Outcome.LATE)) is not None:
            call.answered(result)
        elif self.streams:
            self.streams.ends(future_id, result)
        if self._strangers:
            self._tell_strangers(future_id, result)

    def _tell_strangers(self, future_id: str, result: Result) -> None:
        if (stranger := self._strangers.pop(future_id, None)) is not None and not stranger.done():
            stranger.set_result(result)

    def _read_again(self) -> None:
        """Reads all pending results by key, and the streams of answers that flow, because inbox entries may have been lost."""
        self._read_soon([*self._waiting, *self.streams])
        self.streams.heal_all()
        self.jobs.register_again()
        self.followers.register_again()
        if self._waiting:
            self._tasks.start(self._find_streams(list(self._waiting)))

    async def _find_streams(self, future_ids: Sequence[str]) -> None:
        """Begins to read the answers that have begun to flow: their first frames may be lost. A failed read is repeated."""
        for start in range(0, len(future_ids), _READ_AT_ONCE):
            for pause_s in delays():
                some = [future_id for future_id in future_ids[start : start + _READ_AT_ONCE] if future_id in self._waiting]
                with suppress(StoreUnavailable):
                    await self.streams.find(some)
                    break
                await asyncio.sleep(pause_s)

    def _read_soon(self, future_ids: Sequence[str]) -> None:
        self._to_read.update(dict.fromkeys(future_ids))
        if self._to_read and not self._reading:
            self._reading = True
            self._tasks.start(self._read_pending())

    async def _read_pending(self) -> None:
        """Reads by key until nothing is left to read. An entry is sent once only, so a failed read is repeated for as long as somebody
        waits."""
        pauses = delays()
        try:
            while wanted := [id for id in self._to_read if self._is_wanted(id)][:_READ_AT_ONCE]:
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

    def _is_wanted(self, future_id: str) -> bool:
        return future_id in self._waiting or future_id in self.streams or future_id in self._strangers

    async def _read_by_key(self, future_ids: Sequence[str]) -> None:
        """Resolves the requests that have a result. Raises StoreUnavailable."""
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
                    whole = await self._with_body(future_id, result)
                    if (call := self._waiting.get(future_id)) is not None and call.reads_alone:
                        self._store.drop_soon(self._keys.result_body(future_id))
                    return self._set(future_id, whole)
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
        """Records a timeout as the result of each request, unless a replica recorded one first (NX). The callers are told within
        `_EXPIRY_BUDGET_S`."""
        marks: dict[str, bytes | None] = {}
        recording = self._tasks.start(self._record_lateness(late, marks))
        # the write goes on after the budget: other processes may read the outcome
        await asyncio.wait([recording], timeout=_EXPIRY_BUDGET_S)
        unstored = self._store.health.refusal  # read after the write: the write itself shows whether the store refuses
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
            pass  # the requests have timed out all the same, and their callers must be told

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error(
                "results of this process are not read as they should be: that is a bug in mqserve, please report it", exc_info=error
            )
