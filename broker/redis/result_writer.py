"""Batches results, marks and posts on their way to the store. Many results of one loop turn leave in two batches."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import StoreUnavailable
from ..store import OnRecorded, Record, recorded
from .batch_writer import FLUSH_BYTES, BatchWriter, State

EARLY_BATCH = 32  # so many leave before the turn ends: Redis and the proxy work on them while this process takes the rest of its results
FEW_POSTS = 32  # fit one batch, whatever they are: the largest have 64 KiB

Mark = tuple[str, bytes, int]
"""Key, value, TTL in ms; a TTL of 0 deletes the key."""

Post = tuple[str, bytes]
"""Key of a list, and the entry to append."""

OnWritten = Callable[[Sequence[int] | Exception], None]
"""Gets a number for each result (0 if another result stood there first), or an error: StoreUnavailable, or another, which is a bug."""

Write = Callable[[Sequence[Record], Sequence[Mark], Sequence[Post], OnWritten], None]
"""Writes a batch: it calls the last argument once, later, unless it raises."""


class ResultWriter(BatchWriter[Record]):
    """Writes results, marks and posts through a function of its owner. Replicas do this for every request."""

    what = "results"

    def __init__(self, write: Write, now_ms: Callable[[], int]) -> None:
        super().__init__()
        self._write = write
        self._now_ms = now_ms
        self._marks: list[Mark] = []
        self._posts: list[Post] = []

    def record(self, record: Record) -> asyncio.Future[bool]:
        """See `Store.record`."""
        return recorded(self.record_then, record)

    def record_then(self, record: Record, on_recorded: OnRecorded) -> None:
        """See `Store.record_then`."""
        self._buffer.append((record, on_recorded))
        if self._state is State.COLLECTING and len(self._buffer) >= EARLY_BATCH:
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

    def _has_more(self) -> bool:
        return bool(self._buffer or self._marks or self._posts)

    def _send(self) -> None:
        marks, self._marks = self._marks, []
        posts = self._next_posts() if self._posts else []
        self._write([record for record, _ in self._batch], marks, posts, self._recorded)

    def _refuse_the_rest(self) -> None:
        self._marks, self._posts = [], []
        super()._refuse_the_rest()

    def _recorded(self, outcome: Sequence[int] | Exception) -> None:
        self._written(outcome if isinstance(outcome, Exception) else [how > 0 for how in outcome])

    def _size(self, entry: Record) -> int:
        return len(entry.value) + len(entry.note)

    def _next_posts(self) -> list[Post]:
        """Takes the posts that fit one batch, in their order."""
        count = len(self._posts)
        if count > FEW_POSTS:
            sizes = itertools.accumulate(len(entry) for _, entry in self._posts)
            count = max(1, sum(1 for _ in itertools.takewhile(lambda size: size <= FLUSH_BYTES, sizes)))
        posts, self._posts = self._posts[:count], self._posts[count:]
        return posts

    def _failed(self, batch: list[tuple[Record, Callable[[Any], None]]], error: Exception) -> None:
        """Writes again what is still in time. The others end in the error, so that their messages are requeued, and all do after a bug."""
        if isinstance(error, StoreUnavailable):
            now_ms = self._now_ms()
            self._buffer[:0] = [waiting for waiting in batch if waiting[0].deadline_ms > now_ms]
            batch = [waiting for waiting in batch if waiting[0].deadline_ms <= now_ms]
        super()._failed(batch, error)
