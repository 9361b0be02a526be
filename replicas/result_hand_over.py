"""Hands the results of jobs over from the worker's thread to the I/O loop, all of a turn at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from ..broker.results import Result
from .stages import Job


class ResultHandOver:
    """Calls `on_done(job, result)` on the I/O loop. Made there; every request passes through it, so it makes nothing for one but a pair."""

    def __init__(self, on_done: Callable[[Job, Result], None]) -> None:
        self._io = asyncio.get_running_loop()
        self._on_done = on_done
        self._results: deque[tuple[Job, Result]] = deque()
        self._woken = False

    def __repr__(self) -> str:
        return f"<ResultHandOver of {len(self._results)}>"

    def put(self, job: Job, result: Result) -> None:
        """Called in the worker's thread, or in one of its pool."""
        job.run_s = time.monotonic() - job.started if job.started else 0.0
        job.request = job.task = None  # both refer to the job, the task by its context: break the cycles
        self._results.append((job, result))
        if not self._woken:
            self._woken = True
            try:
                self._io.call_soon_threadsafe(self._hand_over)
            except RuntimeError:  # a call that was left to its thread may outlive the loop it would report to
                pass

    def _hand_over(self) -> None:
        self._woken = False
        try:
            while self._results:
                job, result = self._results.popleft()
                self._on_done(job, result)
                job.batch = ()  # refers to the job: break the cycle
        finally:
            if self._results:  # `on_done` raised; hand over the rest all the same
                self._io.call_soon(self._hand_over)
