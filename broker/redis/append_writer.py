"""Batches Appends on their way to the store: those of one loop turn leave in one call, and those that arrive during a call leave in the
next. Unlike results (`result_writer.py`), they are not written again here: their owner knows what has changed meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from enum import Enum, auto

from ..backoff import delays
from ..errors import StoreUnavailable
from ..store import Append, OnAppended, Refusal, StoreClosed
from .result_writer import FIRST_PAUSE_S, FLUSH_BATCH, FLUSH_BYTES, LONGEST_PAUSE_S

logger = logging.getLogger(__name__)

_Waiting = tuple[Append, OnAppended]

OnWritten = Callable[[Sequence[int | Refusal] | Exception], None]
"""Gets the outcome of each Append, or an error: StoreUnavailable, or another, which is a bug."""

Write = Callable[[Sequence[Append], OnWritten], None]
"""Writes a batch: it calls the last argument once, later, unless it raises."""


class _State(Enum):
    IDLE = auto()  # nothing to write
    COLLECTING = auto()  # until the end of this loop turn
    WRITING = auto()  # a batch is on its way; what comes meanwhile waits for the next one
    PAUSING = auto()  # after a failure
    CLOSED = auto()


class AppendWriter:
    """Writes Appends through a function of its owner, one batch at a time, without a task, future or timer for a batch that is written."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._state = _State.IDLE
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._buffer: list[_Waiting] = []
        self._batch: list[_Waiting] = []  # on its way
        self._pauses = delays(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<AppendWriter {self._state.name}, {len(self._buffer)} to write>"

    def append_then(self, append: Append, on_appended: OnAppended) -> None:
        """See `Store.append_then`."""
        self._buffer.append((append, on_appended))
        if self._state is _State.IDLE:
            self._state = _State.COLLECTING
            self._is_idle.clear()
            self._loop.call_soon(self._flush)
        elif self._state is _State.CLOSED:
            self._refuse_the_rest()

    async def close(self, budget_s: float) -> None:
        """Writes the remaining batches within the budget. What is left unwritten ends in StoreClosed."""
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
        self._batch, self._buffer = [], []
        for _, on_appended in rest:
            _tell(on_appended, StoreClosed("the store was closed"))

    def _flush(self) -> None:
        if self._state is _State.CLOSED:
            return
        if not self._buffer:
            self._state = _State.IDLE
            self._is_idle.set()
            return
        self._state = _State.WRITING
        self._batch = self._next_batch()
        try:
            self._write([append for append, _ in self._batch], self._written)
        except Exception as error:
            self._written(error)

    def _written(self, outcome: Sequence[int | Refusal] | Exception) -> None:
        if self._state is _State.CLOSED:
            return
        batch, self._batch = self._batch, []
        if not isinstance(outcome, Exception):
            for (_, on_appended), one in zip(batch, outcome, strict=True):
                _tell(on_appended, one)
            if self._timer is not None:
                self._timer, self._pauses = None, delays(FIRST_PAUSE_S, LONGEST_PAUSE_S)
            return self._flush()
        if not isinstance(outcome, StoreUnavailable):
            logger.error("%d streams could not be written: that is a bug in mqserve, please report it", len(batch), exc_info=outcome)
        self._state = _State.PAUSING
        self._timer = self._loop.call_later(next(self._pauses), self._flush)
        for _, on_appended in batch:
            _tell(on_appended, outcome)

    def _next_batch(self) -> list[_Waiting]:
        count = size = 0
        for append, _ in self._buffer[:FLUSH_BATCH]:
            size += sum(map(len, append.frames)) + len(append.ends) + len(append.end_note)
            if count and size > FLUSH_BYTES:
                break
            count += 1
        batch, self._buffer = self._buffer[:count], self._buffer[count:]
        return batch


def _tell(on_appended: OnAppended, outcome: int | Refusal | Exception) -> None:
    try:
        on_appended(outcome)
    except Exception:  # the other streams of the batch must be told all the same
        logger.exception("the outcome of an append was not taken: that is a bug in mqserve, please report it")
