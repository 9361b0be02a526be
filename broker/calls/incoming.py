"""A streamed answer as a process reads it: frames come in, by the inbox or from the stream, and chunks go out in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from ..errors import BadEnvelope, Cancelled, MQServeError
from ..failures import name_of
from ..results import ErrorInfo, Outcome
from ..store import Place
from ..streams import REPLICA_LOST, WINDOW_BYTES, WINDOW_FRAMES, Chunk, End, Ending, Form, Frame, Head

if TYPE_CHECKING:
    from .incoming_streams import IncomingStreams

BEGINNING = Place(0, 0)
TAKEN_AT_ONCE = 128 * 1024  # bytes; few, so that also a slow client comes back for more before its reader counts as gone

# A reader holds no more than this. The replica's window does not bound it: where there are two readers, the window follows the other one.
_FULL_FRAMES, _FULL_BYTES = 2 * WINDOW_FRAMES, 2 * WINDOW_BYTES


class IncomingStream:
    """One reader of one streamed answer. `head` is there from the beginning for its consumer. What the consumer takes counts as taken when
    it comes back for more: that is what the replica gets credit for.

    A consumer that stops before `end` is there calls `RequestSender.leave`.
    """

    def __init__(self, id: str, streams: IncomingStreams, *, head: Head | None = None, after: Place = BEGINNING, told: bool = True) -> None:
        self.id = id
        self.head = head
        self.heard = after.seq  # all frames up to this one have come in
        self.heard_at = time.monotonic()
        self.told_of = after.seq  # the last frame that the inbox told of
        self.place = after  # of the last entry that was read from the stream
        self.is_told = told  # whether frames come by the inbox; the stream is read now and then if not
        self.claims = not told  # whether the frames are to come to this reader, and not to an earlier one
        self._streams = streams
        self._chunks: deque[tuple[Chunk, int]] = deque()  # each with the size of all frames up to its last one
        self._parts: list[bytes] = []  # of a chunk whose last frame is still to come
        self._size = 0  # of the frames that came in
        self._held = 0  # bytes in `_chunks`
        self._handed = self._taken = self._told = (after.seq, 0)  # (seq, size): handed out; taken; of the last credit
        self._last_word: End | None = None
        self.is_recorded = False  # whether the end is that of the request, and not of this reader alone
        self.is_given_up = False  # whether this reader alone has ended it, and its replica has not heard of that
        self._waiter: asyncio.Future[None] | None = None
        self._nudged = False

    def __repr__(self) -> str:
        return f"<IncomingStream {self.id} up to {self.heard}, {len(self._chunks)} chunks to take, {self._last_word}>"

    # For the consumer.

    @property
    def end(self) -> End | None:
        """The end, once all that came before it is taken."""
        return None if self._chunks else self.heard_end

    async def more(self) -> list[Chunk]:
        """Waits until something is there, and takes it. Returns nothing at the end, or after `nudge`."""
        self._come_back()
        if not self._chunks and self.heard_end is None and not self._nudged:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._nudged = False
        return self.take()

    def take(self) -> list[Chunk]:
        """Takes what is there: at least one chunk, if there is one, and no more than TAKEN_AT_ONCE bytes with it."""
        taken: list[Chunk] = []
        size = 0
        while self._chunks and (not taken or size + len(self._chunks[0][0].data) <= TAKEN_AT_ONCE):
            chunk, up_to = self._chunks.popleft()
            taken.append(chunk)
            size += len(chunk.data)
            self._handed = (chunk.seq, up_to)
        if taken:
            self._held -= size
            self.heard_at = time.monotonic()
        return taken

    def took(self, seq: int, size: int) -> None:
        """Counts chunks up to this one, with `size` bytes since the beginning of this reader, as taken before the consumer comes back: one
        that takes its time with each counts as gone otherwise."""
        if self._taken[0] < seq <= self._handed[0] and self.heard_end is None:
            self._taken = (seq, size)
            self._tell()

    def nudge(self) -> None:
        """Lets `more` return, though nothing came."""
        self._nudged = True
        self._wake()

    # For `IncomingStreams`, which brings the frames.

    @property
    def heard_end(self) -> End | None:
        """The end, if all frames before it have come in."""
        word = self._last_word
        return word if word is not None and word.frames <= self.heard else None

    @property
    def has_last_word(self) -> bool:
        return self._last_word is not None

    @property
    def lacks_some(self) -> bool:
        """Whether the stream must have more than has come in."""
        return self.told_of > self.heard or (self._last_word is not None and self._last_word.frames > self.heard)

    @property
    def is_full(self) -> bool:
        return self._held >= _FULL_BYTES or len(self._chunks) >= _FULL_FRAMES

    @property
    def is_drained(self) -> bool:
        """Whether the consumer has taken all that came in."""
        return not self._chunks

    @property
    def taken(self) -> tuple[int, int]:
        """The number of the last frame that was taken, and the size of all up to it."""
        return self._taken

    def hear(self, seq: int, raw: bytes) -> None:
        """Takes a frame from the inbox. One that is there already is dropped; one behind a gap is read again from the stream."""
        self.told_of = max(self.told_of, seq)
        self.is_told, self.claims = True, False
        if seq == self.heard + 1 and not self.is_full:
            self._accept(seq, raw)
        elif seq > self.heard and not self.is_full:
            self._streams.heal(self)

    def read(self, place: Place, raw: bytes) -> None:
        """Takes an entry of the stream."""
        self.place = place
        if place.seq > self.told_of:  # a later reader is told of it
            self.is_told = False
        if place.seq == self.heard + 1:
            self._accept(place.seq, raw)
        elif place.seq > self.heard:
            self.lose()

    def moves_to(self, replica: str) -> bool:
        """Notes which replica makes the answer now, and returns whether another one did before."""
        if self.head is None or self.head.replica == replica:
            return False
        self.head, self.claims = msgspec.structs.replace(self.head, replica=replica), True
        return True

    def ends(self, end: End) -> None:
        """Notes the end, which stands behind `end.frames` frames."""
        if self._last_word is not None:
            return
        self._last_word, self.is_recorded = end, True
        if end.frames > self.heard:
            self._streams.heal(self)
        else:
            self._over()

    def fail(self, error: MQServeError) -> None:
        """Ends it behind the frames that are there."""
        ending, kind = (Ending.CANCELLED, str(Outcome.CANCELLED)) if isinstance(error, Cancelled) else (Ending.FAILED, name_of(type(error)))
        self._stop(End(ending, self.heard, ErrorInfo(kind, str(error)), error.status))

    def lose(self) -> None:
        """Ends it because the next frame is not in the store any more."""
        self.is_given_up = True
        self.break_off("what came next of this answer is not in the store any more: send the request again")

    def be_late(self) -> None:
        """Ends it because nothing came for too long."""
        self.is_given_up = True
        message = (
            "nothing more of this answer came within its backend's stream_idle_timeout_s, and its replica may have died: send the request "
            "again, or set a longer one"
        )
        self._stop(End(Ending.LATE, self.heard, ErrorInfo(str(Outcome.LATE), message), 504))

    def break_off(self, why: str) -> None:
        self._stop(End(Ending.LOST, self.heard, ErrorInfo(REPLICA_LOST, why), 502))

    def abandon(self) -> None:
        """Ends it for a consumer that does not want it any more."""
        self._chunks.clear()
        self._parts.clear()
        self._held = 0
        self._stop(End(Ending.CANCELLED, self.heard, ErrorInfo(str(Outcome.CANCELLED), "nobody reads this answer any more"), 499))

    def credited(self) -> None:
        """A credit that says what is taken is on its way."""
        self._told = self._taken

    def _stop(self, end: End) -> None:
        if self.heard_end is None:
            self._last_word, self.is_recorded = end, False
            self._over()

    def _over(self) -> None:
        self._streams.retire(self)
        self._wake()

    def _accept(self, seq: int, raw: bytes) -> None:
        try:
            frame = Frame.from_bytes(raw)
        except BadEnvelope as error:
            self.is_given_up = True
            return self.fail(error)
        self.heard, self.heard_at = seq, time.monotonic()
        self._size += len(frame.data)
        is_first = self.head is None
        if is_first:
            if frame.head is None:
                return self.lose()
            self.head = frame.head
        elif frame.head is not None and self.moves_to(frame.head.replica):
            self._streams.credit(self)
        if frame.data or frame.head is None or frame.content_type:
            self._add(seq, frame)
        if is_first:
            self._streams.show(self)
        if self.heard_end is not None:
            self._over()
        elif self._chunks:
            self._wake()
        elif self._waiter is not None:
            self._come_back()

    def _add(self, seq: int, frame: Frame) -> None:
        assert self.head is not None, "it is in the first frame"
        if self.head.form is not Form.BODY and frame.rest and not self._parts:
            return  # the beginning of this chunk is not kept any more
        if frame.more and self.head.form is not Form.BODY:
            self._parts.append(frame.data)
            return
        data = frame.data
        if self._parts:
            data = b"".join([*self._parts, data])
            self._parts.clear()
        self._held += len(data)
        self._chunks.append((Chunk(seq, data, frame.content_type), self._size))

    def _come_back(self) -> None:
        """Counts as taken what was handed out, and the parts of a chunk that is not complete."""
        self._taken = self._handed if self._chunks else (self.heard, self._size)
        self._tell()
        if not self._chunks and self.lacks_some and self.heard_end is None:
            self._streams.heal(self)

    def _tell(self) -> None:
        """Gives credit once half the window was taken. Less is told by the next one in the rhythm of all."""
        seq, size = self._taken
        if seq - self._told[0] >= WINDOW_FRAMES // 2 or size - self._told[1] >= WINDOW_BYTES // 2:
            self._streams.credit(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
