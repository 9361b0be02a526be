"""What a job yields, for those who follow it: the parts of its answer as they come. Its result has them joined.

They are kept beside the result, so there are limits to them. The worker's thread puts them, and the I/O loop takes them.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from ..broker.errors import MQServeError
from ..broker.jobs import EventKind, JobEvent
from .chunks import encode_item

TOLD_BYTES = 1024 * 1024  # of the first run; each later one tells half as much as the one before
EVENT_BYTES = 64 * 1024  # at most
EVENTS_AT_ONCE = 32  # of text and bytes by turns, which are events of their own; more are cut
EVENTS_AT_A_PACE = 200  # behind them half as often, so that ten minutes of text are among the latest KEPT_EVENTS
_SHORTEST_PAUSE_MS, _LONGEST_PAUSE_MS = 100, 5000
_MANY_PARTS = 1000  # these do not wait for the pause to end: small parts take more memory than their bytes
_PLAIN = (type(None), bool, int, float, str, list, dict)


class JobChunks:
    """The parts of run number `attempt` that have not been taken. They are taken ten times a second at first, then less often. Once they
    are cut, nothing more is kept: the result alone has what follows."""

    __slots__ = ("_decoder", "_events", "_is_full", "_is_over", "_left", "_next_ms", "_offset", "_parts")

    def __init__(self, attempt: int = 1) -> None:
        # The worker's thread writes these …
        self._parts: deque[tuple[bool, bytes]] = deque()  # whether it is text, and the bytes
        self._left = TOLD_BYTES >> min(max(attempt - 1, 0), 30)
        self._is_full = False  # the last part was too much
        # … and the I/O loop these.
        self._is_over = False  # the cut was told
        self._offset = self._events = self._next_ms = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def __repr__(self) -> str:
        return f"<JobChunks, {len(self._parts)} to take, {self._left} bytes left{', over' if self._is_over else ''}>"

    def __bool__(self) -> bool:
        return not self._is_over and bool(self._parts or self._is_full or self._held)

    @property
    def _is_cut(self) -> bool:
        return self._is_full or self._is_over

    @property
    def _held(self) -> bytes:
        """The beginning of a character, whose rest may come."""
        return self._decoder.getstate()[0]

    def put(self, data: bytes | bytearray | memoryview, *, is_text: bool) -> None:
        """Keeps the bytes to be taken. If that is too much, these are cut, and all that follow."""
        if self._is_cut:
            return
        self._left -= memoryview(data).nbytes
        self._is_full = self._left < 0
        if data and not self._is_full:
            self._parts.append((is_text, bytes(data)))

    def put_value(self, value: Any) -> None:
        """Keeps what a handler yields to a handle: text and bytes as they are, other plain data as a line of JSON. Any other object is cut:
        to encode it might take long, or run code of its class."""
        if self._is_cut:  # what follows is not even encoded
            return
        if type(value) in (bytes, bytearray, memoryview):
            return self.put(value, is_text=False)
        try:
            data = encode_item(value) if _is_small(value, self._left) else None
        except (MQServeError, UnicodeEncodeError):
            data = None
        if data is None:
            self._is_full = True
        else:
            self.put(data if type(value) is str else data + b"\n", is_text=True)

    def take(self, now_ms: int, *, is_last: bool = False) -> Iterator[JobEvent]:
        """Yields what was put since the last time, joined. Nothing if that was a moment ago, unless this `is_last`. Only the I/O loop calls
        this."""
        is_full = self._is_full  # read before the parts: what comes meanwhile is taken the next time
        if not (self and (is_last or now_ms >= self._next_ms or len(self._parts) >= _MANY_PARTS)):
            return
        parts = [self._parts.popleft() for _ in range(len(self._parts))]
        groups = [(is_text, b"".join([part for _, part in group])) for is_text, group in groupby(parts, itemgetter(0))]
        self._is_over = is_full or len(groups) > EVENTS_AT_ONCE
        for is_text, data in groups[:EVENTS_AT_ONCE]:
            if not is_text:
                yield from self._end_of_text(now_ms)
            for begin in range(0, len(data), EVENT_BYTES):
                yield from self._event(data[begin : begin + EVENT_BYTES], now_ms, is_text=is_text)
        if is_last or self._is_over:
            yield from self._end_of_text(now_ms)
        if self._is_over:
            self._parts.clear()
            yield JobEvent(EventKind.CHUNK, now_ms, offset=self._offset, cut=True)
        self._next_ms = now_ms + min(_SHORTEST_PAUSE_MS << self._events // EVENTS_AT_A_PACE, _LONGEST_PAUSE_MS)

    def _event(self, data: bytes, now_ms: int, *, is_text: bool) -> Iterator[JobEvent]:
        """Yields the event of these bytes, but for the beginning of a character. What should be text and is no UTF-8 is bytes."""
        text = ""
        if is_text:
            data = self._held + data
            self._decoder.reset()
            try:
                text, data = self._decoder.decode(data), b""
            except UnicodeDecodeError:
                self._decoder.reset()
        if text or data:
            yield JobEvent(EventKind.CHUNK, now_ms, text=text, data=data, offset=self._offset)
            self._offset += len(text.encode()) + len(data)
            self._events += 1

    def _end_of_text(self, now_ms: int) -> Iterator[JobEvent]:
        """Yields the beginning of a character whose rest does not come, as bytes."""
        held = self._held
        self._decoder.reset()
        return self._event(held, now_ms, is_text=False)


def _is_small(value: Any, left: int) -> bool:
    """Whether it is plain data that might fit into `left` bytes of JSON; looks at no more of it than that takes."""
    values = [value]
    while values and left >= 0:
        one = values.pop()
        kind = type(one)
        left -= len(one) if kind in (str, list, dict) else 1
        if kind in (list, dict) and left >= 0:
            values += one if kind is list else [*one, *one.values()]
        elif kind not in _PLAIN:
            return False
    return left >= 0
