"""What a job yields, for those who follow it: the parts of its answer as they come. Its result has them joined.

They are kept beside the result, so there is a limit to them. The worker's thread puts them, and the I/O loop takes them.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter

from ..broker.errors import MQServeError
from ..broker.jobs import EventKind, JobEvent
from .chunks import encode_item

TOLD_BYTES = 1024 * 1024  # of a run; those that follow are in its result only
EVENT_BYTES = 64 * 1024


class JobChunks:
    """The parts of one run that have not been taken."""

    __slots__ = ("_decoder", "_has_told_cut", "_left", "_parts")

    def __init__(self) -> None:
        self._parts: deque[tuple[bool, bytes]] = deque()  # whether it is text, and the bytes
        self._left = TOLD_BYTES  # below 0 once they are cut
        self._has_told_cut = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two parts

    def __repr__(self) -> str:
        return f"<JobChunks, {len(self._parts)} to take, {self._left} bytes left>"

    def __bool__(self) -> bool:
        return bool(self._parts) or (self.is_cut and not self._has_told_cut)

    @property
    def is_cut(self) -> bool:
        """Whether the result alone has what follows."""
        return self._left < 0

    def put(self, data: bytes, *, is_text: bool) -> None:
        """Tells the bytes, or cuts the chunks if that is too much."""
        if not self.is_cut:
            self._left -= len(data)
            if data and not self.is_cut:
                self._parts.append((is_text, data))

    def put_value(self, value: object) -> None:
        """Tells what a handler yields to a handle: text and bytes as they are, others as a line of JSON. A value that has none cuts the
        chunks."""
        if self.is_cut:
            return
        if isinstance(value, bytes | bytearray | memoryview):
            return self.put(bytes(value), is_text=False)
        try:
            data = encode_item(value)
        except (MQServeError, UnicodeEncodeError):
            self._left = -1
        else:
            self.put(data if isinstance(value, str) else data + b"\n", is_text=True)

    def drop(self) -> None:
        """Leaves out what was not taken."""
        self._parts.clear()

    def take(self, now_ms: int) -> Iterator[JobEvent]:
        """Yields what was put since the last call, joined. Only the I/O loop calls this."""
        tells_cut = self.is_cut and not self._has_told_cut  # asked first, since that comes behind the last part
        parts: list[tuple[bool, bytes]] = []
        with suppress(IndexError):  # also if they are dropped meanwhile
            while True:
                parts.append(self._parts.popleft())
        for is_text, group in groupby(parts, itemgetter(0)):
            data = b"".join([part for _, part in group])
            for begin in range(0, len(data), EVENT_BYTES):
                piece = data[begin : begin + EVENT_BYTES]
                if not is_text:
                    yield JobEvent(EventKind.CHUNK, now_ms, data=piece)
                elif text := self._decoder.decode(piece):
                    yield JobEvent(EventKind.CHUNK, now_ms, text=text)
        if tells_cut:
            self._has_told_cut = True
            yield JobEvent(EventKind.CHUNK, now_ms, cut=True)
