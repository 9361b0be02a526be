"""How jobs and requests that somebody waits for share what a replica runs at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .stages import Job, KeptJob


class Places:
    """The places of a replica while it has jobs. Without any, its prefetch alone keeps the limit, and requests do not come here.

    Who finds no place waits here, and gets one in turn: a job, then a request, then a job. A job has a place from the moment in which it
    `begin`s: its lease is taken then, and it is run later.

    `limits` and `with_worker` are those of all together, and of jobs among them.
    """

    def __init__(
        self,
        limits: Callable[[], tuple[int, int]],
        with_worker: Callable[[], tuple[int, int]],
        run: Callable[[Job], None],
        begin: Callable[[KeptJob], None],
    ) -> None:
        self._limits = limits
        self._with_worker = with_worker
        self._run = run
        self._begin = begin
        self._requests: deque[Job] = deque()  # admitted, and not with the worker yet
        self._jobs: deque[KeptJob] = deque()
        self._beginning: set[KeptJob] = set()
        self._is_turn_of_jobs = True

    def __repr__(self) -> str:
        return f"<Places for {self._limits()}, {len(self._jobs)} jobs and {len(self._requests)} requests wait>"

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
        (limit, job_limit), (running, running_jobs) = self._limits(), self._with_worker()
        free = limit - len(self._beginning) - (running - len(self._requests))
        free_for_jobs = job_limit - len(self._beginning) - running_jobs
        while free > 0:
            if self._jobs and free_for_jobs > 0 and (self._is_turn_of_jobs or not self._requests):
                self._is_turn_of_jobs = False
                free_for_jobs -= 1
                job = self._jobs.popleft()
                self._beginning.add(job)
                self._begin(job)
            elif self._requests:
                self._is_turn_of_jobs = True
                self._run(self._requests.popleft())
            else:
                return
            free -= 1

    def withdraw_jobs(self) -> list[KeptJob]:
        """Removes and returns the jobs that have not begun."""
        jobs, self._jobs = list(self._jobs), deque()
        return jobs

    def withdraw_requests(self) -> list[Job]:
        """Removes and returns the requests that are not with the worker."""
        requests, self._requests = [job for job in self._requests if job.with_worker], deque()
        return requests
