"""Batches results and marks on their way to the store: those of one loop turn leave in one call, and those that arrive during a call
leave in the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import Enum, auto

from ..backoff import delays
from ..errors import StoreUnavailable
from ..store import Record

FLUSH_BATCH = 128
FLUSH_BYTES = 4 * 1024 * 1024  # per batch, or one larger result: a call that takes longer than its budget would be retried for ever
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0

logger = logging.getLogger(__name__)

Mark = tuple[str, bytes, int]
"""Key, value, TTL in ms; a TTL of 0 deletes the key."""

OnWritten = Callable[[Sequence[int] | Exception], None]
"""Gets a number for each result (0 if another result stood there first), or an error: StoreUnavailable, or another, which is a bug."""

Write = Callable[[Sequence[Record], Sequence[Mark], OnWritten], None]
"""Writes a batch: it calls the last argument once, later, unless it raises."""


class _State(Enum):
    IDLE = auto()  # nothing to write
    COLLECTING = auto()  # until the end of this loop turn
    WRITING = auto()  # a batch is on its way; what comes meanwhile waits for the next one
    PAUSING = auto()  # after a failure
    CLOSED = auto()


class ResultWriter:
    """Writes results and marks through a function of its owner, one batch at a time. No task, future or timer is made for a batch that is
    written: replicas do this for every request."""

    def __init__(self, write: Write, now_ms: Callable[[], int]) -> None:
        self._write = write
        self._now_ms = now_ms
        self._state = _State.IDLE
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._buffer: list[tuple[Record, asyncio.Future[bool]]] = []
        self._batch: list[tuple[Record, asyncio.Future[bool]]] = []  # on its way
        self._marks: list[Mark] = []
        self._pauses = delays(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ResultWriter {self._state.name}, {len(self._buffer)} to write>"

    def record(self, record: Record) -> asyncio.Future[bool]:
        """See `Store.record`."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._buffer.append((record, done))
        self._flush_soon()
        return done

    def mark(self, key: str, value: bytes, ttl_ms: int) -> None:
        """Writes a mark with the next batch. Nobody waits for it, and it may be lost."""
        self._marks.append((key, value, ttl_ms))
        self._flush_soon()

    async def close(self, budget_s: float) -> None:
        """Writes the remaining batches within the budget. The futures of unwritten results are cancelled."""
        try:
            async with asyncio.timeout(budget_s):
                await self._is_idle.wait()
        except TimeoutError:
            pass
        finally:
            self._state = _State.CLOSED
            if self._timer is not None:
                self._timer.cancel()
            self._cancel()

    def _cancel(self) -> None:
        for _, done in [*self._batch, *self._buffer]:
            done.cancel()
        self._batch, self._buffer, self._marks = [], [], []

    def _flush_soon(self) -> None:
        if self._state is _State.IDLE:
            self._state = _State.COLLECTING
            self._is_idle.clear()
            asyncio.get_running_loop().call_soon(self._flush)
        elif self._state is _State.CLOSED:
            self._cancel()

    def _flush(self) -> None:
        if self._state is _State.CLOSED:
            return
        if not self._buffer and not self._marks:
            self._state = _State.IDLE
            self._is_idle.set()
            return
        self._state = _State.WRITING
        self._batch = self._next_batch()
        marks, self._marks = self._marks, []
        try:
            self._write([record for record, _ in self._batch], marks, self._written)
        except Exception as error:
            self._written(error)

    def _written(self, outcome: Sequence[int] | Exception) -> None:
        if self._state is _State.CLOSED:
            return
        batch, self._batch = self._batch, []
        if not isinstance(outcome, Exception):
            for (_, done), fresh in zip(batch, outcome, strict=True):
                if not done.done():
                    done.set_result(bool(fresh))
            self._pauses = delays(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            return self._flush()
        if isinstance(outcome, StoreUnavailable):
            self._buffer = self._give_up_late(batch, outcome) + self._buffer
        else:  # the owners of these results requeue their messages
            logger.error("%d results could not be written: that is a bug in mqserve, please report it", len(batch), exc_info=outcome)
            for _, done in batch:
                if not done.done():
                    done.set_exception(outcome)
        self._state = _State.PAUSING
        self._timer = asyncio.get_running_loop().call_later(next(self._pauses), self._flush)

    def _next_batch(self) -> list[tuple[Record, asyncio.Future[bool]]]:
        count = size = 0
        for record, _ in self._buffer[:FLUSH_BATCH]:
            size += len(record.value) + len(record.note)
            if count and size > FLUSH_BYTES:
                break
            count += 1
        batch, self._buffer = self._buffer[:count], self._buffer[count:]
        return batch

    def _give_up_late(
        self, batch: list[tuple[Record, asyncio.Future[bool]]], error: StoreUnavailable
    ) -> list[tuple[Record, asyncio.Future[bool]]]:
        """Returns the part of the batch that is still in time for another try. The futures of the others fail, so that their messages are
        requeued."""
        now_ms = self._now_ms()
        for record, done in batch:
            if record.deadline_ms <= now_ms and not done.done():
                done.set_exception(error)
        return [(record, done) for record, done in batch if not done.done()]
