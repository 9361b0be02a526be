"""A future: the result to come of one request, awaitable here, readable anywhere by its id."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pickle
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Self

from .broker import forks
from .broker.codecs import PICKLE, decode_value, media_type
from .broker.errors import BadSignature, BadType, BadValue, Cancelled, NotEncodable, RemoteError, RequestTimeout
from .broker.failures import add_note, describe
from .broker.results import ErrorInfo, Result
from .broker.signing import Claim, Signer

_OTHERS_OWN = (concurrent.futures.CancelledError, StopIteration, StopAsyncIteration)

if TYPE_CHECKING:
    from .sender import Sender

WAIT_LIMIT_S = 25 * 60  # no request lives longer
_moving = forks.Lock()  # of futures into a forked child


class Future:
    """Made by a handle or by `serve.future`. `await` it in a coroutine, or call `result()` anywhere else, in a forked child too."""

    def __init__(
        self,
        future_id: str,
        pending: concurrent.futures.Future[Result],
        read: Callable[[Result], Any],
        sender: Sender,
        *,
        backend: str | None = None,
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        self.id = future_id
        self._pending = pending
        self._read = read
        self._sender = sender
        self._backend = backend
        self._on_cancel = on_cancel  # beside what hangs on `pending` itself
        self._depth = forks.depth

    def __repr__(self) -> str:
        state = "of a parent process" if self._depth != forks.depth else "done" if self._pending.done() else "pending"
        return f"<Future {self.id} {state}>"

    def here(self) -> Self:
        """Itself. In a forked child, which has no thread that would resolve it, it waits by its id from now on, unless it was done before
        the fork. Raises InstanceError in a child of the embedded form's process."""
        if self._depth != forks.depth:
            with _moving:
                if self._depth != forks.depth:
                    self._move()
        return self

    def _move(self) -> None:
        self._pending._condition = threading.Condition()  # a thread of the parent may have held it in the moment of the fork
        if not self._pending.done():
            again = self._sender.find().future(self.id, self._backend)
            self._pending, self._read, self._sender, self._on_cancel = again._pending, again._read, again._sender, again._on_cancel
        self._depth = forks.depth

    def result(self, timeout: float | None = None) -> Any:
        """The value, in at most `timeout` seconds. Raises TimeoutError, and what the handler raised: as its own type where that could
        travel (the remote traceback is a note on it), else RemoteError."""
        limit_s = WAIT_LIMIT_S if timeout is None else timeout
        try:
            result = self.here()._pending.result(limit_s)
        except concurrent.futures.CancelledError:
            raise Cancelled(f"request {self.id} was cancelled by its caller") from None
        except concurrent.futures.TimeoutError:
            if self._pending.done():
                raise  # the request's own error, rather than the end of this wait
            raise TimeoutError(
                f"request {self.id} has no result yet after {limit_s:g} s; it goes on: wait again, or raise the timeout"
            ) from None
        return self._read(result)  # outside: what it raises is the handler's

    def done(self) -> bool:
        return self.here()._pending.done()

    def cancel(self) -> bool:
        """Nobody wants the result any more, here or elsewhere: a request that waits will not start, an async call is cancelled, a plain one
        may ask `serve.cancelled()`. Whether there was anything to give up."""
        cancelled = self.here()._pending.cancel()
        if cancelled and self._on_cancel is not None:
            self._on_cancel()
        return cancelled

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        try:
            return self._read(await asyncio.wrap_future(self.here()._pending))
        except asyncio.CancelledError:
            if self._pending.cancelled() and not _is_cancelling():
                raise Cancelled(f"request {self.id} was cancelled by its caller") from None
            raise


def get(refs: Future | Sequence[Future], timeout: float | None = None) -> Any:
    """The value of a future, or the list of values of several, in at most `timeout` seconds altogether; as `ray.get`."""
    if isinstance(refs, Future):
        return refs.result(timeout)
    if not isinstance(refs, list | tuple) or not all(isinstance(ref, Future) for ref in refs):
        raise BadType(
            f"get() takes a future or a list of them, not {refs!r}: await what an async handle's remote() returns, "
            "and make a future of an id with serve.future(id)"
        )
    if not refs:
        return []
    wait(refs, num_returns=len(refs), timeout=timeout)
    return [ref.result(0 if timeout is not None else None) for ref in refs]


def wait(refs: Sequence[Future], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Future], list[Future]]:
    """(done, not done), both in the order of `refs`, once `num_returns` are done or `timeout` seconds have passed; as `ray.wait`."""
    if not 0 < num_returns <= len(refs):
        raise BadValue(f"num_returns must lie between 1 and the number of futures ({len(refs)}), not {num_returns}")
    pending = {ref.here()._pending for ref in refs}
    left = num_returns
    try:
        for _ in concurrent.futures.as_completed(pending, timeout):
            left -= 1
            if left <= 0:
                break
    except concurrent.futures.TimeoutError:
        pass
    done = [ref for ref in refs if ref.done()]
    return done, [ref for ref in refs if ref not in done]


def check_results(results: object) -> None:
    """Raises BadValue for what no caller can ask for."""
    if results not in ("any", "plain"):
        raise BadValue(f"results must be 'any', or 'plain' for a caller that opens no pickle, not {results!r}")


def read_result(result: Result, future_id: str, signer: Signer, backend: str | None = None, *, plain: bool = False) -> Any:
    """The value of a result, or its error raised. `backend`: whose answer it must be. `plain`: no pickle is opened, whoever sealed it."""
    if backend is not None and result.backend and result.backend != backend:
        raise BadValue(f"the result {future_id!r} is the answer of backend {result.backend!r}, not of {backend!r}")
    if result.error is not None:
        raise _exception(result.error, result, future_id, signer, plain=plain)
    if result.content_type == "text/plain":  # without a charset: the handler returned bytes, or None
        return result.body or None
    if plain and media_type(result.content_type) == PICKLE:
        raise NotEncodable(
            f"the answer of backend {result.backend!r} to request {future_id} travels as a pickle, and this caller opens none "
            "(results='plain'): let the handler return None, bool, int, float, str, bytes, lists and str-keyed dicts"
        )
    return decode_value(result.body, result.content_type, signer, Claim("result", result.backend, future_id))


def _exception(error: ErrorInfo, result: Result, future_id: str, signer: Signer, *, plain: bool) -> BaseException:
    if result.status == 499:
        return Cancelled(error.message)
    if result.status == 504:
        return RequestTimeout(error.message, phase="run" if "(run)" in error.message else "queue")
    exception: BaseException = RemoteError(f"{error.type}: {error.message}")
    if error.sealed and not plain:
        try:
            opened = pickle.loads(signer.open(error.sealed, Claim("result", result.backend, future_id, "exception")))
            exception = opened if _may_be_raised_here(opened) else exception
        except BadSignature as refused:
            exception.add_note(f"its own object was not opened: {refused}")
        except BaseException as failed:  # of its class's own making
            exception.add_note(f"its own object could not be opened here: {describe(failed).words}")
    if error.traceback:
        add_note(exception, f"Remote traceback, of backend {result.backend!r}:\n{error.traceback.rstrip()}")
    return exception


def _may_be_raised_here(opened: object) -> bool:
    """Not what would end the caller's program, or count as the caller's own cancellation or end of an iteration: that happened to somebody
    else. Asked of the type, since an object can say that it is of another class."""
    return issubclass(type(opened), Exception) and not issubclass(type(opened), _OTHERS_OWN)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
