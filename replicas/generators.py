"""Runs generators in the worker's thread: steps plain ones, one `next()` for each turn of the loop, and iterates async ones in their task.

A generator whose sink has no room is parked, without a thread or a timer, until there is room again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Protocol

from ..broker.process import forks
from ..broker.results import Result
from .execute import Execution
from .sinks import Sink, Sinks
from .stages import Job

logger = logging.getLogger(__name__)


class Host(Protocol):
    """What the worker does for its generators."""

    @property
    def execution(self) -> Execution: ...

    def run_step(self, step: Callable[[], None], then: Callable[[], None]) -> None:
        """Calls `step` where plain calls run, and then `then` in the worker's thread."""
        ...

    def run_task(self, work: Coroutine[Any, Any, None], context: Context, jobs: Sequence[Job] = ()) -> asyncio.Task[None]: ...

    def put(self, job: Job, result: Result) -> None:
        """Puts the result of a job, behind its chunks if it has shown any."""
        ...

    def cancelled(self, jobs: Sequence[Job], error: asyncio.CancelledError) -> None: ...


class Generators:
    """The generators of one worker. Everything but `stop` runs in its thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, host: Host, sinks: Sinks) -> None:
        self._loop = loop
        self._host = host
        self._sinks = sinks
        self._stepped: dict[Job, Stepped] = {}

    def __repr__(self) -> str:
        return f"<Generators, {len(self._stepped)} plain ones>"

    def start(self, job: Job, generator: Generator[Any, Any, Any] | AsyncGenerator[Any, Any], context: Context) -> None:
        """Runs a generator that a handler has made. Its result, or the error that ended it, is put as that of a call."""
        sink = self._sinks.of(job, self._host.execution.signer)
        if isinstance(generator, AsyncGenerator):
            self._host.run_task(self._iterate(job, generator, sink), context, [job])
            return
        stepped = self._stepped[job] = Stepped(job, generator, sink, context, self._host.execution)
        self._go_on(stepped)

    def cancel(self, job: Job) -> None:
        """Ends the plain generator of a job that was given up, at once if it is parked, else after its step."""
        stepped = self._stepped.get(job)
        if stepped is not None and stepped.is_parked:
            stepped.is_parked = False
            self._go_on(stepped)

    def stop(self) -> None:
        """Closes the plain generators at the worker's end."""
        for stepped in tuple(self._stepped.values()):
            if stepped.is_parked:
                stepped.close()
        self._stepped.clear()

    def _go_on(self, stepped: Stepped) -> None:
        self._loop.call_soon(self._step, stepped)

    def _step(self, stepped: Stepped) -> None:
        if stepped.job.given_up is not None:
            self._host.run_step(stepped.end_given_up, partial(self._ended, stepped))
        elif stepped.sink.has_room:
            self._host.run_step(stepped.step, partial(self._after, stepped))
        else:
            stepped.is_parked = True
            if stepped.sink.park(lambda: self.cancel(stepped.job)) or stepped.job.given_up is not None:
                self.cancel(stepped.job)

    def _after(self, stepped: Stepped) -> None:
        if stepped.result is not None:
            self._ended(stepped)
        elif stepped.job in self._stepped:
            self._go_on(stepped)

    def _ended(self, stepped: Stepped) -> None:
        if self._stepped.pop(stepped.job, None) is stepped and stepped.result is not None:
            self._host.put(stepped.job, stepped.result)

    async def _iterate(self, job: Job, generator: AsyncGenerator[Any, Any], sink: Sink) -> None:
        execution = self._host.execution
        try:
            try:
                result = await self._iterated(generator, sink)
            finally:
                await generator.aclose()
        except asyncio.CancelledError as error:
            return self._host.cancelled([job], error)
        except BaseException as error:
            result = execution.failed(error, job)
        finally:
            forks.end_if_forked_since(execution.depth)
        self._host.put(job, result)

    async def _iterated(self, generator: AsyncGenerator[Any, Any], sink: Sink) -> Result:
        async for value in generator:
            sink.take(value)
            if not sink.wants_more:
                break
            if not sink.has_room:
                await sink.room()
        return sink.end()


class Stepped:
    """A plain generator under way. Its steps run one after the other, each in the context of its call."""

    def __init__(self, job: Job, generator: Generator[Any, Any, Any], sink: Sink, context: Context, execution: Execution) -> None:
        self.job = job
        self.sink = sink
        self.is_parked = False
        self.result: Result | None = None
        self._generator = generator
        self._context = context
        self._execution = execution

    def __repr__(self) -> str:
        return f"<Stepped {self._generator!r}>"

    def step(self) -> None:
        """Has the generator make its next value. Sets the result when it has ended."""
        self._context.run(self._step)
        forks.end_if_forked_since(self._execution.depth)

    def _step(self) -> None:
        try:
            self.sink.take(next(self._generator))
            if self.sink.wants_more:
                return
            self._generator.close()
            self.result = self.sink.end()
        except StopIteration:
            self.result = self._end()
        except BaseException as error:
            self.result = self._execution.failed(error, self.job)
            self.close()  # what it yielded may be what failed

    def _end(self) -> Result:
        try:
            return self.sink.end()
        except BaseException as error:
            return self._execution.failed(error, self.job)

    def end_given_up(self) -> None:
        self.close()
        self.result = self.job.unwanted_result

    def close(self) -> None:
        """Has the generator run its `finally`."""
        try:
            self._context.run(self._generator.close)
        except BaseException as error:
            self._execution.failed(error, self.job)  # which logs it


class HandOver:
    """Tells the I/O loop of the streams for which there is something new, once for each turn of either loop. Made on the I/O loop."""

    def __init__(self) -> None:
        self._io = asyncio.get_running_loop()
        self._touched: deque[Job] = deque()
        self._woken = False
        self.on_touched: Callable[[Job], None] = lambda job: None

    def __repr__(self) -> str:
        return f"<HandOver of {len(self._touched)}>"

    def touch(self, job: Job) -> None:
        self._touched.append(job)
        if not self._woken:
            self._woken = True
            try:
                self._io.call_soon_threadsafe(self._hand_over)
            except RuntimeError:  # the I/O loop has ended, and the replica with it
                pass

    def _hand_over(self) -> None:
        self._woken = False
        touched: set[Job] = set()
        while self._touched:
            touched.add(self._touched.popleft())
        for job in touched:
            self.on_touched(job)
