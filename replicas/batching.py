"""Gathers the requests of one replica into batches, in the worker's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from .handler import Method
from .stages import Job


class Gathering:
    """The requests that wait for their batch. `run(jobs, method)` runs a batch, `drop(job)` answers a request that nobody waits for, and
    `later(wait_s, callback)` is the worker's timer."""

    def __init__(
        self,
        run: Callable[[Sequence[Job], Method], None],
        drop: Callable[[Job], None],
        later: Callable[[float, Callable[[], None]], asyncio.TimerHandle],
    ) -> None:
        self._run = run
        self._drop = drop
        self._later = later
        self._waiting: list[tuple[Job, Method]] = []
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Gathering, {len(self)} wait>"

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job, method: Method, size: int, wait_s: float) -> None:
        """Adds a request. A full batch runs at once, a smaller one after `wait_s`; without a wait, the worker calls `run_all`."""
        self._waiting.append((job, method))
        if len(self._waiting) >= size:
            self.run_all()
        elif self._timer is None and wait_s > 0:
            self._timer = self._later(wait_s, self.run_all)

    def run_all(self) -> None:
        """Makes one call for each method among the waiting requests."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered, self._waiting = self._waiting, []
        groups: dict[Method, list[Job]] = {}
        for job, method in gathered:
            if job.unwanted:
                self._drop(job)
                continue
            groups.setdefault(method, []).append(job)
        for method, jobs in groups.items():
            self._run(jobs, method)
