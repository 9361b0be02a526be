"""The thread on which everything of this process that waits lives, so that the user's program can do as it likes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from .broker.errors import InstanceError
from .broker.loops import IoLoop

logger = logging.getLogger(__name__)
T = TypeVar("T")

ORDERLY_END_S = 100.0  # as long as a shutdown may take of an instance to which nobody has deployed yet
FORCED_END_S = 6.0


class Runtime:
    """An event loop in a daemon thread. `start` before use, `stop` once."""

    def __init__(self) -> None:
        self._loop = IoLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mqserve", daemon=True)
        self._posted: deque[Callable[[], None]] = deque()
        self._woken = False
        self._gave_up = False  # Ctrl-C came while work was waited for

    def __repr__(self) -> str:
        return f"<Runtime {'running' if self._thread.is_alive() else 'stopped'}>"

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs `work` over there. Raises InstanceError once stopped."""
        if self._loop.is_closed():
            work.close()
            raise InstanceError("Client has already been shut down.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` over there and waits for it here. Raises what it raises; Ctrl-C here cancels it there."""
        future = self.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            self._gave_up = True
            future.cancel()
            raise

    def post(self, callback: Callable[[], None]) -> None:
        """Runs `callback` over there, soon; many of them cost one wake-up. Raises InstanceError once stopped."""
        self._posted.append(callback)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._run_posted)
            except RuntimeError as error:
                raise InstanceError("Client has already been shut down.") from error

    def _run_posted(self) -> None:
        self._woken = False
        while self._posted:
            try:
                self._posted.popleft()()
            except Exception:
                logger.exception("a posted callback failed: that is a bug in mqserve, please report it")

    def stop(self) -> None:
        """What was cancelled (a start, by Ctrl-C) ends in good order first; another Ctrl-C cuts that short."""
        if self._loop.is_closed():
            return
        try:
            if self._gave_up:
                self._finish(_end_of_cancelled(), ORDERLY_END_S)
        finally:
            self._finish(_cancel_all(), FORCED_END_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)
            if not self._thread.is_alive():
                self._loop.close()

    def _finish(self, work: Coroutine[Any, Any, None], budget_s: float) -> None:
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=budget_s)


async def _end_of_cancelled() -> None:
    ending = [task for task in asyncio.all_tasks() if task.cancelling() and task is not asyncio.current_task()]
    if ending:
        await asyncio.wait(ending)


async def _cancel_all() -> None:
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest)
