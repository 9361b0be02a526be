"""The thread that runs all of this process's waiting, so that the user's program may block as it likes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from ..broker.errors import InstanceError
from ..broker.process.loops import IoLoop
from ..broker.process.tasks import read_error

logger = logging.getLogger(__name__)
T = TypeVar("T")

ORDERLY_END_S = 100.0  # as long as the shutdown of an instance without deployments may take
FORCED_END_S = 6.0
_STOPPED = "Client has already been shut down."


class Runtime:
    """An event loop in a daemon thread. Call `start` before use, and `stop` once."""

    def __init__(self) -> None:
        self._loop = IoLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mqserve", daemon=True)
        self._posted: deque[Callable[[], None]] = deque()
        self._woken = False
        self._submitted: set[asyncio.Task[Any]] = set()
        self._over = ""  # why it is over, once it is
        self._stopping = threading.Lock()  # between `submit` and `stop`: a stopped loop accepts work and never runs it
        self._stopped = False
        self._gave_up = False  # Ctrl-C came during a wait for work

    def __repr__(self) -> str:
        return f"<Runtime {'running' if self._thread.is_alive() else 'stopped'}>"

    def start(self) -> None:
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs `work` on the runtime thread. Raises InstanceError once stopped; work that is under way then, or arrives too late, fails
        with it, too."""
        with self._stopping:
            if self._stopped:
                work.close()
                raise InstanceError(self._over or _STOPPED)
            return asyncio.run_coroutine_threadsafe(self._run(work), self._loop)

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._over:
            work.close()
            raise InstanceError(self._over)
        task: asyncio.Task[Any] | None = asyncio.current_task()
        assert task is not None
        self._submitted.add(task)
        task.add_done_callback(read_error)  # whoever was to read it may have been cancelled
        try:
            return await work
        except asyncio.CancelledError:
            if self._over:
                raise InstanceError(self._over) from None
            raise
        finally:
            self._submitted.discard(task)

    def is_over(self, why: str) -> None:
        """From now on submitted and cancelled work fails with an InstanceError that gives this reason."""
        self._over = why

    async def end_submitted(self) -> None:
        """Cancels all submitted work, except the caller's own task."""
        given_up = self._submitted - {asyncio.current_task()}
        for task in given_up:
            task.cancel()
        if given_up:
            await asyncio.wait(given_up, timeout=FORCED_END_S)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` on the runtime thread and waits for it here. Raises the errors of `work`; Ctrl-C here cancels it there.

        Raises InstanceError when called on the runtime thread, where it would wait for ever: in the embedded form middlewares and
        convertors run there.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise InstanceError(
                "this was called on the thread that answers requests, where middlewares and convertors run, and which must not wait: "
                "call it in another thread, with `await asyncio.to_thread(…)`"
            )
        future = self.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            self._gave_up = True
            future.cancel()
            raise

    def post(self, callback: Callable[[], None]) -> None:
        """Runs `callback` on the runtime thread, soon; many callbacks cost one wake-up. Raises InstanceError once stopped."""
        self._posted.append(callback)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._run_posted)
            except RuntimeError as error:
                self._woken = False
                with suppress(ValueError):  # ValueError: `stop` was faster, and ran it
                    self._posted.remove(callback)
                    raise InstanceError(self._over or _STOPPED) from error

    def _run_posted(self) -> None:
        self._woken = False
        for _ in range(len(self._posted)):  # callbacks posted from now on wake the loop again, so that its other work gets its turn
            try:
                callback = self._posted.popleft()
            except IndexError:  # `post` took it back
                return
            try:
                callback()
            except Exception:
                logger.exception("a posted callback failed: that is a bug in mqserve, please report it")

    def stop(self) -> None:
        """Stops the loop. Cancelled work (a start, by Ctrl-C) may finish its cleanup first; another Ctrl-C cuts that short.

        Callbacks that were posted and have not run are run here, in the caller's thread.
        """
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
        try:
            if self._gave_up:
                self._finish(_end_of_cancelled(), ORDERLY_END_S)
        finally:
            self._finish(_cancel_all(), FORCED_END_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)
            if not self._thread.is_alive():
                self._loop.close()
                self._run_posted()

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
