"""The thread in which user code lives, with an event loop of its own: nothing it does can stall the plumbing but by the GIL.

Jobs go in and results come out through two deques; each side wakes the other once per turn, however many there are.
Plain calls run on the worker's own thread one at a time, in the thread that made the handler (models and CUDA contexts
like that), or with `sync_threads` > 1 on a pool of that many. Async calls run concurrently on the worker's loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop

from ..broker.envelope import Envelope
from ..broker.results import Result
from .execute import Execution
from .handler import Method
from .prefetch import moving_average

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Job:
    """One request in the worker; `tag` is the owner's and not touched here."""

    envelope: Envelope
    tag: Any
    started: float = 0.0  # monotonic; 0 until it runs
    task: asyncio.Task[None] | None = None


class Worker:
    """Owned by one I/O loop, on which `on_done(job, result)` is called."""

    def __init__(self, name: str, sync_threads: int, on_done: Callable[[Job, Result], None]) -> None:
        self._on_done = on_done
        self._io = asyncio.get_running_loop()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=name, daemon=True)
        self._pool = ThreadPoolExecutor(sync_threads, thread_name_prefix=name) if sync_threads > 1 else None
        self._free_threads = sync_threads
        self._execution: Execution | None = None
        self._jobs: deque[Job] = deque()
        self._woken = False
        self._results: deque[tuple[Job, Result]] = deque()
        self._io_woken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.run_s = 0.0  # moving average of plain calls

    def __repr__(self) -> str:
        return f"<Worker {self._thread.name}, {len(self._jobs)} waiting>"

    async def call(self, function: Callable[[], T]) -> T:
        """Runs `function` in the worker's thread (importing and constructing are user code too)."""
        if not self._thread.is_alive():
            self._thread.start()

        async def run() -> T:
            return function()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    def serve(self, execution: Execution) -> None:
        self._execution = execution

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._take)

    def withdraw(self) -> list[Job]:
        """The jobs that have not started; they will not."""
        withdrawn: list[Job] = []
        while True:
            try:
                withdrawn.append(self._jobs.pop())
            except IndexError:
                return withdrawn[::-1]

    def stop(self) -> None:
        """Returns at once: user code that is still running is left to its daemon thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._finish)
        else:
            self._loop.close()

    # In the worker's thread.

    def _run_loop(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _take(self) -> None:
        self._woken = False
        while self._jobs and self._free_threads:
            try:
                job = self._jobs.popleft()
            except IndexError:  # withdrawn in between
                return
            self._start(job)

    def _start(self, job: Job) -> None:
        assert self._execution is not None
        job.started = time.monotonic()
        method = self._execution.method(job.envelope)
        if isinstance(method, Result):
            self._put(job, method)
        elif method.is_async:
            self._run_task(job, self._run_async(job, method))
        elif self._pool is None:
            self._run_plain(job, method)
        else:
            self._free_threads -= 1
            self._pool.submit(self._run_pooled, job, method)

    def _run_plain(self, job: Job, method: Method) -> None:
        assert self._execution is not None
        result = self._execution.run(method, job.envelope)
        self._measure(time.monotonic() - job.started)
        self._put(job, result)

    def _run_pooled(self, job: Job, method: Method) -> None:
        assert self._execution is not None
        job.started = time.monotonic()
        result = self._execution.run(method, job.envelope)
        self._loop.call_soon_threadsafe(self._thread_is_free, job, result)

    def _thread_is_free(self, job: Job, result: Result) -> None:
        self._free_threads += 1
        self._measure(time.monotonic() - job.started)
        self._put(job, result)
        self._take()

    async def _run_async(self, job: Job, method: Method) -> None:
        assert self._execution is not None
        self._put(job, await self._execution.run_async(method, job.envelope))

    def _run_task(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        job.task = self._loop.create_task(work)
        self._tasks.add(job.task)
        job.task.add_done_callback(self._tasks.discard)

    def _measure(self, run_s: float) -> None:
        self.run_s = moving_average(self.run_s, run_s)

    def _put(self, job: Job, result: Result) -> None:
        self._results.append((job, result))
        if not self._io_woken:
            self._io_woken = True
            self._io.call_soon_threadsafe(self._hand_over)

    def _finish(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    # On the I/O loop.

    def _hand_over(self) -> None:
        self._io_woken = False
        while self._results:
            self._on_done(*self._results.popleft())
