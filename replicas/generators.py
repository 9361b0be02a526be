"""Runs generators in the worker's thread: steps plain ones, one `next()` for each turn of the loop, and iterates async ones in their task.

A generator whose sink has no room is parked, without a thread or a timer, until there is room again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Protocol

from ..broker.process import forks
from .execute import AnyGenerator, BatchSteps, Execution
from .outgoing import resolve
from .sinks import Sinks
from .stages import Job
from .takers import BatchTaker, Putting, RequestTaker, Taker

logger = logging.getLogger(__name__)


class Host(Putting, Protocol):
    """What the worker does for its generators."""

    def run_step(self, step: Callable[[], None], then: Callable[[], None]) -> None:
        """Calls `step` where plain calls run, and then `then` in the worker's thread."""
        ...

    def run_task(self, work: Coroutine[Any, Any, None], context: Context, jobs: Sequence[Job] = ()) -> asyncio.Task[None]: ...

    def cancelled(self, jobs: Sequence[Job], error: asyncio.CancelledError) -> None: ...


class Generators:
    """The generators of one worker. Everything but `stop` runs in its thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, host: Host, sinks: Sinks) -> None:
        self._loop = loop
        self._host = host
        self._sinks = sinks
        self._stepped: dict[Job, Stepped] = {}

    def __repr__(self) -> str:
        return f"<Generators, {len(self._stepped)} requests of plain ones>"

    def start(self, jobs: Sequence[Job], generator: AnyGenerator | BatchSteps, context: Context) -> None:
        """Runs a generator that a handler has made. Its result, or the error that ended it, is put as that of a call."""
        signer = self._host.execution.signer
        takers = [RequestTaker(job, self._sinks.of(job, signer), self._host) for job in jobs]
        taker: Taker = takers[0]
        if isinstance(generator, BatchSteps):
            generator, taker = generator.generator, BatchTaker(takers)
        if taker.is_given_up:  # the cancellation, which came before this, would not find the generator
            return taker.give_up()
        if isinstance(generator, AsyncGenerator):
            self._host.run_task(self._iterate(jobs, generator, taker), context, jobs)
            return
        for job in jobs:
            job.task = None  # of the call, which has ended: `cancel` ends the generator
        stepped = Stepped(jobs, generator, taker, context, self._host.execution)
        self._stepped.update(dict.fromkeys(jobs, stepped))
        self._go_on(stepped)

    def cancel(self, job: Job) -> None:
        """Has the generator of a job that was given up look at that: at once if it is parked, else after its step."""
        stepped = self._stepped.get(job)
        if stepped is not None:
            self._wake(stepped)

    def stop(self) -> None:
        """Closes the plain generators at the worker's end."""
        for stepped in set(self._stepped.values()):
            if stepped.is_parked:
                stepped.close()
        self._stepped.clear()

    def _wake(self, stepped: Stepped) -> None:
        if stepped.is_parked:
            stepped.is_parked = False
            self._go_on(stepped)

    def _go_on(self, stepped: Stepped) -> None:
        self._loop.call_soon(self._step, stepped)

    def _step(self, stepped: Stepped) -> None:
        if stepped.taker.is_given_up or stepped.taker.has_room:
            return self._host.run_step(stepped.step, partial(self._after, stepped))
        stepped.is_parked = True
        if stepped.taker.park(partial(self._wake, stepped)) or stepped.taker.is_given_up:
            self._wake(stepped)

    def _after(self, stepped: Stepped) -> None:
        if stepped.is_over:
            for job in stepped.jobs:
                self._stepped.pop(job, None)
        elif stepped.jobs[0] in self._stepped:  # else the worker ends
            self._go_on(stepped)

    async def _iterate(self, jobs: Sequence[Job], generator: AsyncGenerator[Any, Any], taker: Taker) -> None:
        depth = self._host.execution.depth
        try:
            try:
                await self._take_all(generator, taker)
            finally:
                await generator.aclose()
        except asyncio.CancelledError as error:
            self._host.cancelled(taker.left, error)
        except BaseException as error:
            taker.fail(error)
        else:
            taker.end()
        finally:
            forks.end_if_forked_since(depth)

    async def _take_all(self, generator: AsyncGenerator[Any, Any], taker: Taker) -> None:
        async for value in generator:
            taker.take(value)
            if not taker.wants_more:
                return
            while not taker.has_room:
                room: asyncio.Future[None] = self._loop.create_future()
                if not taker.park(partial(resolve, room)):
                    await room


class Stepped:
    """A plain generator under way. Its steps run one after the other, each in the context of its call."""

    def __init__(
        self, jobs: Sequence[Job], generator: Generator[Any, Any, Any], taker: Taker, context: Context, execution: Execution
    ) -> None:
        self.jobs = jobs
        self.taker = taker
        self.is_parked = False
        self.is_over = False
        self._generator = generator
        self._context = context
        self._execution = execution

    def __repr__(self) -> str:
        return f"<Stepped {self._generator!r}>"

    def step(self) -> None:
        """Has the generator make its next value, or closes it if nobody wants one."""
        self._context.run(self._step)
        forks.end_if_forked_since(self._execution.depth)

    def _step(self) -> None:
        try:
            if self.taker.is_given_up:
                self.is_over = True
                self._close()
                return self.taker.give_up()
            self.taker.take(next(self._generator))
            if self.taker.wants_more:
                return
            self.is_over = True
            self._generator.close()
        except StopIteration:
            self.is_over = True
        except BaseException as error:
            self.is_over = True
            self._close()  # what it yielded may be what failed
            return self.taker.fail(error)
        self.taker.end()

    def close(self) -> None:
        """Has the generator run its `finally`."""
        self._context.run(self._close)

    def _close(self) -> None:
        try:
            self._generator.close()
        except BaseException as error:
            self._execution.failed(error, self.jobs[0])  # which logs it
