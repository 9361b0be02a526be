"""Two ways to batch: `accept_batch` marks a handler that takes a list of requests; `batch` lets an async function that takes a list be
called with single items."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from enum import Enum
from functools import wraps
from typing import Any, Final, Protocol, TypeVar, cast, overload

from ..broker.errors import BadType, BadValue
from ..broker.values.whole_numbers import whole_number

T = TypeVar("T", bound=Callable[..., Any])

_MARK = "_mqserve_accepts_batch"


class _End(Enum):
    END = "end"

    def __repr__(self) -> str:
        return "mqserve.END"


END: Final = _End.END
"""Yielded by a handler of batches in the place of a member whose answer has ended."""


class BadBatch(BadValue):
    """A batch handler's result does not fit its requests. Each request of the batch gets this error."""


def accept_batch(target: T) -> T:
    """Marks a function, a method or a class: it gets a list of requests, and returns as many results in their order.

    One that yields streams its answers: each list has the next chunk of every answer, and END for one that has ended.

    On a class it marks `__call__` or, if there is none, all methods. Without `max_batch_size` in the config the lists have one request
    each.
    """
    if not callable(target):
        raise BadType(f"@serve.accept_batch marks a function, a method or a class, not {target!r}")
    marked: Any = _own_call(target) if inspect.isclass(target) else target
    setattr(marked, _MARK, True)
    return target  # pyright: ignore[reportReturnType]  `callable` has narrowed it to something else than T


def _own_call(kind: type) -> Any:
    """Returns the class's `__call__`, or the class itself if it defines none: `kind.__call__` would be that of its metaclass."""
    return next((vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)), kind)


def accepts_batch(target: Any) -> bool:
    """Whether a function, a bound method, a class or an instance takes batches."""
    if getattr(target, _MARK, False) or getattr(type(getattr(target, "__self__", None)), _MARK, False):
        return True
    return not inspect.isroutine(target) and bool(getattr(getattr(target, "__call__", None), _MARK, False))  # noqa: B004


def split_results(value: Any, expected: int, verb: str = "return") -> list[Any]:
    """Returns one result for each request. Raises BadBatch for a value that is not ordered or has another length; `verb` says what the
    handler did with it."""
    if isinstance(value, str | bytes | dict | set | frozenset) or not hasattr(value, "__iter__"):
        raise BadBatch(
            f"a batch handler {verb}ed a {type(value).__name__}: {verb} an ordered iterable, such as a list, with one result per request"
        )
    results = list(value)
    if len(results) != expected:
        raise BadBatch(
            f"the handler doesn't preserve batch size: it got {expected} requests and {verb}ed {len(results)} results; {verb} one for each"
        )
    return results


class Batched(Protocol):
    """A function decorated by `batch`. It is called with one item, and can be tuned while it runs."""

    def __call__(self, *item: Any) -> Coroutine[Any, Any, Any]: ...

    def set_max_batch_size(self, size: int) -> None: ...

    def set_batch_wait_timeout_s(self, wait_s: float) -> None: ...


TakesList = Callable[..., Coroutine[Any, Any, Any]]


@overload
def batch(function: TakesList) -> Batched: ...
@overload
def batch(*, max_batch_size: int = 10, batch_wait_timeout_s: float = 0.0) -> Callable[[TakesList], Batched]: ...


def batch(
    function: TakesList | None = None, *, max_batch_size: int = 10, batch_wait_timeout_s: float = 0.0
) -> Batched | Callable[[TakesList], Batched]:
    """Lets an `async def` that takes a list be called with single items: concurrent callers share one call.

    A batch starts when it is full, or `batch_wait_timeout_s` after its first item. The decorated function's `set_max_batch_size` and
    `set_batch_wait_timeout_s` change this while it runs. Raises BadType for a function that is not async, BadValue for a bad size or
    wait.
    """
    _check(max_batch_size, batch_wait_timeout_s)

    def decorate(function: TakesList) -> Batched:
        if not inspect.iscoroutinefunction(function):
            raise BadType("@serve.batch decorates an `async def` that takes a list and returns a list")
        tuning = _Tuning(max_batch_size, batch_wait_timeout_s)
        gatherers = _Gatherers(function, tuning)
        is_method = next(iter(inspect.signature(function).parameters), "") == "self"

        @wraps(function)
        async def call(*arguments: Any, **named: Any) -> Any:
            expected = 2 if is_method else 1
            if named or len(arguments) != expected:
                raise BadValue("a @serve.batch function is called with exactly one positional argument: the item")
            return await gatherers.of(arguments[:-1]).add(arguments[-1])

        call.set_max_batch_size = tuning.set_size  # type: ignore[attr-defined]
        call.set_batch_wait_timeout_s = tuning.set_wait  # type: ignore[attr-defined]
        return cast(Batched, call)

    return decorate if function is None else decorate(function)


class _Tuning:
    def __init__(self, size: int, wait_s: float) -> None:
        self.size = size
        self.wait_s = wait_s

    def set_size(self, size: int) -> None:
        _check(size, self.wait_s)
        self.size = size

    def set_wait(self, wait_s: float) -> None:
        _check(self.size, wait_s)
        self.wait_s = wait_s


class _Gatherers:
    """The gatherers of one decorated function: a single one, or for a method one per instance. A pickle of it has no waiting items."""

    def __init__(self, function: Callable[..., Awaitable[Any]], tuning: _Tuning) -> None:
        self._function = function
        self._tuning = tuning
        self._of_function = _Gatherer(function, tuning)
        self._of_instances: dict[int, _Gatherer] = {}  # by identity: an instance may not be hashable

    def __reduce__(self) -> Any:
        return _Gatherers, (self._function, self._tuning)

    def of(self, owner: Sequence[Any]) -> _Gatherer:
        if not owner:
            return self._of_function
        instance = owner[0]
        if id(instance) not in self._of_instances:
            function, reference = self._function, weakref.ref(instance)  # a strong one would keep the instance alive
            self._of_instances[id(instance)] = _Gatherer(lambda items: function(reference(), items), self._tuning)
            weakref.finalize(instance, self._of_instances.pop, id(instance), None)
        return self._of_instances[id(instance)]


class _Gatherer:
    """Gathers the items of one function or instance into batches, on one event loop."""

    def __init__(self, call: Callable[[list[Any]], Awaitable[Any]], tuning: _Tuning) -> None:
        self._call = call
        self._tuning = tuning
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._timer: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, item: Any) -> Any:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((item, result))
        if len(self._waiting) >= self._tuning.size:
            self._go()
        elif self._timer is None:
            wait_s = self._tuning.wait_s
            self._timer = loop.call_later(wait_s, self._go) if wait_s > 0 else loop.call_soon(self._go)
        return await result

    def _go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        members, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._run(members))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, members: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            results = split_results(await self._call([item for item, _ in members]), len(members))
        except asyncio.CancelledError:
            for _, result in members:
                result.cancel()
            raise
        except BaseException as error:  # SystemExit too: it fails the members, and must not end their loop
            for _, result in members:
                if not result.done():
                    result.set_exception(error)
            return
        for (_, result), value in zip(members, results, strict=True):
            if not result.done():
                result.set_result(value)


def _check(size: object, wait_s: object) -> None:
    number = whole_number(size)
    if number is None:
        raise BadType(f"max_batch_size must be a whole number, not {size!r}")
    if number < 1:
        raise BadValue(f"max_batch_size must be 1 or more, not {size}")
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float):
        raise BadType(f"batch_wait_timeout_s must be a number of seconds, not {wait_s!r}")
    if wait_s < 0:
        raise BadValue(f"batch_wait_timeout_s must be 0 or more, not {wait_s}")
