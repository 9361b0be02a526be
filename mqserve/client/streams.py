"""Streams: answers that flow, as the callers of handles read them, chunk by chunk, while the handler goes on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from ..broker.calls.call import Awaited, Call
from ..broker.calls.incoming import IncomingStream
from ..broker.errors import BadType, BadValue, Cancelled, InstanceError
from ..broker.process import forks
from ..broker.results import Result
from ..broker.streams import Chunk, End, Ending
from .futures import WAIT_LIMIT_S, is_cancelling

if TYPE_CHECKING:
    from .sender import Sender

_TELLS_EVERY_S = 1.0
_NOT_HERE = (
    "this stream is read by the process that this one was forked from: begin it in the child, or begin it with options(resumable=True) and "
    "go on here with serve.stream(id, after=seq)"
)


class Flowing(NamedTuple):
    """An answer that flows, and the backend that makes it."""

    incoming: IncomingStream
    backend: str


Began = tuple[str, Result | Flowing]  # (id, the answer)


class StreamTicket(Awaited, Call):
    """A call whose answer may flow. Its future ends with what flows, or with the answer in one piece."""

    __slots__ = ("future",)

    def __init__(self, id: str) -> None:
        self.id = id
        self.future: asyncio.Future[Result | Flowing] = asyncio.get_running_loop().create_future()

    def began(self, stream: IncomingStream) -> None:
        if not self.future.done():
            self.future.set_result(Flowing(stream, self.backend))


class _State(Enum):
    OPEN = "open"
    ENDED = "ended"  # all that there is was taken, or an error was raised
    CLOSED = "closed"  # by its reader


class Stream(AsyncGenerator[Any, None]):
    """The values that a handler yields, one after the other; `handle.stream` and `serve.stream` return one. Iterate with `async for` in a
    coroutine, or with `for` anywhere else.

    The handler is at most 64 chunks or 1 MiB ahead of what was taken here, then it waits. Its exception is raised behind the values that
    came before it. Leaving earlier cancels the request: by `close()`, at the end of a `with` block, or by letting the object go. Iterating
    a stream that was closed before its end raises Cancelled, so that what was cut never looks whole.
    """

    def __init__(
        self, stream_id: str, began: concurrent.futures.Future[Began], sender: Sender, *, plain: bool = False, after: int = 0
    ) -> None:
        self.id = stream_id
        self.seq = after
        """The number of the last chunk that was taken, behind which `serve.stream(id, after=seq)` goes on. Numbers grow, by 1 or more."""
        self._began = began
        self._sender = sender
        self._plain = plain
        self._source: Flowing | None = None
        self._chunks: deque[Chunk] = deque()
        self._size = 0  # of the chunks that were taken
        self._told_at = time.monotonic()  # the time when the replica was last told of them
        self._end: End | None = None  # behind `_chunks`
        self._state = _State.OPEN
        self._step = threading.Lock()  # held during a step
        self._depth = forks.depth

    def __repr__(self) -> str:
        return f"<Stream {self.id}, {self._state.value}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream is read in the process that began it; pass on its values, or its id if it is resumable")

    # In plain code.

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Waits for the next value. Raises the handler's exception like `Future.result`, ReplicaLost if its replica died in between,
        RequestTimeout, Cancelled, and BadType if the handler does not yield."""
        with self._stepping():
            while (wait := self._awaited()) is not None:
                self._accept(_waited_for(wait))
            if self._state is _State.OPEN:
                return self._open(self._chunks.popleft())
            self._check_not_cut()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In coroutines.

    async def asend(self, value: Any) -> Any:
        """Waits for the next value like `__next__`; `async for` calls this. What is sent goes nowhere."""
        with self._stepping():
            while (wait := self._awaited()) is not None:
                self._accept(await _wait_for(wait))
            if self._state is _State.OPEN:
                return self._open(self._chunks.popleft())
            self._check_not_cut()
        raise StopAsyncIteration

    async def athrow(self, kind: Any, error: Any = None, trace: Any = None) -> Any:
        """Closes the stream, and raises the exception."""
        self.close()
        raise kind if error is None else error

    async def aclose(self) -> None:
        """Like `close`, which does not wait either."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # In both.

    def close(self) -> None:
        """Ends the stream before its end; does nothing after it. The request is cancelled: an async generator at its `await`, a plain one
        after its step. A resumable one waits `resume_grace_s` for `serve.stream` to go on with it, and is cancelled then. Who waits for the
        next value here, or asks for one later, gets Cancelled."""
        if self._state is _State.OPEN and self._depth == forks.depth:
            self._state = _State.CLOSED
            if not self._began.cancel():
                self._began.add_done_callback(partial(_leave, self._sender))

    def cancel(self) -> None:
        """Cancels the request for everybody, also if it is resumable. Its readers get Cancelled."""
        self._check_here()
        self.close()
        self._sender.cancel_soon(self.id)

    def __del__(self) -> None:
        with suppress(AttributeError):  # of one whose making failed
            self.close()

    # The parts of a step.

    def _check_here(self) -> None:
        if self._depth != forks.depth:
            raise InstanceError(_NOT_HERE)

    def _check_not_cut(self) -> None:
        if self._state is _State.CLOSED:
            raise Cancelled(f"stream {self.id} was closed before its end: what was taken is not all of it")

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Around a step of one thread or task. An exception in it ends the stream."""
        self._check_here()
        if not self._step.acquire(blocking=False):
            raise BadValue(f"another thread or task waits for the next value of stream {self.id}: let one after the other take them")
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            self._step.release()

    def _awaited(self) -> concurrent.futures.Future[Any] | None:
        """Returns what has to be waited for before there is a chunk to take; None if there is one, or there will be none."""
        if self._chunks or self._state is not _State.OPEN:
            return None
        if self._end is not None:
            self._finish(self._end)
            return None
        return self._began if self._source is None else self._sender.more(self._source.incoming)

    def _accept(self, found: Any) -> None:
        """Takes what was waited for: the beginning, or more; None if the stream was closed meanwhile."""
        if self._state is not _State.OPEN:
            return
        if self._source is not None:
            self._chunks, self._end = found
            self._told_at = time.monotonic()
        elif isinstance(found[1], Flowing):
            self._source = found[1]
        else:
            self._state = _State.ENDED
            self._sender.read(self.id, found[1], plain=self._plain)
            raise BadType(f"the handler of request {self.id} returned its answer in one piece: call it with remote(), or let it yield")

    def _open(self, chunk: Chunk) -> Any:
        assert self._source is not None, "it brought the chunk"
        self.seq = chunk.seq
        self._size += len(chunk.data)
        if (now := time.monotonic()) > self._told_at + _TELLS_EVERY_S:
            self._told_at = now
            self._sender.took(self._source.incoming, self.seq, self._size)
        made = Result(backend=self._source.backend, content_type=chunk.content_type, body=chunk.data)
        try:
            return self._sender.read(self.id, made, plain=self._plain)
        except Exception:  # this says that there is no more
            self.close()
            self._state = _State.ENDED
            raise

    def _finish(self, end: End) -> None:
        assert self._source is not None, "it brought the end"
        self._state = _State.ENDED
        if end.error is None:
            return
        self._sender.leave(self._source.incoming)  # the reader alone may have ended it, and the handler go on
        if end.outcome in (Ending.LOST, Ending.CANCELLED) and self._sender.over:
            raise InstanceError(self._sender.over)
        self._sender.read(self.id, Result(status=end.status, backend=self._source.backend, error=end.error), plain=self._plain)


def _waited_for(wait: concurrent.futures.Future[Any]) -> Any:
    """Waits in this thread. Returns None if what is waited for was cancelled."""
    try:
        return wait.result(WAIT_LIMIT_S)
    except concurrent.futures.CancelledError:
        return None


async def _wait_for(wait: concurrent.futures.Future[Any]) -> Any:
    """Like `_waited_for`, in a coroutine."""
    try:
        return await asyncio.wrap_future(wait)
    except asyncio.CancelledError:
        if wait.cancelled() and not is_cancelling():
            return None
        raise


def _leave(sender: Sender, began: concurrent.futures.Future[Began]) -> None:
    """Stops reading an answer that has begun, now or just when its reader closed it."""
    if began.cancelled() or began.exception() is not None:
        return
    source = began.result()[1]
    if isinstance(source, Flowing):
        sender.leave(source.incoming)
