"""Runs ASGI apps for answers, in the worker's thread: the backend's own, and the responses that handlers return."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from ..broker.results import Result
from .asgi_apps import ASGIApp, check_is_http
from .context import running_jobs
from .execute import Execution
from .sinks import Sinks
from .stages import Job


class Host(Protocol):
    """What the worker does for its apps."""

    @property
    def execution(self) -> Execution: ...

    async def mark_suspect(self, job: Job) -> None:
        """Stores the start mark of a job that may have killed its replica."""
        ...

    def put(self, job: Job, result: Result) -> None: ...

    def cancelled(self, jobs: Sequence[Job], error: asyncio.CancelledError) -> None:
        """Answers the jobs of a cancelled task."""
        ...


class Responding:
    """Its length is the number of apps and responses that run, including their background tasks."""

    def __init__(self, host: Host, sinks: Sinks) -> None:
        self._host = host
        self._sinks = sinks
        self._count = 0

    def __repr__(self) -> str:
        return f"<Responding, {self._count} apps>"

    def __len__(self) -> int:
        return self._count

    async def answer(self, job: Job, app: ASGIApp) -> None:
        """Runs the backend's app, with which the call begins."""
        await self.respond(job, app, begins=True)

    async def respond(self, job: Job, app: ASGIApp, *, begins: bool = False) -> None:
        """Runs an app for the answer: a response that the call returned, or the backend's own, with which the call `begins`."""
        self._count += 1
        try:
            if begins:
                running_jobs.set([job])
                check_is_http(job.envelope)
                if job.suspect:
                    await self._host.mark_suspect(job)
            await self._host.execution.respond(app, job, lambda result: self._host.put(job, result), self._sinks)
        except asyncio.CancelledError as error:
            self._host.cancelled([job], error)
        except BaseException as error:
            self._host.put(job, self._host.execution.failed(error, job))
        finally:
            self._count -= 1
