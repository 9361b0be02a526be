"""Futures: the results to come of requests. A future can be awaited in this process, and read by its id in any other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..broker.errors import BadType, BadValue, Cancelled
from ..broker.process import forks
from ..broker.results import Result
from ..broker.values.whole_numbers import whole_number

if TYPE_CHECKING:
    from .sender import Sender

WAIT_LIMIT_S = 25 * 60  # longer than any request lives
READ_BUDGET_S = 10.0  # for reading a result that is already stored
_moving = forks.Lock()  # held while a future moves into a forked child

Found = tuple[str, Result]  # (key, result)


class Future:
    """The result to come of a request; handles and `serve.future` return one. `await` it in a coroutine, or call `result()` anywhere else,
    also in a forked child.

    A future of `serve.future` does not poll in the background: only `result()`, `done()`, `await` and `serve.wait` ask the store.
    """

    def __init__(self, future_id: str, source: Source) -> None:
        self.id = future_id
        self._source = source
        self._depth = forks.depth

    def __repr__(self) -> str:
        state = "of a parent process" if self._depth != forks.depth else self._source.state
        return f"<Future {self.id}{state and ' '}{state}>"

    def here(self) -> Self:
        """Returns the future itself. A forked child has no thread to resolve a future that was not done before the fork, so from now on it
        reads the store by its id. Raises InstanceError in a forked child of the embedded form."""
        if self._depth != forks.depth:
            with _moving:
                if self._depth != forks.depth:
                    self._source = self._source.in_child(self.id)
                    self._depth = forks.depth
        return self

    def result(self, timeout: float | None = None) -> Any:
        """Returns the value. Raises TimeoutError after `timeout` seconds (with 0, if the value is not there yet), StoreUnavailable if the
        store cannot be asked, and the handler's exception: of its own type if it could be pickled (the remote traceback is a note on it),
        else RemoteError."""
        source = self.here()._source
        limit_s = source.limit_s if timeout is None else timeout
        if limit_s is not None and limit_s <= 0:
            if not source.done():
                raise self._not_yet(limit_s)
            limit_s = READ_BUDGET_S
        with source.waiting() as pending:
            try:
                found = pending.result(limit_s)
            except concurrent.futures.CancelledError:
                raise self._cancelled() from None
            except concurrent.futures.TimeoutError:
                if pending.done() or limit_s is None:
                    raise  # the request's own error, not the end of this wait
                raise self._not_yet(limit_s) from None
        return source.read(*found)  # outside the try: an error raised here is the handler's

    def done(self) -> bool:
        """Whether it has a result or an error. A future of `serve.future` asks the store once, raises StoreUnavailable if it cannot, and
        returns False for an id that was never sent."""
        return self.here()._source.done()

    def cancel(self) -> bool:
        """Cancels the request for everybody: a waiting request will not start, an async call is cancelled, and a plain call can see it by
        `serve.cancelled()`. Returns whether the request was still without a result."""
        return self.here()._source.cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        source = self.here()._source
        with source.waiting() as pending:
            try:
                found = await asyncio.wrap_future(pending)
            except asyncio.CancelledError:
                if pending.cancelled() and not is_cancelling():
                    raise self._cancelled() from None
                raise
        return source.read(*found)

    def waiting(self) -> AbstractContextManager[concurrent.futures.Future[Found]]:
        """Returns a block in which a result is waited for, by the future that it yields; `value_of` opens what that found."""
        return self.here()._source.waiting()

    def value_of(self, waited: concurrent.futures.Future[Found]) -> Any:
        """Returns the value, or raises the error, of a wait that has ended."""
        try:
            found = waited.result(0)
        except concurrent.futures.CancelledError:
            raise self._cancelled() from None
        return self._source.read(*found)

    def _not_yet(self, limit_s: float) -> TimeoutError:
        return TimeoutError(f"request {self.id} has no result yet after {limit_s:g} s{self._source.not_yet}")

    def _cancelled(self) -> Cancelled:
        return Cancelled(f"request {self.id} was cancelled by its caller")


class Source(Protocol):
    """Where the result of a future comes from."""

    @property
    def limit_s(self) -> float | None:
        """How long `result` waits if it is given no time."""
        ...

    @property
    def not_yet(self) -> str:
        """The end of the sentence that says that there is no result yet."""
        ...

    @property
    def state(self) -> str:
        """For `repr`; empty if it is not known."""
        ...

    def in_child(self, future_id: str) -> Source:
        """Returns the source to use in a forked child."""
        ...

    def waiting(self) -> AbstractContextManager[concurrent.futures.Future[Found]]: ...

    def done(self) -> bool: ...

    def cancel(self) -> bool: ...

    def read(self, key: str, result: Result) -> Any: ...


class Sent:
    """The result of a request sent by this process; it resolves without polling."""

    limit_s = WAIT_LIMIT_S

    def __init__(self, pending: concurrent.futures.Future[Found], sender: Sender, *, plain: bool) -> None:
        self._pending = pending
        self._sender = sender
        self._plain = plain

    @property
    def not_yet(self) -> str:
        return f"; {self._sender.prospects}"

    @property
    def state(self) -> str:
        return "done" if self._pending.done() else "pending"

    def in_child(self, future_id: str) -> Sent | Stored:
        self._pending._condition = threading.Condition()  # a thread of the parent may have held it at the moment of the fork
        return self if self._pending.done() else Stored([future_id], self._sender.find(), plain=self._plain)

    def waiting(self) -> AbstractContextManager[concurrent.futures.Future[Found]]:
        return nullcontext(self._pending)

    def done(self) -> bool:
        return self._pending.done()

    def cancel(self) -> bool:
        return self._pending.cancel()

    def read(self, key: str, result: Result) -> Any:
        return self._sender.read(key, result, plain=self._plain)


class Stored:
    """A result that is read from the store, under the first of these keys that has one. Each waiter polls for itself."""

    limit_s = WAIT_LIMIT_S
    state = ""  # unknown, since nobody has asked the store
    not_yet = ": wait again, if somebody sent it; the message_id of a published message needs its backend or endpoint, too"

    def __init__(self, keys: Sequence[str], sender: Sender, *, backend: str | None = None, plain: bool = False) -> None:
        self._keys = keys
        self._sender = sender
        self._backend = backend
        self._plain = plain

    def in_child(self, future_id: str) -> Stored:
        return Stored(self._keys, self._sender.find(), backend=self._backend, plain=self._plain)

    @contextmanager
    def waiting(self) -> Iterator[concurrent.futures.Future[Found]]:
        pending = self._sender.first_result(self._keys)
        try:
            yield pending
        finally:
            pending.cancel()

    def done(self) -> bool:
        return self._sender.has_result(self._keys)

    def cancel(self) -> bool:
        return self._sender.cancel_everywhere(self._keys)

    def read(self, key: str, result: Result) -> Any:
        return self._sender.read(key, result, backend=self._backend, plain=self._plain)


def get(refs: Future | Sequence[Future], timeout: float | None = None) -> Any:
    """Returns the value of a future, or the list of values of several, like `ray.get`. Raises TimeoutError after `timeout` seconds
    altogether."""
    if isinstance(refs, Future):
        return refs.result(timeout)
    if not isinstance(refs, list | tuple) or not all(isinstance(ref, Future) for ref in refs):
        raise BadType(
            f"get() takes a future or a list of them, not {refs!r}: await what an async handle's remote() returns, "
            "make a future of an id with serve.future(id), and loop over a stream"
        )
    if not refs:
        return []
    wait(refs, num_returns=len(refs), timeout=timeout)
    return [ref.result(0 if timeout is not None else None) for ref in refs]


def wait(refs: Sequence[Future], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Future], list[Future]]:
    """Returns (done, not done), both in the order of `refs`, once `num_returns` are done or `timeout` seconds have passed; like
    `ray.wait`."""
    if not isinstance(refs, Collection) or not all(isinstance(ref, Future) for ref in refs):
        raise BadType(f"wait() takes a list of futures, not {refs!r}: loop over a stream")
    wanted = whole_number(num_returns)
    if wanted is None or not 0 < wanted <= len(refs):
        raise BadValue(f"num_returns must be a whole number between 1 and that of the futures ({len(refs)}), not {num_returns!r}")
    in_time = False
    with ExitStack() as stack:
        pending = [stack.enter_context(ref.waiting()) for ref in refs]
        try:
            for count, _ in enumerate(concurrent.futures.as_completed(set(pending), timeout), start=1):
                if in_time := count >= wanted:
                    break
        except concurrent.futures.TimeoutError:
            pass
        # A short timeout may have ended before stored results were read, so ask once more.
        done = {id(ref) for ref, its in zip(refs, pending, strict=True) if its.done() or (not in_time and ref.done())}
    return [ref for ref in refs if id(ref) in done], [ref for ref in refs if id(ref) not in done]


def is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
