"""Batches what one loop turn brings on its way to the store: it leaves in one call, and what arrives during a call leaves in the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, Generic, TypeVar

from ..backoff import delays
from ..errors import StoreUnavailable
from ..store import StoreClosed

FLUSH_BATCH = 128
FLUSH_BYTES = 4 * 1024 * 1024  # per batch, or one larger thing: a call that takes longer than its budget would be retried for ever
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


class State(Enum):
    IDLE = auto()  # nothing to write
    COLLECTING = auto()  # until the end of this loop turn, or until a subclass flushes
    WRITING = auto()  # a batch is on its way; what comes meanwhile waits for the next one
    PAUSING = auto()  # after a failure
    CLOSED = auto()


class BatchWriter(Generic[T]):
    """Writes one batch at a time, without a task, future or timer for a batch that is written. What waits stands in `_buffer`, each with
    the callback that is told its outcome. A subclass says how a batch is sent and what becomes of one that failed."""

    what = "entries"  # what it writes, for log lines

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._state = State.IDLE
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._buffer: list[tuple[T, Callable[[Any], None]]] = []
        self._batch: list[tuple[T, Callable[[Any], None]]] = []  # on its way
        self._pauses = delays(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._timer: asyncio.TimerHandle | None = None  # set since the last failure

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state.name}, {len(self._buffer)} to write>"

    async def close(self, budget_s: float) -> None:
        """Writes the remaining batches within the budget. What is left unwritten ends in StoreClosed."""
        try:
            async with asyncio.timeout(budget_s):
                await self._is_idle.wait()
        except TimeoutError:
            pass
        finally:
            self._state = State.CLOSED
            if self._timer is not None:
                self._timer.cancel()
            self._refuse_the_rest()

    # For subclasses.

    def _has_more(self) -> bool:
        return bool(self._buffer)

    def _size(self, entry: T) -> int:
        """The bytes that count towards FLUSH_BYTES."""
        raise NotImplementedError

    def _send(self) -> None:
        """Sends `_batch`. `_written` is called once, later, unless this raises."""
        raise NotImplementedError

    def _failed(self, batch: list[tuple[T, Callable[[Any], None]]], error: Exception) -> None:
        """Tells a batch that was not written, or keeps it for the next call."""
        for _, on_written in batch:
            self._tell(on_written, error)

    def _refuse_the_rest(self) -> None:
        """Drops what is left when it is closed."""
        rest = [*self._batch, *self._buffer]
        self._batch, self._buffer = [], []
        for _, on_written in rest:
            self._tell(on_written, StoreClosed("the store was closed"))

    def _flush_soon(self) -> None:
        if self._state is State.IDLE:
            self._state = State.COLLECTING
            self._is_idle.clear()
            self._loop.call_soon(self._end_turn)
        elif self._state is State.CLOSED:
            self._refuse_the_rest()

    def _flush(self) -> None:
        if self._state is State.CLOSED:
            return
        if not self._has_more():
            self._state = State.IDLE
            self._is_idle.set()
            return
        self._state = State.WRITING
        self._batch = self._next_batch()
        try:
            self._send()
        except Exception as error:
            self._written(error)

    def _written(self, outcome: Sequence[Any] | Exception) -> None:
        if self._state is State.CLOSED:
            return
        batch, self._batch = self._batch, []
        if not isinstance(outcome, Exception):
            for (_, on_written), one in zip(batch, outcome, strict=True):
                self._tell(on_written, one)
            if self._timer is not None:
                self._timer, self._pauses = None, delays(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            return self._flush()
        if not isinstance(outcome, StoreUnavailable):
            logger.error("%d %s could not be written: that is a bug in mqserve, please report it", len(batch), self.what, exc_info=outcome)
        self._state = State.PAUSING  # before anybody is told, who may write at once
        self._timer = self._loop.call_later(next(self._pauses), self._flush)
        self._failed(batch, outcome)

    def _tell(self, on_written: Callable[[Any], None], outcome: Any) -> None:
        try:
            on_written(outcome)
        except Exception:  # the others of the batch must be told all the same
            logger.exception("the outcome of one of %s was not taken: that is a bug in mqserve, please report it", self.what)

    # Its own.

    def _end_turn(self) -> None:
        if self._state is State.COLLECTING:  # else they have left
            self._flush()

    def _next_batch(self) -> list[tuple[T, Callable[[Any], None]]]:
        count = size = 0
        for entry, _ in self._buffer[:FLUSH_BATCH]:
            size += self._size(entry)
            if count and size > FLUSH_BYTES:
                break
            count += 1
        batch, self._buffer = self._buffer[:count], self._buffer[count:]
        return batch
