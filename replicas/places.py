"""How jobs and requests that somebody waits for share what a replica runs at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .stages import Job, KeptJob


class Places:
    """The places of a replica while it has jobs. Without any, its prefetch alone keeps the limit, and requests do not come here.

    Who finds no place waits here, and gets one in turn: a job, then a request, then a job. A job has a place from the moment in which it
    `begin`s: its lease is taken then, and it is run later.
    """

    def __init__(
        self, limit: Callable[[], int], with_worker: Callable[[], int], run: Callable[[Job], None], begin: Callable[[KeptJob], None]
    ) -> None:
        self._limit = limit
        self._with_worker = with_worker
        self._run = run
        self._begin = begin
        self._requests: deque[Job] = deque()  # admitted, and not with the worker yet
        self._jobs: deque[KeptJob] = deque()
        self._beginning: set[KeptJob] = set()
        self._is_turn_of_jobs = True

    def __repr__(self) -> str:
        return f"<Places for {self._limit()}, {len(self._jobs)} jobs and {len(self._requests)} requests wait>"

    @property
    def has_waiting(self) -> bool:
        """Whether any job or request waits for a place."""
        return bool(self._jobs or self._requests)

    def add_request(self, job: Job) -> None:
        """Runs an admitted request when it has a place."""
        self._requests.append(job)
        self.share()

    def add_job(self, job: KeptJob) -> None:
        """Begins the job when it has a place."""
        self._jobs.append(job)
        self.share()

    def begun(self, job: KeptJob) -> None:
        """Notes that the job is with the worker now, or has lost its place."""
        self._beginning.discard(job)

    def share(self) -> None:
        """Gives away the places that are free. Called whenever one may be."""
        if not self._jobs and not self._requests:
            return
        self._requests = deque([job for job in self._requests if job.with_worker])  # others were answered meanwhile
        free = self._limit() - len(self._beginning) - (self._with_worker() - len(self._requests))
        while free > 0 and (self._jobs or self._requests):
            free -= 1
            if self._jobs and (self._is_turn_of_jobs or not self._requests):
                self._is_turn_of_jobs = False
                job = self._jobs.popleft()
                self._beginning.add(job)
                self._begin(job)
            else:
                self._is_turn_of_jobs = True
                self._run(self._requests.popleft())

    def withdraw_jobs(self) -> list[KeptJob]:
        """Removes and returns the jobs that have not begun."""
        jobs, self._jobs = list(self._jobs), deque()
        return jobs

    def withdraw_requests(self) -> list[Job]:
        """Removes and returns the requests that are not with the worker."""
        requests, self._requests = [job for job in self._requests if job.with_worker], deque()
        return requests
