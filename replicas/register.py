"""The register of the requests that a replica holds: each stands in it from its delivery until it is settled."""

from __future__ import annotations

from collections.abc import Iterator

from .stages import Job, KeptJob, Stage


class Register:
    """The jobs of one replica. Only its I/O loop uses this."""

    def __init__(self) -> None:
        self._jobs: set[Job] = set()
        self.hold = self._jobs.add

    def __repr__(self) -> str:
        counts = {stage.value: len(self.at(stage)) for stage in Stage}
        return f"<Register {', '.join(f'{count} {stage}' for stage, count in counts.items() if count) or 'empty'}>"

    def __iter__(self) -> Iterator[Job]:
        """Iterates over a copy, since a job may be settled meanwhile."""
        return iter(tuple(self._jobs))

    def at(self, stage: Stage) -> list[Job]:
        return [job for job in self._jobs if job.stage is stage]

    def with_worker(self) -> list[Job]:
        """Returns the jobs that wait for user code or run."""
        return [job for job in self._jobs if job.with_worker]

    def count_with_worker(self) -> tuple[int, int]:
        """Returns how many requests and jobs are with the worker, and how many of these are jobs."""
        found = self.with_worker()
        return len(found), sum([isinstance(job, KeptJob) for job in found])

    def has_copy(self, job: Job, backend: str) -> bool:
        """Whether another copy of the request runs here, or is about to. Two would take the stream of their answer from each other."""
        future_id = job.envelope.future_id(backend)
        others = (other for other in self._jobs if other is not job and (other.with_worker or other.stage is Stage.HELD))
        return bool(future_id) and any(other.envelope.future_id(backend) == future_id for other in others)

    @property
    def is_empty(self) -> bool:
        return not self._jobs

    @property
    def unsettled(self) -> int:
        """The number of deliveries that are neither acked nor requeued."""
        return sum(job.stage is not Stage.RETURNED for job in self._jobs)

    def has_one(self) -> bool:
        """Whether exactly one delivery is unsettled."""
        return self.unsettled == 1

    @property
    def generations(self) -> set[int]:
        """The generations of the queue whose messages are held."""
        return {job.generation for job in self._jobs if job.stage is not Stage.RETURNED}

    def settle(self, job: Job) -> None:
        """Removes the job, for which nothing is left to do."""
        job.move(Stage.SETTLED)
        self._jobs.discard(job)
