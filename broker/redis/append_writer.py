"""Batches Appends on their way to the store. Unlike results (`result_writer.py`), they are not written again here: their owner knows what
has changed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..store import Append, OnAppended, Refusal
from .batch_writer import BatchWriter

OnWritten = Callable[[Sequence[int | Refusal] | Exception], None]
"""Gets the outcome of each Append, or an error: StoreUnavailable, or another, which is a bug."""

Write = Callable[[Sequence[Append], OnWritten], None]
"""Writes a batch: it calls the last argument once, later, unless it raises."""


class AppendWriter(BatchWriter[Append]):
    """Writes Appends through a function of its owner."""

    what = "streams"

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write

    def append_then(self, append: Append, on_appended: OnAppended) -> None:
        """See `Store.append_then`."""
        self._buffer.append((append, on_appended))
        self._flush_soon()

    def _send(self) -> None:
        self._write([append for append, _ in self._batch], self._written)

    def _size(self, entry: Append) -> int:
        return sum(map(len, entry.frames)) + len(entry.ends) + len(entry.end_note)
