"""An ASGI app as a replica's code: how an app is told from a handler, its lifespan, and the threads that its plain endpoints run in."""

from __future__ import annotations

import asyncio
import inspect
import logging
from asyncio.base_events import _run_until_complete_cb  # type: ignore[attr-defined]
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..broker.envelope import Envelope
from ..broker.errors import BadType, MQServeError
from ..broker.failures import traceback_of
from ..broker.process.printable import printable_lines

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
ASGIApp = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]
Keep = Callable[["asyncio.Task[None]"], None]
"""Takes a task into the worker's register, so that it ends with the worker."""

_ARGUMENTS = ["scope", "receive", "send"]
_LAST_WORDS_S = 1.0  # an app that has reported that its startup failed, or its shutdown is complete, raises or returns within this


class LifespanFailed(MQServeError):
    """An app said that its startup failed, and raised no exception of its own."""


class NoHttpRequest(BadType):
    """A handle or a direct publisher called a backend that is an ASGI app, which answers HTTP requests only."""

    status = 422


def check_is_http(envelope: Envelope) -> None:
    """Raises NoHttpRequest for a request that an app cannot answer."""
    if envelope.header.origin != "http" or envelope.carries:
        sender = "a job after others" if envelope.carries else "a handle" if envelope.header.origin == "handle" else "a direct publisher"
        raise NoHttpRequest(
            f"the backend is an ASGI app, which answers HTTP requests, and {sender} sends none: call its route, or send this to a backend "
            "that is a function or a class"
        )


def is_asgi_app(target: Any) -> bool:
    """Whether it is called as `await app(scope, receive, send)`: an async callable that needs three arguments, or a plain one whose
    parameters have these names. A handler is called with the request alone, so none is taken for an app."""
    return callable(target) and not inspect.isclass(target) and _takes_scope(target, is_async=_is_async(target))


def makes_asgi_apps(target: Any) -> bool:
    """Whether it is a class whose instances are ASGI apps."""
    if not inspect.isclass(target):
        return False
    call = next((vars(base)["__call__"] for base in target.__mro__ if "__call__" in vars(base)), None)
    return inspect.isfunction(call) and _takes_scope(call, is_async=inspect.iscoroutinefunction(call), skipped=1)


def _is_async(target: Any) -> bool:
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004


def _takes_scope(function: Callable[..., Any], *, is_async: bool, skipped: int = 0) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())[skipped:]
    except (TypeError, ValueError):
        return False
    needed = [one.name for one in parameters if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return len(needed) == len(_ARGUMENTS) and (is_async or needed == _ARGUMENTS)


class HostedApp:
    """An ASGI app in one replica. `start` and `stop` are called on the worker's loop, before the first request and after the last one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._lifespan = Lifespan(app)
        self._threads: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<HostedApp {type(self._app).__name__}, {self._lifespan!r}>"

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        """Answers a request. Each gets a copy of the state that the lifespan has set."""
        scope["state"] = {**self._lifespan.state, **scope["state"]}
        await self._app(scope, receive, send)

    async def start(self, keep: Keep) -> None:
        """Returns when the app has started. Raises the exception of a startup that failed."""
        # AnyIO ends the threads of plain endpoints with the task that `run_until_complete` runs, and where no loop runs one, with the
        # request that happened to start them. So this task looks like one.
        self._threads = asyncio.create_task(_wait_for_ever())
        self._threads.add_done_callback(_run_until_complete_cb)
        keep(self._threads)
        await self._lifespan.start(keep)

    async def stop(self) -> None:
        """Runs the lifespan's shutdown, and ends the threads."""
        try:
            await self._lifespan.stop()
        finally:
            if self._threads is not None:
                self._threads.remove_done_callback(_run_until_complete_cb)  # which stops the loop
                self._threads.cancel()


class Lifespan:
    """The lifespan of an ASGI app. `state` is what the app sets in its scope.

    An app that raises before it has asked for the first event, or that returns, has no lifespan. One that raises later has failed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.state: dict[str, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._has_asked = self._was_told_to_end = False
        self._started: asyncio.Future[str] | None = None  # with the reason why it failed, or an empty string
        self._ended: asyncio.Future[str] | None = None  # likewise
        self._may_end = asyncio.Event()

    def __repr__(self) -> str:
        runs = self._task is not None and not self._task.done()
        return f"<Lifespan, {'running' if runs else 'not running'}>"

    async def start(self, keep: Keep) -> None:
        loop = asyncio.get_running_loop()
        self._started, self._ended = loop.create_future(), loop.create_future()
        self._task = asyncio.create_task(self._run())
        keep(self._task)
        try:
            await _until_either(self._task, self._started)
            if self._started.done() and (failure := self._started.result()):
                await asyncio.wait({self._task}, timeout=_LAST_WORDS_S)
                raise self._take_error() or LifespanFailed(failure)
            if self._task.done() and not self._started.done() and (error := self._take_error()) is not None and self._has_asked:
                raise error
        except BaseException:
            self._task.cancel()
            raise

    async def stop(self) -> None:
        if self._task is None or self._ended is None:
            return
        try:
            self._may_end.set()
            await _until_either(self._task, self._ended)
            await asyncio.wait({self._task}, timeout=_LAST_WORDS_S)
            failure = self._ended.result() if self._ended.done() else ""
            if (error := self._take_error()) is not None:
                failure = traceback_of(error)
            if failure:
                logger.error("the shutdown of an ASGI app failed\n%s", printable_lines(failure.rstrip()))
        finally:
            self._task.cancel()

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except BaseException as error:  # also SystemExit, which would end the loop of all requests
            self._error = error

    async def _receive(self) -> Message:
        if not self._has_asked:
            self._has_asked = True
            return {"type": "lifespan.startup"}
        if self._was_told_to_end:
            await _wait_for_ever()
        await self._may_end.wait()
        self._was_told_to_end = True
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        told, _, outcome = str(message["type"]).removeprefix("lifespan.").partition(".")
        future = {"startup": self._started, "shutdown": self._ended}.get(told)
        if future is not None and not future.done():
            future.set_result(str(message.get("message") or f"the {told} failed") if outcome == "failed" else "")

    def _take_error(self) -> BaseException | None:
        error, self._error = self._error, None  # an exception holds its frames, and one of them this object
        return error


async def _until_either(task: asyncio.Task[None], told: asyncio.Future[str]) -> None:
    awaited: set[asyncio.Future[Any]] = {task, told}
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)


async def _wait_for_ever() -> None:
    await asyncio.get_running_loop().create_future()
