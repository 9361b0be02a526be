"""Batches results, marks and posts on their way to the store: those of one loop turn leave in one call, or in two if they are many, and
those that arrive during a call leave in the next."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from enum import Enum, auto

from ..backoff import delays
from ..errors import StoreUnavailable
from ..store import OnRecorded, Record, StoreClosed, recorded

FLUSH_BATCH = 128
EARLY_BATCH = 32  # so many leave before the turn ends: Redis and the proxy work on them while this process takes the rest of its results
FEW_POSTS = 32  # fit one batch, whatever they are: the largest have 64 KiB
FLUSH_BYTES = 4 * 1024 * 1024  # per batch, or one larger result: a call that takes longer than its budget would be retried for ever
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0

logger = logging.getLogger(__name__)

_Waiting = tuple[Record, OnRecorded]

Mark = tuple[str, bytes, int]
"""Key, value, TTL in ms; a TTL of 0 deletes the key."""

Post = tuple[str, bytes]
"""Key of a list, and the entry to append."""

OnWritten = Callable[[Sequence[int] | Exception], None]
"""Gets a number for each result (0 if another result stood there first), or an error: StoreUnavailable, or another, which is a bug."""

Write = Callable[[Sequence[Record], Sequence[Mark], Sequence[Post], OnWritten], None]
"""Writes a batch: it calls the last argument once, later, unless it raises."""


class _State(Enum):
    IDLE = auto()  # nothing to write
    COLLECTING = auto()  # until the end of this loop turn, or until there are EARLY_BATCH results
    WRITING = auto()  # a batch is on its way; what comes meanwhile waits for the next one
    PAUSING = auto()  # after a failure
    CLOSED = auto()


class ResultWriter:
    """Writes results, marks and posts through a function of its owner, one batch at a time. No task, future or timer is made for a batch
    that is written: replicas do this for every request."""

    def __init__(self, write: Write, now_ms: Callable[[], int]) -> None:
        self._write = write
        self._now_ms = now_ms
        self._loop = asyncio.get_running_loop()
        self._state = _State.IDLE
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._buffer: list[_Waiting] = []
        self._batch: list[_Waiting] = []  # on its way
        self._marks: list[Mark] = []
        self._posts: list[Post] = []
        self._pauses = delays(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ResultWriter {self._state.name}, {len(self._buffer)} to write>"

    def record(self, record: Record) -> asyncio.Future[bool]:
        """See `Store.record`."""
        return recorded(self.record_then, record)

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        """See `Store.record_then`."""
        self._buffer.append((record, on_recorded))
        if self._state is _State.COLLECTING and len(self._buffer) >= EARLY_BATCH:
            self._flush()
        else:
            self._flush_soon()

    def mark(self, key: str, value: bytes, ttl_ms: int) -> None:
        """Writes a mark with the next batch. Nobody waits for it, and it may be lost."""
        self._marks.append((key, value, ttl_ms))
        self._flush_soon()

    def post(self, key: str, entry: bytes) -> None:
        """Appends to a list with the next batch. Nobody waits for it, and it may be lost."""
        self._posts.append((key, entry))
        self._flush_soon()

    async def close(self, budget_s: float) -> None:
        """Writes the remaining batches within the budget. The results that are left unwritten end in StoreClosed."""
        try:
            async with asyncio.timeout(budget_s):
                await self._is_idle.wait()
        except TimeoutError:
            pass
        finally:
            self._state = _State.CLOSED
            if self._timer is not None:
                self._timer.cancel()
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        rest = [*self._batch, *self._buffer]
        self._batch, self._buffer, self._marks, self._posts = [], [], [], []
        for _, on_recorded in rest:
            _tell(on_recorded, StoreClosed("the store was closed"))

    def _flush_soon(self) -> None:
        if self._state is _State.IDLE:
            self._state = _State.COLLECTING
            self._is_idle.clear()
            self._loop.call_soon(self._end_turn)
        elif self._state is _State.CLOSED:
            self._refuse_the_rest()

    def _end_turn(self) -> None:
        if self._state is _State.COLLECTING:  # else they have left
            self._flush()

    def _flush(self) -> None:
        if self._state is _State.CLOSED:
            return
        if not self._buffer and not self._marks and not self._posts:
            self._state = _State.IDLE
            self._is_idle.set()
            return
        self._state = _State.WRITING
        self._batch = self._next_batch()
        marks, self._marks = self._marks, []
        posts = self._next_posts() if self._posts else []
        try:
            self._write([record for record, _ in self._batch], marks, posts, self._written)
        except Exception as error:
            self._written(error)

    def _written(self, outcome: Sequence[int] | Exception) -> None:
        if self._state is _State.CLOSED:
            return
        batch, self._batch = self._batch, []
        if not isinstance(outcome, Exception):
            for (_, on_recorded), fresh in zip(batch, outcome, strict=True):
                _tell(on_recorded, bool(fresh))
            self._pauses = delays(FIRST_PAUSE_S, LONGEST_PAUSE_S)
            return self._flush()
        if isinstance(outcome, StoreUnavailable):
            self._buffer = self._give_up_late(batch, outcome) + self._buffer
        else:  # the owners of these results requeue their messages
            logger.error("%d results could not be written: that is a bug in mqserve, please report it", len(batch), exc_info=outcome)
            for _, on_recorded in batch:
                _tell(on_recorded, outcome)
        self._state = _State.PAUSING
        self._timer = self._loop.call_later(next(self._pauses), self._flush)

    def _next_batch(self) -> list[_Waiting]:
        count = size = 0
        for record, _ in self._buffer[:FLUSH_BATCH]:
            size += len(record.value) + len(record.note)
            if count and size > FLUSH_BYTES:
                break
            count += 1
        batch, self._buffer = self._buffer[:count], self._buffer[count:]
        return batch

    def _next_posts(self) -> list[Post]:
        """Takes the posts that fit one batch, in their order."""
        count = len(self._posts)
        if count > FEW_POSTS:
            sizes = itertools.accumulate(len(entry) for _, entry in self._posts)
            count = max(1, sum(1 for _ in itertools.takewhile(lambda size: size <= FLUSH_BYTES, sizes)))
        posts, self._posts = self._posts[:count], self._posts[count:]
        return posts

    def _give_up_late(self, batch: Sequence[_Waiting], error: StoreUnavailable) -> list[_Waiting]:
        """Returns the part of the batch that is still in time for another try. The others end in the error, so that their messages are
        requeued."""
        now_ms = self._now_ms()
        for record, on_recorded in batch:
            if record.deadline_ms <= now_ms:
                _tell(on_recorded, error)
        return [waiting for waiting in batch if waiting[0].deadline_ms > now_ms]


def _tell(on_recorded: OnRecorded, outcome: bool | Exception) -> None:
    try:
        on_recorded(outcome)
    except Exception:  # the other results of the batch must be told all the same
        logger.exception("the outcome of a result was not taken: that is a bug in mqserve, please report it")
