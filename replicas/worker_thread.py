"""The thread in which a replica's user code lives, and its event loop. Notices when user code has ended or blocked them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..broker.errors import BackendFailed
from ..broker.failures import Failure, describe, traceback_of
from ..broker.process.loops import WorkerLoop
from ..broker.process.printable import printable_lines
from .context import ReplicaContext, enter_context

logger = logging.getLogger(__name__)


class WorkerThread:
    """A worker's thread and event loop. Made on the I/O loop that it reports to; call `start` before use."""

    def __init__(self, context: ReplicaContext) -> None:
        self.loop = WorkerLoop()
        self.loop.set_exception_handler(self._log_unhandled)
        self.failed = asyncio.Event()  # user code has ended the loop, outside any request
        self.missed = 0
        self._io = asyncio.get_running_loop()
        self._context = context
        self._thread = threading.Thread(target=self._run, name=context.replica_tag, daemon=True)
        self._failure = Failure("", "", "")
        self._answered = True
        self.is_ending = False

    def __repr__(self) -> str:
        state = "ending" if self.is_ending else "ended" if self.has_ended else "failed" if self.failed.is_set() else "well"
        return f"<WorkerThread {self._thread.name}, {state}>"

    def start(self) -> None:
        """Starts the thread, if it has not been started."""
        if self._thread.ident is None:
            self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the thread has ended, so that none of its requests will be answered."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def check(self) -> None:
        """Raises BackendFailed once user code has ended the loop."""
        if self.failed.is_set():
            failure = self._failure
            raise BackendFailed(f"user code ended its replica, outside any request: {failure.words}\n{failure.traceback}".rstrip())

    def ask_for_life(self, *, may_be_busy: bool) -> None:
        """Asks the loop for an answer; must be called once a second. `missed` counts the calls in a row for which the answer to an earlier
        one was missing, unless a request or hook may keep the loop busy."""
        if may_be_busy:
            self.missed = 0
        elif self._answered:
            self._answered, self.missed = False, 0
            with suppress(RuntimeError):  # the loop is closed, and `failed` is set
                self.loop.call_soon_threadsafe(self._answer)
        else:
            self.missed += 1

    def stop(self, cancel_tasks: Callable[[], None]) -> None:
        """Ends the thread without waiting: user code that still runs is left to it, since it is a daemon."""
        self.is_ending = True
        if not self._thread.is_alive():
            return self.loop.close()
        with suppress(RuntimeError):  # the thread has just ended and closed the loop
            self.loop.call_soon_threadsafe(self._finish, cancel_tasks)

    # In the thread.

    def _run(self) -> None:
        """Runs the loop until `stop`. A task of user code may stop the loop, or end it by SystemExit or KeyboardInterrupt; the loop is then
        run again, since other requests are still to be answered."""
        enter_context(self._context)
        try:
            while not self.is_ending and not self.loop.is_closed():
                try:
                    self.loop.run_forever()
                except BaseException as error:
                    self._tell(error)
        except BaseException as error:
            self._tell(error)
        finally:
            self.loop.close()
            if not self.is_ending:
                self._tell(RuntimeError("the thread in which it lives has ended, or its event loop was closed"))

    def _answer(self) -> None:
        self._answered = True

    def _finish(self, cancel_tasks: Callable[[], None]) -> None:
        cancel_tasks()
        self.loop.call_soon(self.loop.call_soon, self.loop.stop)  # a turn later: a cancelled task tells its end in the turn after its own

    def _log_unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs an error that no code awaited. The default handler would call methods of the exception, which may be anybody's."""
        error = context.get("exception")
        told = printable_lines(traceback_of(error).rstrip()) if error is not None else ""
        tag, what = self._context.replica_tag, context.get("message", "an error")
        logger.error("on the event loop of %s, outside any request: %s\n%s", tag, what, told)

    def _tell(self, error: BaseException) -> None:
        with suppress(RuntimeError):  # the I/O loop may be gone by then
            self._io.call_soon_threadsafe(self._fail, describe(error))

    # On the I/O loop.

    def _fail(self, failure: Failure) -> None:
        if not self.failed.is_set():
            self._failure = failure
            self.failed.set()
