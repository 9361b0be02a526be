"""What a job yields, for those who follow it: the parts of its answer as they come. Its result has them joined.

They are kept beside the result, so there are limits to them. The worker's thread puts them, and the I/O loop takes them.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from ..broker.errors import MQServeError
from ..broker.jobs import EventKind, JobEvent
from ..broker.values.codecs import is_plain
from .chunks import encode_item

TOLD_BYTES = 1024 * 1024  # of the first run; each later one tells half as much as the one before
EVENT_BYTES = 64 * 1024
EVENTS_AT_ONCE = 32  # text and bytes by turns are events of their own
TAKES_AT_A_PACE = 200  # so a job that yields for ten minutes has all of them among the latest KEPT_EVENTS
_SHORTEST_PAUSE_MS, _LONGEST_PAUSE_MS = 100, 5000
_MANY_PARTS = 1000


class JobChunks:
    """The parts of run number `attempt` that have not been taken. They are taken ten times a second at first, then less often."""

    __slots__ = ("_decoder", "_has_told_cut", "_left", "_next_ms", "_offset", "_parts", "_takes", "is_cut")

    def __init__(self, attempt: int = 1) -> None:
        self._parts: deque[tuple[bool, bytes]] = deque()  # whether it is text, and the bytes
        self._left = TOLD_BYTES >> min(max(attempt - 1, 0), 30)
        self._offset = 0  # of the next event
        self._takes = 0
        self._next_ms = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.is_cut = False  # the result alone has what follows
        self._has_told_cut = False

    def __repr__(self) -> str:
        return f"<JobChunks, {len(self._parts)} to take, {self._left} bytes left{', cut' if self.is_cut else ''}>"

    def __bool__(self) -> bool:
        return bool(self._parts) or (self.is_cut and not self._has_told_cut)

    def put(self, data: bytes, *, is_text: bool) -> None:
        """Tells the bytes, or cuts the chunks if that is too much."""
        if self.is_cut:
            return
        self._left -= len(data)
        if self._left < 0:
            self.is_cut = True
        elif data:
            self._parts.append((is_text, data))

    def put_value(self, value: object) -> None:
        """Tells what a handler yields to a handle: text and bytes as they are, other plain data as a line of JSON. Any other object cuts
        the chunks: to encode it might take long, or run code of its class."""
        if self.is_cut:
            return
        if isinstance(value, bytes | bytearray | memoryview):
            return self.put(bytes(value), is_text=False)
        try:
            data = encode_item(value) if isinstance(value, str) or is_plain(value) else None
        except (MQServeError, UnicodeEncodeError, RecursionError):
            data = None
        if data is None:
            self.is_cut = True
        else:
            self.put(data if isinstance(value, str) else data + b"\n", is_text=True)

    def take(self, now_ms: int, *, is_last: bool = False) -> Iterator[JobEvent]:
        """Yields what was put since the last time, joined, if that is some time ago or this `is_last`. Only the I/O loop calls this."""
        tells_cut = self.is_cut and not self._has_told_cut  # read before the parts: a cut that comes meanwhile is told the next time
        if not (self and (is_last or now_ms >= self._next_ms or len(self._parts) >= _MANY_PARTS)):
            return
        self._takes += 1
        self._next_ms = now_ms + min(_SHORTEST_PAUSE_MS << self._takes // TAKES_AT_A_PACE, _LONGEST_PAUSE_MS)
        parts = [self._parts.popleft() for _ in range(len(self._parts))]
        groups = [(is_text, b"".join([part for _, part in group])) for is_text, group in groupby(parts, itemgetter(0))]
        for number, (is_text, data) in enumerate(groups[:EVENTS_AT_ONCE], 1):
            for begin in range(0, len(data), EVENT_BYTES):
                ends_text = begin + EVENT_BYTES >= len(data) and (is_last or number < len(groups))
                yield from self._event(data[begin : begin + EVENT_BYTES], now_ms, is_text=is_text, ends_text=ends_text)
        if len(groups) > EVENTS_AT_ONCE:
            self.is_cut = tells_cut = True
        if tells_cut:
            self._has_told_cut = True
            yield JobEvent(EventKind.CHUNK, now_ms, offset=self._offset, cut=True)

    def _event(self, data: bytes, now_ms: int, *, is_text: bool, ends_text: bool) -> Iterator[JobEvent]:
        """Yields the event of these bytes, but for the beginning of a character, which waits for its rest. What is no UTF-8 is bytes."""
        text = ""
        if is_text:
            data = self._decoder.getstate()[0] + data
            self._decoder.reset()
            try:
                text = self._decoder.decode(data, ends_text)
            except UnicodeDecodeError:
                self._decoder.reset()
            else:
                data = b""
        if text or data:
            yield JobEvent(EventKind.CHUNK, now_ms, text=text, data=data, offset=self._offset)
            self._offset += len(text.encode()) + len(data)
