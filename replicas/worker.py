"""The thread in which user code lives, with an event loop of its own: user code can stall the I/O loop only by holding the GIL.

Jobs go in and results come out through two deques; each side wakes the other once per turn, however many there are.
Plain calls run one at a time on the worker's own thread, which also made the handler (models and CUDA contexts need that),
or with `sync_threads` > 1 on a pool of that many threads. No loop counts as running around them, so `asyncio.run` works.
Async calls run concurrently on the worker's loop. Handlers that accept batches get a full batch at once, a smaller one when
its wait is over.

No exception of user code leaves a call (`execute.py`). User code can still end the loop, for example by `sys.exit()` in a
task that a handler left behind; `thread.failed` is then set, and the replica ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import Any, TypeVar

from ..broker.latencies import moving_average
from ..broker.process import forks
from ..broker.results import Result
from ..broker.sessions import is_handshake
from ..controller.state.config import BackendConfig
from .batching import Gathering
from .call_contexts import CallContexts
from .context import ReplicaContext, enter_context, running_jobs
from .execute import Answer, BatchSteps, Execution
from .generators import Generators
from .hand_over import HandOver
from .handler import Method
from .hook_calls import HookCalls
from .responding import Responding
from .result_hand_over import ResultHandOver
from .sinks import Sinks
from .stages import Job
from .suspects import BeforeSuspects, Marking
from .threads import Threads
from .websockets import Sockets
from .worker_thread import WorkerThread

_TURN_S = 0.01  # after starting jobs for this long the loop does its other work: async calls, health checks
T = TypeVar("T")


class Worker:
    """Owned by one I/O loop. `on_done(job, result)` is called there, and `before_suspects(jobs)` awaited when `suspects.py` says."""

    def __init__(
        self,
        context: ReplicaContext,
        config: BackendConfig,
        on_done: Callable[[Job, Result], None],
        before_suspects: BeforeSuspects,
    ) -> None:
        self._context = context
        self._config = config
        self._on_done = on_done
        self._put = ResultHandOver(on_done).put
        self._marking = Marking(context.replica_tag, before_suspects)
        self.thread = WorkerThread(context)
        self._loop = self.thread.loop
        self._depth = forks.depth
        self._contexts = CallContexts(context)
        self._hook_calls = HookCalls(self._loop, self._contexts, self._without_loop, self.run_task)
        self._pool = self._new_pool(config.sync_threads)
        self._free_threads = config.sync_threads
        self._execution: Execution | None = None
        self._jobs: deque[Job] = deque()
        self._woken = False
        self._gathering = Gathering(
            self._run_safely,
            lambda job: self._put(job, job.unwanted_result),
            lambda wait_s, callback: self._loop.call_later(wait_s, self._without_loop, callback),
        )
        self.flowing: HandOver[Job] = HandOver(asyncio.get_running_loop())
        self.sinks = Sinks(context.backend_tag, context.replica_tag, config, self.flowing.touch)
        self._generators = Generators(self._loop, self, self.sinks)
        self.responding = Responding(self, self.sinks)
        self.sockets = Sockets(self._loop, self, config)
        self._tasks: set[asyncio.Task[None]] = set()
        self.run_s = 0.0  # moving average of plain calls
        self.in_plain_call = False
        self._last_start = 0.0  # monotonic

    def __repr__(self) -> str:
        return f"<Worker {self.thread!r}, {len(self._jobs)} waiting>"

    async def call(self, function: Callable[[], Any], *, constructs: bool = False) -> Any:
        """Runs `function` in the worker's thread, and awaits its result if that is awaitable. For imports, constructors and hooks, which
        are user code too. With `constructs` it runs in the context of construction, of which every request gets a copy.

        Raises Raised for any exception of `function`, and BackendFailed if the worker's loop has ended.
        """
        self.thread.start()
        return await self._hook_calls.call(function, constructs=constructs)

    def serve(self, execution: Execution) -> None:
        self._execution = execution
        self.sinks.job_limit = execution.job_limit

    def configure(self, config: BackendConfig) -> None:
        """Applies batch size and wait from the next batch on, and the number of threads at once."""
        if config != self._config:
            before, self._config, self.sinks.config = self._config, config, config
            self.sockets.limit = config.max_sessions
            with suppress(RuntimeError):  # user code closed the loop: the replica ends
                self._loop.call_soon_threadsafe(self._resize, config.sync_threads - before.sync_threads)

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # user code closed the loop: the replica ends, and its drain gives this job back
                self._loop.call_soon_threadsafe(self._take)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for a thread."""
        return len(self._jobs)

    @property
    def blocked_s(self) -> float:
        """For how long plain calls or a hook have kept every job from starting; 0 if none does."""
        now = time.monotonic()
        if self.hook_since <= now:
            return now - self.hook_since
        return now - self._last_start if self.in_plain_call or self._free_threads <= 0 else 0.0

    @property
    def hook_since(self) -> float:
        """Monotonic: when the hook or constructor that now holds the thread began; infinite if none does."""
        return self._hook_calls.since

    def withdraw(self) -> list[Job]:
        """Removes and returns the jobs that have not started."""
        withdrawn: list[Job] = []
        with suppress(IndexError):
            while True:
                withdrawn.append(self._jobs.pop())
        return withdrawn[::-1]

    def give_up(self, job: Job, result: Result) -> None:
        """Gives up a job that nobody waits for. One that has not started is done at once, an async call is cancelled, and a plain call may
        ask `serve.cancelled()`."""
        if job.given_up is not None:
            return
        job.given_up = result
        if job.started:
            with suppress(RuntimeError):  # user code closed the loop, and the call ended with it
                self._loop.call_soon_threadsafe(self._cancel_call, job)
        else:
            with suppress(ValueError):  # it has started meanwhile or gathers in a batch; both check `given_up`
                self._jobs.remove(job)
                self._on_done(job, result)

    def stop(self) -> None:
        """Ends the worker without waiting: user code that still runs is left to its daemon thread."""
        if self._pool is not None:
            self._pool.shutdown()
        self.thread.stop(self._cancel_tasks)

    def _new_pool(self, threads: int) -> Threads | None:
        return Threads(threads, self._context.replica_tag, partial(enter_context, self._context)) if threads > 1 else None

    # In the worker's thread.

    def _take(self) -> None:
        self._without_loop(self._start_some)

    def _start_some(self) -> None:
        """Starts jobs for _TURN_S. A job that cannot be started fails alone."""
        until = time.monotonic() + _TURN_S
        try:
            while self._jobs and self._free_threads > 0 and time.monotonic() < until:
                try:
                    job = self._jobs.popleft()
                except IndexError:  # withdrawn meanwhile
                    break
                try:
                    self._start(job)
                except BaseException as error:
                    self._put_failed([job], error)
        finally:
            self._woken = False  # only now, so that a submit during this turn does not wake the loop
            if self._jobs and self._free_threads > 0:
                self._woken = True
                self._loop.call_soon(self._take)
            if self._gathering and self._config.batch_wait_timeout == 0:
                self._gathering.run_all()

    def _start(self, job: Job) -> None:
        assert self._execution is not None
        if job.unwanted:
            return self._put(job, job.unwanted_result)
        method = self._execution.method(job)
        if isinstance(method, Result):
            self._put(job, method)
        elif method.accepts_batch:
            self._gathering.add(job, method, self._config.max_batch_size or 1, self._config.batch_wait_timeout)
        else:
            self._run([job], method)

    def _run_safely(self, jobs: Sequence[Job], method: Method) -> None:
        """Runs a batch. An exception fails its jobs only, so the other batches of the turn still run."""
        try:
            self._run(jobs, method)
        except BaseException as error:
            self._put_failed(jobs, error)

    # Calls: of one job, or of a batch.

    def _run(self, jobs: Sequence[Job], method: Method) -> None:
        now = self._last_start = time.monotonic()
        is_wanted = False
        for job in jobs:
            job.started = now  # from now on `give_up` must cancel the call
            if len(jobs) > 1:
                job.batch = jobs
            is_wanted = is_wanted or job.given_up is None
        if not is_wanted:  # all were given up meanwhile
            for job in jobs:
                self._put(job, job.unwanted_result)
            return
        context = self._contexts.new()
        if method.is_async:
            if method.is_app:
                run_app = self.sockets.converse if is_handshake(jobs[0].envelope) else self.responding.answer
                self.run_task(run_app(jobs[0], method.function), context, jobs)
            else:
                self._start_task(self._run_async(jobs, method), context, jobs)  # which ends its entry in `_tasks` itself
        elif self._pool is None:
            self._run_plain(jobs, method, context)
        else:
            self._pool.submit(partial(self._run_pooled, jobs, method, context))
            self._free_threads -= 1

    def _run_plain(self, jobs: Sequence[Job], method: Method, context: Context) -> None:
        self.in_plain_call = True
        try:
            answers = context.run(self._execute, jobs, method)
        finally:
            self.in_plain_call = False
        self._measure(jobs)
        self._deliver(jobs, answers, context)

    def _run_pooled(self, jobs: Sequence[Job], method: Method, context: Context) -> None:
        answers: Sequence[Answer] = ()
        try:
            answers = context.run(self._execute, jobs, method)
        finally:
            with suppress(RuntimeError):  # a call that was left to its thread may outlive the worker's loop
                self._loop.call_soon_threadsafe(self._thread_is_free, jobs, answers, context)

    def _thread_is_free(self, jobs: Sequence[Job], answers: Sequence[Answer], context: Context) -> None:
        self._free_threads += 1
        try:
            self._measure(jobs)
            self._deliver(jobs, answers, context)
        except BaseException as error:
            self._put_failed(jobs, error)
        self._take()

    def _execute(self, jobs: Sequence[Job], method: Method) -> list[Answer]:
        assert self._execution is not None
        try:
            running_jobs.set(jobs)
            self._marking.before_plain(jobs)
            if method.accepts_batch:
                return self._execution.run_batch(method, jobs)
            return [self._execution.run(method, jobs[0])]
        except BaseException as error:
            return [self._execution.failed(error, job) for job in jobs]
        finally:
            forks.end_if_forked_since(self._depth)

    async def _run_async(self, jobs: Sequence[Job], method: Method) -> None:
        task = jobs[0].task
        assert self._execution is not None and task is not None
        try:
            running_jobs.set(jobs)
            if any([job.suspect for job in jobs]):
                await self._marking.before_async(jobs)
            if method.accepts_batch:
                answers = await self._execution.run_batch_async(method, jobs)
            else:
                answers = [await self._execution.run_async(method, jobs[0])]
            forks.end_if_forked_since(self._depth)
            self._deliver(jobs, answers)
        except asyncio.CancelledError as error:
            self.cancelled(jobs, error)
        except BaseException as error:
            self._put_failed(jobs, error)
        finally:
            self._tasks.discard(task)

    def _deliver(self, jobs: Sequence[Job], answers: Sequence[Answer], context: Context | None = None) -> None:
        """Hands over the answers of a call; `context` is that of a plain call. What must be run for its result runs on the loop."""
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Result):
                self._put(job, answer)
            elif isinstance(answer, BatchSteps):
                return self._generators.start(jobs, answer, copy_context() if context is None else context)
            elif isinstance(answer, Generator | AsyncGenerator):
                self._generators.start([job], answer, copy_context() if context is None else context)
            elif job.given_up is not None:  # the cancellation, which came before this, would find no task of the response
                self._put(job, job.given_up)
            else:
                self.run_task(self.responding.respond(job, answer), copy_context() if context is None else context, [job])

    def cancelled(self, jobs: Sequence[Job], error: asyncio.CancelledError) -> None:
        """Answers the jobs of a cancelled task. It was cancelled because nobody waits for them, by the handler itself, or at the worker's
        end, when the jobs are requeued and get no answer."""
        for job in jobs:
            if job.given_up is not None:
                self.put(job, job.given_up)
            elif not self.thread.is_ending:
                self.put(job, self.execution.failed(error, job))

    def run_task(self, work: Coroutine[Any, Any, None], context: Context, jobs: Sequence[Job] = ()) -> asyncio.Task[None]:
        task = self._start_task(work, context, jobs)
        task.add_done_callback(self._tasks.discard)
        return task

    def _start_task(self, work: Coroutine[Any, Any, None], context: Context, jobs: Sequence[Job]) -> asyncio.Task[None]:
        task = self._loop.create_task(work, context=context)
        for job in jobs:
            job.task = task
        self._tasks.add(task)
        return task

    def _cancel_call(self, job: Job) -> None:
        """Cancels the job's task, unless the call is of a batch and another member is still wanted."""
        task = job.task
        if task is not None and all(other.given_up for other in job.batch if other.task is task):
            self._loop.call_soon(task.cancel)  # a turn later: a task that is cancelled before its first step reports no end
        elif task is None:
            self._generators.cancel(job)
        elif job.flow is not None:
            job.flow.wake()

    def _measure(self, jobs: Sequence[Job]) -> None:
        self.run_s = moving_average(self.run_s, time.monotonic() - jobs[0].started)

    def _without_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls plain code with no running loop around it, so that it may run a loop of its own."""
        asyncio._set_running_loop(None)
        try:
            return function(*arguments)
        finally:
            asyncio._set_running_loop(self._loop)

    def _put_failed(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Fails the jobs after an exception that no call turned into a result."""
        for job in jobs:
            self._put(job, self.execution.failed(error, job))

    def _resize(self, more_threads: int) -> None:
        if more_threads:
            if self._pool is not None:
                self._pool.shutdown()  # its calls still finish
            self._pool = self._new_pool(self._config.sync_threads)
            self._free_threads += more_threads
        self._take()

    # For generators, responses and sessions.

    @property
    def execution(self) -> Execution:
        assert self._execution is not None
        return self._execution

    def run_step(self, step: Callable[[], None], then: Callable[[], None]) -> None:
        """See `generators.Host`."""
        self._last_start = time.monotonic()
        if self._pool is not None:
            self._free_threads -= 1
            return self._pool.submit(partial(self._step_pooled, step, then))
        self.in_plain_call = True
        try:
            self._without_loop(step)
        finally:
            self.in_plain_call = False
            then()

    def _step_pooled(self, step: Callable[[], None], then: Callable[[], None]) -> None:
        try:
            step()
        finally:
            with suppress(RuntimeError):  # a call that was left to its thread may outlive the worker's loop
                self._loop.call_soon_threadsafe(self._stepped, then)

    def _stepped(self, then: Callable[[], None]) -> None:
        self._free_threads += 1
        then()
        self._take()

    def resume(self, job: Job) -> None:
        """Lets a stream go on for which there is room. Called on the I/O loop."""
        if job.flow is not None:
            with suppress(RuntimeError):  # user code closed the loop, and the replica ends
                self._loop.call_soon_threadsafe(job.flow.resume)

    def put(self, job: Job, result: Result) -> None:
        """See `takers.Putting`."""
        flow = job.flow
        if flow is None or not flow.began:
            return self._put(job, result)
        job.run_s = time.monotonic() - job.started
        job.request = job.task = None
        flow.result = result
        self.flowing.touch(job)

    async def mark_suspect(self, job: Job) -> None:
        await self._marking.before_async([job])

    def keep(self, task: asyncio.Task[None]) -> None:
        """Takes a task of this loop into the register: it is cancelled when the worker ends."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _cancel_tasks(self) -> None:
        self._without_loop(self._generators.stop)
        for task in self._tasks:
            task.cancel()
