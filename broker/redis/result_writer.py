"""Batches results and marks on their way to the store: those of one loop turn leave in one call, and those that arrive during a call
leave in the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from ..backoff import delays
from ..errors import StoreUnavailable
from ..store import Record

FLUSH_BATCH = 128
FLUSH_BYTES = 4 * 1024 * 1024  # per batch, or one larger result: a call that takes longer than its budget would be retried for ever

logger = logging.getLogger(__name__)

Mark = tuple[str, bytes, int]
"""Key, value, TTL in ms; a TTL of 0 deletes the key."""


class ResultWriter:
    """Writes results and marks through two functions of its owner, each of which raises StoreUnavailable. `write_results` returns a
    number for each result: 0 if another result stood there first."""

    def __init__(
        self,
        write_results: Callable[[Sequence[Record]], Awaitable[list[int]]],
        write_marks: Callable[[Sequence[Mark]], Awaitable[None]],
        now_ms: Callable[[], int],
    ) -> None:
        self._write_results = write_results
        self._write_marks = write_marks
        self._now_ms = now_ms
        self._buffer: list[tuple[Record, asyncio.Future[bool]]] = []
        self._marks: list[Mark] = []
        self._flusher: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ResultWriter, {len(self._buffer)} to write>"

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
        if self._flusher is not None and not self._flusher.done():
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(budget_s):
                    await asyncio.shield(self._flusher)
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)
        for _, done in self._buffer:
            done.cancel()

    def _flush_soon(self) -> None:
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush(), name="write results")

    async def _flush(self) -> None:
        pauses = delays(first_s=0.02, cap_s=1.0)
        while self._buffer or self._marks:
            batch = self._next_batch()
            try:
                marks, self._marks = self._marks, []
                if marks:
                    await self._write_marks(marks)
                if batch:
                    _tell(batch, await self._write_results([record for record, _ in batch]))
                pauses = delays(first_s=0.02, cap_s=1.0)
            except StoreUnavailable as error:
                self._buffer = self._give_up_late(batch, error) + self._buffer
                await asyncio.sleep(next(pauses))
            except Exception as error:  # the owners of these results requeue their messages
                logger.exception("%d results could not be written: that is a bug in mqserve, please report it", len(batch))
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            except asyncio.CancelledError:
                self._buffer = batch + self._buffer
                raise

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


def _tell(batch: list[tuple[Record, asyncio.Future[bool]]], written: list[int]) -> None:
    for (_, done), fresh in zip(batch, written, strict=True):
        if not done.done():
            done.set_result(bool(fresh))
