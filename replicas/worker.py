"""The thread in which user code lives, with an event loop of its own: nothing it does can stall the plumbing but by the GIL.

Jobs go in and results come out through two deques; each side wakes the other once per turn, however many there are.
Plain calls run on the worker's own thread one at a time, in the thread that made the handler (models and CUDA contexts
like that), or with `sync_threads` > 1 on a pool of that many. Async calls run concurrently on the worker's loop.
Handlers that accept batches get what has gathered: a full batch at once, a smaller one when its wait is over.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop

from ..broker.envelope import Envelope
from ..broker.errors import words_of
from ..broker.results import Result, late_result
from ..controller.state import BackendConfig
from .context import ReplicaContext, enter_context, running_jobs
from .execute import Execution
from .handler import Method
from .prefetch import moving_average

logger = logging.getLogger(__name__)

_MARK_BUDGET_S = 5.0  # of the owner, for the mark of a suspect
_TURN_S = 0.01  # then the loop's other work has its turn: async calls, health checks
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Job:
    """One request in the worker; `tag` is the owner's and not touched here."""

    envelope: Envelope
    tag: Any
    deadline: float = math.inf  # monotonic
    suspect: bool = False  # delivered before: the owner is told when it starts, and leaves a mark
    mark: bytes = b""  # the owner's: the start mark that stands in the store, or may
    started: float = 0.0  # monotonic; 0 until it runs
    run_s: float = 0.0
    batch: Sequence[Job] = ()  # all of its call, where that is of several
    given_up: Result | None = None  # what stands in its result's place: it was cancelled, or its time is spent
    task: asyncio.Task[None] | None = None  # of an async call

    @property
    def unwanted(self) -> bool:
        return self.given_up is not None or time.monotonic() >= self.deadline


class Worker:
    """Owned by one I/O loop, on which `on_done(job, result)` is called, and `on_suspect(jobs)` is awaited before such a run starts."""

    def __init__(
        self,
        context: ReplicaContext,
        config: BackendConfig,
        on_done: Callable[[Job, Result], None],
        on_suspect: Callable[[Sequence[Job]], Coroutine[Any, Any, None]],
    ) -> None:
        self._context = context
        self._config = config
        self._on_done = on_done
        self._on_suspect = on_suspect
        self._io = asyncio.get_running_loop()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=context.replica_tag, daemon=True)
        self._pool = self._new_pool(config.sync_threads)
        self._free_threads = config.sync_threads
        self._execution: Execution | None = None
        self._jobs: deque[Job] = deque()
        self._woken = False
        self._gathering: list[tuple[Job, Method]] = []
        self._batch_timer: asyncio.TimerHandle | None = None
        self._results: deque[tuple[Job, Result]] = deque()
        self._io_woken = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.run_s = 0.0  # moving average of plain calls
        self.in_plain_call = False

    def __repr__(self) -> str:
        return f"<Worker {self._thread.name}, {len(self._jobs)} waiting>"

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs `function` in the worker's thread, and awaits what it returns if that is awaitable (importing, constructing and
        reconfiguring are user code too)."""
        if not self._thread.is_alive():
            self._thread.start()

        async def run() -> Any:
            value = function()
            return await value if inspect.isawaitable(value) else value

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    def serve(self, execution: Execution) -> None:
        self._execution = execution

    def configure(self, config: BackendConfig) -> None:
        """Batch size and wait apply from the next round, threads at once."""
        if config != self._config:
            before, self._config = self._config, config
            self._loop.call_soon_threadsafe(self._resize, config.sync_threads - before.sync_threads)

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

    def give_up(self, job: Job, result: Result) -> None:
        """Nobody wants it any more. One that waits is done at once; an async call is cancelled, a plain one may ask `serve.cancelled()`."""
        if job.given_up is not None:
            return
        job.given_up = result
        if job.started:
            self._loop.call_soon_threadsafe(self._cancel_call, job)
        else:
            with suppress(ValueError):  # it started in between, or gathers in a batch: either looks for itself
                self._jobs.remove(job)
                self._on_done(job, result)

    def stop(self) -> None:
        """Returns at once: user code that is still running is left to its daemon thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._finish)
        else:
            self._loop.close()

    def _new_pool(self, threads: int) -> ThreadPoolExecutor | None:
        if threads <= 1:
            return None
        return ThreadPoolExecutor(threads, self._context.replica_tag, initializer=enter_context, initargs=(self._context,))

    # In the worker's thread.

    def _run_loop(self) -> None:
        enter_context(self._context)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _take(self) -> None:
        until = time.monotonic() + _TURN_S
        while self._jobs and self._free_threads > 0 and time.monotonic() < until:
            try:
                job = self._jobs.popleft()
            except IndexError:  # withdrawn in between
                break
            self._start(job)
        self._woken = False  # only now: while this runs, whoever submits need not wake it
        if self._jobs and self._free_threads > 0:
            self._woken = True
            self._loop.call_soon(self._take)
        if self._gathering and self._config.batch_wait_timeout == 0:
            self._run_gathered()

    def _start(self, job: Job) -> None:
        assert self._execution is not None
        if job.unwanted:
            return self._put([job], [_unwanted_result(job)])
        method = self._execution.method(job.envelope)
        if isinstance(method, Result):
            self._put([job], [method])
        elif method.accepts_batch:
            self._gather(job, method)
        else:
            self._run([job], method)

    # Batches.

    def _gather(self, job: Job, method: Method) -> None:
        self._gathering.append((job, method))
        if len(self._gathering) >= (self._config.max_batch_size or 1):
            self._run_gathered()
        elif self._batch_timer is None and self._config.batch_wait_timeout > 0:
            self._batch_timer = self._loop.call_later(self._config.batch_wait_timeout, self._run_gathered)

    def _run_gathered(self) -> None:
        """One call for each method among them."""
        if self._batch_timer is not None:
            self._batch_timer.cancel()
            self._batch_timer = None
        gathered, self._gathering = self._gathering, []
        groups: dict[Method, list[Job]] = {}
        for job, method in gathered:
            if job.unwanted:
                self._put([job], [_unwanted_result(job)])
                continue
            groups.setdefault(method, []).append(job)
        for method, jobs in groups.items():
            self._run(jobs, method)

    # Calls: of one job, or of a batch.

    def _run(self, jobs: Sequence[Job], method: Method) -> None:
        now = time.monotonic()
        for job in jobs:
            job.started = now
            if len(jobs) > 1:
                job.batch = jobs
        if all(job.given_up for job in jobs):  # in between; from here on `started` says that the call must be told
            self._put(jobs, [_unwanted_result(job) for job in jobs])
        elif method.is_async:
            self._run_task(jobs, self._run_async(jobs, method))
        elif self._pool is None:
            self._run_plain(jobs, method)
        else:
            self._free_threads -= 1
            self._pool.submit(self._run_pooled, jobs, method)

    def _run_plain(self, jobs: Sequence[Job], method: Method) -> None:
        self.in_plain_call = True
        results = self._execute(jobs, method)
        self.in_plain_call = False
        self._measure(jobs)
        self._put(jobs, results)

    def _run_pooled(self, jobs: Sequence[Job], method: Method) -> None:
        results = self._execute(jobs, method)
        self._loop.call_soon_threadsafe(self._thread_is_free, jobs, results)

    def _thread_is_free(self, jobs: Sequence[Job], results: Sequence[Result]) -> None:
        self._free_threads += 1
        self._measure(jobs)
        self._put(jobs, results)
        self._take()

    def _execute(self, jobs: Sequence[Job], method: Method) -> list[Result]:
        assert self._execution is not None
        running_jobs.set(jobs)
        if any(job.suspect for job in jobs):
            self._announce(jobs)
        if method.accepts_batch:
            return self._execution.run_batch(method, [job.envelope for job in jobs])
        return [self._execution.run(method, jobs[0].envelope)]

    async def _run_async(self, jobs: Sequence[Job], method: Method) -> None:
        assert self._execution is not None
        running_jobs.set(jobs)
        try:
            if any(job.suspect for job in jobs):
                await self._announce_async(jobs)
            if method.accepts_batch:
                results = await self._execution.run_batch_async(method, [job.envelope for job in jobs])
            else:
                results = [await self._execution.run_async(method, jobs[0].envelope)]
        except asyncio.CancelledError:
            if not all(job.given_up for job in jobs):
                raise  # the worker's own end
            results = [_unwanted_result(job) for job in jobs]
        self._put(jobs, results)

    def _run_task(self, jobs: Sequence[Job], work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        for job in jobs:
            job.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _cancel_call(self, job: Job) -> None:
        """A batch's call goes on as long as one of its members is wanted."""
        task = job.task
        if task is not None and all(other.given_up for other in job.batch):
            self._loop.call_soon(task.cancel)  # a turn later: one that is cancelled before its first step never says that it ended

    def _announce(self, jobs: Sequence[Job]) -> None:
        try:
            asyncio.run_coroutine_threadsafe(self._on_suspect(jobs), self._io).result(_MARK_BUDGET_S)
        except Exception as error:
            logger.warning("a request that was delivered before runs without a mark: %s", words_of(error))

    async def _announce_async(self, jobs: Sequence[Job]) -> None:
        try:
            async with asyncio.timeout(_MARK_BUDGET_S):
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._on_suspect(jobs), self._io))
        except Exception as error:
            logger.warning("a request that was delivered before runs without a mark: %s", words_of(error))

    def _measure(self, jobs: Sequence[Job]) -> None:
        self.run_s = moving_average(self.run_s, time.monotonic() - jobs[0].started)

    def _put(self, jobs: Sequence[Job], results: Sequence[Result]) -> None:
        now = time.monotonic()
        for job in jobs:
            job.run_s = now - job.started if job.started else 0.0
        self._results.extend(zip(jobs, results, strict=True))
        if not self._io_woken:
            self._io_woken = True
            with suppress(RuntimeError):  # a call that was left to its thread may outlive the loop it would report to
                self._io.call_soon_threadsafe(self._hand_over)

    def _resize(self, more_threads: int) -> None:
        if more_threads:
            if self._pool is not None:
                self._pool.shutdown(wait=False)  # what it runs it finishes
            self._pool = self._new_pool(self._config.sync_threads)
            self._free_threads += more_threads
        self._take()

    def _finish(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    # On the I/O loop.

    def _hand_over(self) -> None:
        self._io_woken = False
        while self._results:
            self._on_done(*self._results.popleft())


def _unwanted_result(job: Job) -> Result:
    return job.given_up or late_result("run" if job.started else "queue")
