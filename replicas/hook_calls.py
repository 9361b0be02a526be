"""Calls of user code outside any request: imports, constructors and hooks, in the worker's thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..broker.errors import BackendFailed, words_of
from ..broker.failures import Failure, describe
from ..broker.process import forks
from .call_contexts import CallContexts


class Raised(Exception):
    """User code raised an exception outside a request; `failure` is the exception as plain data."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.words)
        self.failure = failure


class HookCalls:
    """The calls of one worker. `without_loop(function, …)` calls plain code in the thread, `run_task(work, context)` runs a task there."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        contexts: CallContexts,
        without_loop: Callable[..., Any],
        run_task: Callable[..., asyncio.Task[None]],
    ) -> None:
        self._loop = loop
        self._contexts = contexts
        self._without_loop = without_loop
        self._run_task = run_task
        self._depth = forks.depth
        self.since = math.inf  # monotonic: when the call that now holds the thread began; infinite if none does

    def __repr__(self) -> str:
        return f"<HookCalls{'' if math.isinf(self.since) else ', one under way'}>"

    async def call(self, function: Callable[[], Any], *, constructs: bool) -> Any:
        """See `Worker.call`."""
        pending: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            self._loop.call_soon_threadsafe(self._call, function, constructs, pending)
        except RuntimeError as error:  # closed
            raise BackendFailed(f"user code has ended its replica's event loop: {words_of(error)}") from error
        outcome = await asyncio.wrap_future(pending)
        if isinstance(outcome, Failure):
            raise Raised(outcome)
        return outcome

    # In the thread.

    def _call(self, function: Callable[[], Any], constructs: bool, pending: concurrent.futures.Future[Any]) -> None:
        if pending.cancelled():  # the thread was blocked for so long that its caller has gone
            return
        context = self._contexts.own if constructs else self._contexts.new()
        self.since = time.monotonic()
        try:
            value = self._without_loop(context.run, function)
            is_awaitable = inspect.isawaitable(value)
        except BaseException as error:
            forks.end_if_forked_since(self._depth, error)
            return _resolve(pending, describe(error))
        finally:
            forks.end_if_forked_since(self._depth)
            self._contexts.note_changes()
            self.since = math.inf
        if not is_awaitable:
            return _resolve(pending, value)
        task = self._run_task(self._await(value, pending), context)
        pending.add_done_callback(lambda done: self._loop.call_soon_threadsafe(task.cancel) if done.cancelled() else None)

    async def _await(self, value: Any, pending: concurrent.futures.Future[Any]) -> None:
        try:
            _resolve(pending, await value)
        except BaseException as error:
            _resolve(pending, describe(error))
        finally:
            self._contexts.note_changes()


def _resolve(pending: concurrent.futures.Future[Any], outcome: Any) -> None:
    with suppress(concurrent.futures.InvalidStateError):  # nobody waits for it any more
        pending.set_result(outcome)
