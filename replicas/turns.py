"""Which requests and jobs of a replica come next: they share its places, and go back to the queue rather than wait behind a slow call."""

from __future__ import annotations

import asyncio
import math
import time

from .consumers import Consumers
from .job_runs import JobRuns
from .places import Places
from .register import Register
from .settlement import Settlement
from .stages import Job, KeptJob, Stage
from .window import Window
from .worker import Worker

_FOLLOWS_S = 1.0  # within this time the broker goes by a new prefetch
_LONG_JOB_S = 1.0  # what waits behind shorter ones stays


class Turns:
    """`submit` takes a request that is to run: it is the worker's own while the replica has no jobs. `consumers` and `jobs` are set before
    anything arrives."""

    consumers: Consumers
    jobs: JobRuns

    def __init__(self, window: Window, places: Places, register: Register, settlement: Settlement, worker: Worker) -> None:
        self._window = window
        self._places = places
        self._register = register
        self._settlement = settlement
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self.submit = worker.submit
        self.has_jobs = False
        self.awaits_ends = False  # whether something comes next when a call has ended
        self._rested_at = 0.0  # monotonic: since when there have been no jobs; 0 while there are
        self._taken_before: set[Job] | None = None  # what was taken under a prefetch that left room for jobs, once that is known

    def __repr__(self) -> str:
        return f"<Turns by {self._window!r}, {self._places!r}>"

    def job_came(self) -> None:
        self._rested_at = 0.0
        if not self.has_jobs:
            self.has_jobs = self.awaits_ends = True
            self.submit = self._places.add_request

    def call_ended(self) -> None:
        """Called before the requests of the call are settled, if `awaits_ends`."""
        if self.consumers.held_off:
            self._go_on()
        if self.has_jobs:
            self._loop.call_soon(self._places.share)  # once they have left their places

    def check(self) -> None:
        """Stops consuming when requests would wait here behind a slow call, and gives them back once the broker sends no others; goes on
        when the call has ended. Called in the rhythm of the replica."""
        if self._window.is_too_full or (self.has_jobs and self._keeps_others_waiting()):
            if self.consumers.held_off:
                self.give_back_waiting()  # they were admitted meanwhile
            else:
                is_in_job = any(isinstance(job, KeptJob) for job in self._register.at(Stage.RUNNING))
                self.consumers.hold_off(jobs_first=not is_in_job)
                self.awaits_ends = True
        elif self.consumers.held_off and not (self._window.is_blocked or self._long_jobs_have_all()):
            self._go_on()

    def _keeps_others_waiting(self) -> bool:
        """Whether what waits here would begin sooner elsewhere, or in the queue as soon as this replica is free."""
        if self._places.has_waiting and self._window.is_blocked:
            return True
        return bool(self._places.has_waiting or self._worker.waiting) and self._long_jobs_have_all()

    def _long_jobs_have_all(self) -> bool:
        """Whether nothing can begin, since jobs that have run for long have all places or threads: they may go on for days. Requests that
        run end in their time."""
        running = self._register.at(Stage.RUNNING)
        since = max([job.started for job in running], default=math.inf)
        if time.monotonic() - since < _LONG_JOB_S or not all(isinstance(job, KeptJob) for job in running):
            return False
        return len(running) >= self._window.places()[0] or self._worker.blocked_s > 0

    def check_jobs(self) -> None:
        """Does what jobs need from time to time, while there are any (`has_jobs`)."""
        self.jobs.check()
        self._window.jobs, self._window.lapsing = self.jobs.in_hand, self.jobs.lapsing
        if self.jobs or self._places.has_waiting:
            self._rested_at = 0.0
        elif self._is_at_rest():
            self.has_jobs = False
            self.submit = self._worker.submit
            self.awaits_ends = self.consumers.held_off

    def _is_at_rest(self) -> bool:
        """Whether the prefetch alone keeps the limit again. What was taken before it rose counts beside it, and has to be settled first."""
        if not self._rested_at:
            self._rested_at, self._taken_before = time.monotonic(), None
        elif self._taken_before is not None:
            self._taken_before = {job for job in self._taken_before if job.stage is not Stage.SETTLED}
        elif time.monotonic() - self._rested_at > _FOLLOWS_S:
            self._taken_before = set(self._register)
        return self._taken_before is not None and not self._taken_before

    def give_back_waiting(self) -> None:
        """Requeues what has not started, the last one first: the queue in memory puts each at its head."""
        for job in reversed([*self._worker.withdraw(), *self._places.withdraw_requests(), *self.jobs.withdraw()]):
            self._settlement.give_back(job)

    def _go_on(self) -> None:
        self.consumers.go_on()
        self.awaits_ends = self.has_jobs
