"""Waiting for many futures, jobs among them: as they get done, and for all of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Self

from ..broker.errors import BadType
from .futures import READ_BUDGET_S, Found, Future


class Arrived(NamedTuple):
    """A future that is done, and the wait that says so."""

    number: int  # in the order in which they were added
    ref: Future
    waited: concurrent.futures.Future[Found]

    def value(self) -> Any:
        """Returns the value, or raises the error."""
        return self.ref.value_of(self.waited)


class Arrivals:
    """The futures that were added, in the order in which they get done. One thread or task at a time takes them."""

    def __init__(self, refs: Iterable[Future] = ()) -> None:
        self.left = 0
        """The number of those that were added and not taken."""
        self._done: deque[Arrived] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._waits: dict[int, AbstractContextManager[Any]] = {}  # by the number of the one that was added
        self._added = 0
        for ref in refs:
            self.add(ref)

    def __repr__(self) -> str:
        return f"<Arrivals, {len(self._done)} to take, {self.left - len(self._done)} to wait for>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._waits):
            self._waits.pop(number).__exit__(None, None, None)

    def add(self, ref: Future) -> None:
        self._added += 1
        wait = ref.waiting()
        waited = wait.__enter__()
        self._waits[self._added] = wait
        self.left += 1
        waited.add_done_callback(partial(self._arrived, self._added, ref))

    def _arrived(self, number: int, ref: Future, waited: concurrent.futures.Future[Found]) -> None:
        with self._changed:
            self._done.append(Arrived(number, ref, waited))
            self._changed.notify()
            waiter = self._waiter
        if waiter is not None:
            loop, event = waiter
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def take(self, until: float | None = None) -> Arrived:
        """Waits for the next one. Raises TimeoutError when the monotonic time `until` has come."""
        with self._changed:
            while not self._done:
                if not self._changed.wait(None if until is None else max(0.0, until - time.monotonic())) and not self._done:
                    raise self._late()
        return self._taken()

    async def take_soon(self, until: float | None = None) -> Arrived:
        """Does the same in a coroutine."""
        event = asyncio.Event()
        with self._changed:
            self._waiter = (asyncio.get_running_loop(), event)
        try:
            while not self._done:
                event.clear()
                async with asyncio.timeout(None if until is None else max(0.0, until - time.monotonic())):
                    if not self._done:
                        await event.wait()
        except TimeoutError:
            raise self._late() from None
        finally:
            self._waiter = None
        return self._taken()

    def _taken(self) -> Arrived:
        arrived = self._done.popleft()
        self.left -= 1
        self._waits.pop(arrived.number).__exit__(None, None, None)
        return arrived

    def _late(self) -> TimeoutError:
        return TimeoutError(f"{self.left} of the futures have no result yet")


class AsCompleted:
    """The futures of `as_completed`: iterate with `for`, or with `async for` in a coroutine."""

    def __init__(self, refs: Collection[Future], timeout: float | None) -> None:
        self._refs = refs
        self._until = None if timeout is None else time.monotonic() + timeout

    def __iter__(self) -> Iterator[Future]:
        with Arrivals(self._refs) as arrivals:
            while arrivals.left:
                yield arrivals.take(self._until).ref

    async def __aiter__(self) -> AsyncIterator[Future]:
        with Arrivals(self._refs) as arrivals:
            while arrivals.left:
                yield (await arrivals.take_soon(self._until)).ref


def as_completed(refs: Collection[Future], timeout: float | None = None) -> AsCompleted:
    """Returns futures and jobs in the order in which they get done, to iterate with `for`, or with `async for` in a coroutine. Iterating
    raises TimeoutError `timeout` seconds after this call."""
    return AsCompleted(_checked(refs, "as_completed"), timeout)


class Gathered:
    """The values of several futures and jobs, in their order. `await` them in a coroutine, or call `result()` anywhere else."""

    def __init__(self, refs: Collection[Future], *, return_exceptions: bool) -> None:
        self._refs = refs
        self._returns_exceptions = return_exceptions

    def __repr__(self) -> str:
        return f"<Gathered of {len(self._refs)}>"

    def result(self, timeout: float | None = None) -> list[Any]:
        """Waits for all. Raises the first error there is, without waiting for the others, and TimeoutError after `timeout` seconds (with 0,
        if one is not done)."""
        if timeout is not None and timeout <= 0:
            if not self.done():
                raise TimeoutError("not all of the futures have a result yet")
            timeout = READ_BUDGET_S
        until = None if timeout is None else time.monotonic() + timeout
        values: dict[int, Any] = {}
        with Arrivals(self._refs) as arrivals:
            while arrivals.left:
                self._keep(arrivals.take(until), values)
        return [values[id(ref)] for ref in self._refs]

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self._wait().__await__()

    async def _wait(self) -> list[Any]:
        values: dict[int, Any] = {}
        with Arrivals(self._refs) as arrivals:
            while arrivals.left:
                self._keep(await arrivals.take_soon(), values)
        return [values[id(ref)] for ref in self._refs]

    def _keep(self, arrived: Arrived, values: dict[int, Any]) -> None:
        try:
            values[id(arrived.ref)] = arrived.value()
        except Exception as error:
            if not self._returns_exceptions:
                raise
            values[id(arrived.ref)] = error

    def done(self) -> bool:
        """Whether all are done. See `Future.done`."""
        return all(ref.done() for ref in self._refs)

    def cancel(self) -> None:
        """Cancels all that are not done."""
        for ref in self._refs:
            ref.cancel()


def gather(*refs: Future, return_exceptions: bool = False) -> Gathered:
    """Returns the values of futures and jobs, in their order, to `await` or to ask for their `result()`. With `return_exceptions` an error
    stands in the place of its value."""
    return Gathered(_checked(refs, "gather"), return_exceptions=return_exceptions)


def _checked(refs: Collection[Future], name: str) -> Collection[Future]:
    if not isinstance(refs, Collection) or not all(isinstance(ref, Future) for ref in refs):
        raise BadType(f"{name}() takes futures and jobs, not {refs!r}: await what an async handle's remote() or submit() returns")
    return refs
