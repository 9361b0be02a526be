"""One streamed answer of this replica: the worker's thread offers chunks, and the I/O loop appends their frames to the store."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import NamedTuple

import msgspec

from ..broker.backoff import delays
from ..broker.errors import BadValue
from ..broker.results import Result
from ..broker.store import Append, Refusal
from ..broker.streams import FRAME_BYTES, WINDOW_BYTES, WINDOW_FRAMES, Frame, Head, Owner, frames_of
from ..controller.state.config import BackendConfig

JOINED_BYTES = FRAME_BYTES  # chunks of a body that wait to be appended become frames of at most this size
_KEPT_S = 2.0  # Redis may lose what it was told in the last second before it died


class State(Enum):
    RUNNING = "running"  # its generator goes on
    ENDED = "ended"  # its generator has ended, and the end is appended behind the frames that are left
    STOPPED = "stopped"  # nothing of it is appended any more


class Kept(NamedTuple):
    """A frame that this replica keeps, since the reader has not taken it or the store may lose it."""

    raw: bytes
    size: int  # of its data
    at: float  # monotonic


class Outgoing:
    """The frames of one answer, numbered from 1 through all runs of its request.

    Each number has one writer: the worker's thread writes `made` and `made_bytes`, the I/O loop all others, and either reads what the other
    one writes.
    """

    def __init__(
        self,
        future_id: str,
        owner: Owner,
        inbox: str,
        config: BackendConfig,
        *,
        shown: int = 0,
        is_reply: bool = False,
        joins: bool = False,
    ) -> None:
        self.future_id = future_id
        self.is_reply = is_reply  # it goes to a queue of its caller, not to the store
        self.owner = owner
        self.idle_s = config.stream_idle_timeout_s
        self._kept_frames, self._kept_bytes = config.stream_kept_frames, config.stream_kept_bytes
        self.shown = shown  # frames that earlier runs have shown: this run makes them again, and they are passed over
        self._joins = joins  # the boundaries of its chunks mean nothing, and no replay counts them
        self._head_alone = int(owner.head_alone)  # of the frames that were shown, this run makes one less
        self._begins_behind = False  # the handler has read how much was shown
        # The worker's thread.
        self.made = self._head_alone
        self.made_bytes = 0
        self._head: Head | None = None
        self.early_head: Head | None = None  # one that is shown by itself if the first chunk takes long
        self._offered: deque[Frame] = deque()
        self._parked: Callable[[], None] | None = None
        self.result: Result | None = None  # set once, after the last frame
        # The I/O loop.
        self.state = State.RUNNING
        self.stopped_at = math.inf  # monotonic
        self.inbox = inbox  # where the newest reader is told of frames; empty while there is no reader
        self.paused = False
        self.left_at = self.waits_since = self.quiet_since = time.monotonic()
        self.claim = owner.to_bytes()
        self.is_shown = shown > 0
        self.refused: Refusal | None = None
        self.retry: asyncio.TimerHandle | None = None
        self.pauses = delays()
        self.sent = self.taken = self._numbered = shown
        self._credited = shown  # what the reader has taken may be more than what is known to be sent: credit may overtake the store's reply
        self._saved = 0  # frames that were joined with the one before them
        self._counted = shown  # the last frame whose bytes are in `_taken_bytes`; a new reader may take some again
        self._sent_bytes = self._taken_bytes = 0
        self._kept: dict[int, Kept] = {}
        self._first_kept = shown + 1
        self._in_store: deque[int] = deque()  # of a stream that is kept: the sizes of its frames, from the oldest one
        self._in_store_bytes = 0
        self._oldest = shown + 1
        self._trim_to = 0
        self.under_way: Append | None = None

    def __repr__(self) -> str:
        return f"<Outgoing {self.future_id}, {self.state.value}: {self.made} made, {self.sent} sent, {self.taken} taken>"

    # Read by both.

    @property
    def resume_after(self) -> int:
        """How many chunks of up to FRAME_BYTES earlier runs have shown. A handler that asks begins behind them by itself."""
        self._begins_behind = True
        return self.shown - self._head_alone

    @property
    def began(self) -> bool:
        """Whether the answer can only end as a stream."""
        return self.made > 0 or self.shown > 0 or self._numbered > 0

    @property
    def is_fenced(self) -> bool:
        """Whether its end is recorded only if no other run has taken the stream over."""
        return self.began and not self.is_reply

    @property
    def has_room(self) -> bool:
        """Whether another chunk may be made."""
        if self.paused:
            return False
        ahead = self.made - self._saved - self.taken
        return ahead <= 0 or (ahead < WINDOW_FRAMES and self.made_bytes - self._taken_bytes < WINDOW_BYTES)

    # In the worker's thread.

    def check_replay(self) -> None:
        """Raises BadValue if this run has ended before what earlier ones have shown: the answer would look whole."""
        if self.made < self.shown and not self._begins_behind:
            raise BadValue("the replay ended before what an earlier run has shown: a replayed handler must make the same chunks again")

    def begin(self, head: Head) -> None:
        """Sets the head, which goes with the first frame."""
        self._head = head

    def offer(self, data: bytes, content_type: str = "") -> None:
        """Cuts a chunk into frames. Frames that an earlier run has shown are passed over."""
        if self._begins_behind and self.made < self.shown:
            self.made = self.shown
        head = self._take_head()
        for frame in frames_of(data, content_type, head):
            self._make(frame)

    def show_head(self) -> None:
        """Offers the head alone, in a frame that belongs to no chunk."""
        if self.made == self._head_alone:
            self._make(Frame(b"", False, "", self._take_head()))

    def offer_whole(self, data: bytes, content_type: str) -> None:
        """Offers a chunk as one frame, whatever its size, for a stream that does not go to the store."""
        self._make(Frame(data, False, content_type))

    def _take_head(self) -> Head | None:
        """Returns the head for the first frame that this run appends: a later run tells readers by it which replica takes credit now."""
        if self.made < self.shown:
            return None
        head, self._head = self._head, None
        return head

    def _make(self, frame: Frame) -> None:
        if self.made >= self.shown:
            self._offered.append(frame)
            self.made_bytes += len(frame.data)
        self.made += 1

    def park(self, resume: Callable[[], None]) -> bool:
        """Has `resume` called in the worker's thread once there is room. Returns whether there is room meanwhile; `resume` is not called
        then."""
        self._parked = resume
        if self.has_room:  # credit that came before the line above found nobody to wake
            self._parked = None
            return True
        return False

    async def room(self) -> None:
        """Returns once there is room."""
        while not self.has_room:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if self.park(partial(resolve, room)):
                return
            await room

    def resume(self) -> None:
        """Resumes the generator or response that is parked, if there is one and there is room."""
        parked = self._parked
        if parked is not None and self.has_room:
            self._parked = None
            parked()

    def wake(self) -> None:
        """Resumes the generator or response that is parked, since its job was given up."""
        parked, self._parked = self._parked, None
        if parked is not None:
            parked()

    # On the I/O loop.

    @property
    def can_wait(self) -> bool:
        """Whether it goes on without a reader for a while: its readers know of it, and may come back."""
        return self.owner.resumable and self.is_shown

    @property
    def is_parked(self) -> bool:
        return self._parked is not None

    @property
    def held_bytes(self) -> int:
        """What this replica holds of it, without overhead."""
        return sum(kept.size for kept in self._kept.values()) + sum(len(frame.data) for frame in self._offered)

    def show_head_alone(self, head: Head) -> None:
        """Shows the head, though there is no chunk yet. The worker's thread, which may be busy, has no part in it."""
        self.claim = msgspec.structs.replace(self.owner, head_alone=True).to_bytes()
        self._numbered = 1
        self._kept[1] = Kept(Frame(b"", False, "", head).to_bytes(), 0, time.monotonic())

    @property
    def has_made_nothing(self) -> bool:
        """Whether not even the head is on its way."""
        return self._numbered == 0 and not self._offered

    def gather(self) -> int:
        """Numbers the frames that were offered since the last time, and returns how many there were."""
        gathered = 0
        now = time.monotonic()
        while self._offered:
            frame = self._offered.popleft()
            if self._joins:
                frame = self._with_next(frame)
            self._numbered += 1
            gathered += 1
            self._kept[self._numbered] = Kept(frame.to_bytes(), len(frame.data), now)
        return gathered

    def _with_next(self, frame: Frame) -> Frame:
        """Joins the frame with those behind it that fit into it."""
        parts, size = [frame.data], len(frame.data)
        while self._offered and size + len(self._offered[0].data) <= JOINED_BYTES:
            parts.append(self._offered.popleft().data)
            size += len(parts[-1])
            self._saved += 1
        return Frame(b"".join(parts), head=frame.head) if len(parts) > 1 else frame

    @property
    def unsent(self) -> int:
        """The number of frames that were not appended yet."""
        return self._numbered - self.sent

    def is_all(self, frames: list[Kept]) -> bool:
        """Whether these are all frames that are left to append."""
        return len(frames) == self.unsent

    def next_frames(self) -> list[Kept]:
        """Returns the next frames that fit the reader's window; one always does if the reader has taken all before it."""
        frames: list[Kept] = []
        ahead, size = self.sent - self.taken, self._sent_bytes - self._taken_bytes
        for seq in range(self.sent + 1, self._numbered + 1):
            kept = self._kept[seq]
            if ahead > 0 and (ahead >= WINDOW_FRAMES or size + kept.size > WINDOW_BYTES):
                break
            frames.append(kept)
            ahead, size = ahead + 1, size + kept.size
        return frames

    def trim_to(self) -> int:
        """Returns the number of the last frame that the store need not keep: what the reader has taken, or of a stream that is kept what
        is too much. What its reader has not taken always stays."""
        if not self.owner.resumable:
            self._trim_to = max(self._trim_to, self.taken)
        while (len(self._in_store) > self._kept_frames or self._in_store_bytes > self._kept_bytes) and self._oldest <= self.taken:
            self._in_store_bytes -= self._in_store.popleft()
            self._trim_to = self._oldest
            self._oldest += 1
        return self._trim_to

    def was_sent(self, last: int) -> None:
        """Notes that the stream has all frames up to `last`."""
        if self.sent == self.taken:
            self.waits_since = time.monotonic()
        for seq in range(self.sent + 1, last + 1):
            size = self._kept[seq].size
            self._sent_bytes += size
            if self.owner.resumable:
                self._in_store.append(size)
                self._in_store_bytes += size
        self.sent = max(self.sent, last)
        self.was_taken(self._credited)

    def go_back(self, last: int) -> None:
        """Notes that the stream has lost all frames behind `last`. Those that are not here any more are given up: the reader had them."""
        first = max(last + 1, self._first_kept)
        if first > last + 1:
            self._trim_to = first - 1
        for seq in range(first, self.sent + 1):
            self._sent_bytes -= self._kept[seq].size
            if self._in_store:
                self._in_store_bytes -= self._in_store.pop()
        self.sent = min(self.sent, first - 1)

    def was_taken(self, seq: int) -> bool:
        """Notes that the reader has all frames up to `seq`, and returns whether that is more than before."""
        self._credited = max(self._credited, min(seq, self._numbered))
        seq = min(self._credited, self.sent)
        if seq <= self.taken:
            return False
        for taken in range(max(self._counted + 1, self._first_kept), seq + 1):
            self._taken_bytes += self._kept[taken].size
        self.taken, self._counted = seq, max(self._counted, seq)
        self.waits_since = time.monotonic()
        self.forget()
        return True

    def begin_reading(self, inbox: str, seq: int) -> None:
        """Notes that a new reader begins behind `seq`: it may take again what an earlier one has taken."""
        self.inbox, self.paused = inbox, False
        self.taken = self._credited = min(seq, self.taken)
        self.waits_since = time.monotonic()

    def pause(self) -> None:
        """Notes that there is no reader."""
        self.inbox, self.paused, self.left_at = "", True, time.monotonic()

    def halt(self) -> None:
        """Has nothing more appended, though the generator may still run."""
        self.state = State.STOPPED
        self.stopped_at = min(self.stopped_at, time.monotonic())
        self._drop_unsent()

    def stop(self) -> None:
        """Ends it: nothing more is appended."""
        self.halt()
        if self.retry is not None:
            self.retry.cancel()
        self._offered.clear()
        self._kept.clear()
        self._first_kept = self._numbered + 1

    def forget(self) -> None:
        """Forgets frames that the reader has taken and, where others may read them later, that the store has kept for a while."""
        until = time.monotonic() - _KEPT_S if self.owner.resumable else math.inf
        last = min(self.taken, self.sent)
        while self._first_kept <= last and self._kept[self._first_kept].at < until:
            del self._kept[self._first_kept]
            self._first_kept += 1

    def _drop_unsent(self) -> None:
        """Forgets what was not appended: nobody reads it any more."""
        self._offered.clear()
        for seq in range(max(self.sent + 1, self._first_kept), self._numbered + 1):
            del self._kept[seq]
        self._numbered = self.sent


def resolve(room: asyncio.Future[None]) -> None:
    if not room.done():  # the task that waited for it was cancelled
        room.set_result(None)
