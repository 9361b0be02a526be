"""One request that this process has sent, in one object: it waits for the result, and the broker tells it what became of its message."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from ..envelope import Envelope
from ..errors import MQServeError
from ..overload import Pace
from ..results import Result

if TYPE_CHECKING:
    from .incoming import IncomingStream
    from .sending import RequestSender


class Call:
    """A request from its sending to its end. `RequestSender.send` sets the fields; a subclass says what happens at the end, which is
    exactly one of `answered`, `began`, `failed` and `abandoned`."""

    __slots__ = ("backend", "deadline_ms", "envelope", "give_up_at", "id", "pace", "sender", "sent_at", "shards")

    reads_alone = False  # nobody else will read a large body of the result: whoever sent the call deletes it from the store once it has it

    id: str
    backend: str
    deadline_ms: int  # store time
    envelope: Envelope | None  # kept for another try until the broker has confirmed it
    give_up_at: float  # monotonic; 0.0 until the first try has failed
    pace: Pace
    sender: RequestSender
    sent_at: float  # monotonic
    shards: tuple[int, ...]  # the queues of the backend that may still take it, the one that is tried now first

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def answered(self, result: Result) -> None:
        """Called with the result. User errors are results, too."""
        raise NotImplementedError

    def began(self, stream: IncomingStream) -> None:
        """Called with an answer that flows, once its head is there. The call has ended, and the stream goes on."""
        raise NotImplementedError

    def failed(self, error: MQServeError) -> None:
        """Called when no result will come: the broker did not take the message, or the request was cancelled."""
        raise NotImplementedError

    def abandoned(self) -> None:
        """Called when this process stops reading results."""
        raise NotImplementedError

    def ended(self, *, by_result: bool) -> None:
        """Counts the end for the backend's pace."""
        self.pace.ended(self.sent_at, time.monotonic(), answered=by_result)

    def settled(self, error: MQServeError | None) -> None:
        """The callback of the publish."""
        if error is not None:
            return self.sender.not_taken(self, error)
        if self.envelope is not None:
            self.sender.held.give(len(self.envelope.body))
            self.envelope = None


class Awaited:
    """Lets a call end in a future. Only sending fails the future; user errors are results."""

    __slots__ = ()

    future: asyncio.Future[Any]  # of a Result, or of an answer that flows

    def answered(self, result: Result) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def failed(self, error: MQServeError) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def abandoned(self) -> None:
        self.future.cancel()


class Ticket(Awaited, Call):
    """A call whose result is awaited."""

    __slots__ = ("future",)

    future: asyncio.Future[Result]

    def __init__(self, id: str) -> None:
        self.id = id
        self.future = asyncio.get_running_loop().create_future()

    def began(self, stream: IncomingStream) -> None:
        """It asked for an answer in one piece, and gets none."""
        self.failed(MQServeError("the handler streamed its answer to a caller that takes it in one piece: that is a bug in mqserve"))
        self.sender.leave(stream)
