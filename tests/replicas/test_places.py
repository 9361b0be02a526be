"""Who gets a place in a replica that has jobs: plain values, no clock, no broker."""

from typing import cast

from mqserve.broker.queue import Delivery
from mqserve.replicas.places import Places
from mqserve.replicas.stages import NOTHING, Job, KeptJob, Stage


class Floor:
    """The places of a replica, and what runs there."""

    def __init__(self, limit: int, job_limit: int = 100) -> None:
        self.limit, self.job_limit = limit, job_limit
        self.running: list[Job] = []
        self.beginning: list[KeptJob] = []
        self.places = Places(lambda: (self.limit, self.job_limit), self._with_worker, self.running.append, self.beginning.append)
        self._admitted: list[Job] = []

    def _with_worker(self) -> tuple[int, int]:
        found = [job for job in self._admitted if job.with_worker]
        return len(found), sum(isinstance(job, KeptJob) for job in found)

    def request(self) -> Job:
        job = Job(NOTHING, 1, cast(Delivery, None))
        job.move(Stage.ADMITTED)
        self._admitted.append(job)
        self.places.add_request(job)
        return job

    def job(self) -> KeptJob:
        job = KeptJob(NOTHING, 1, cast(Delivery, None))
        self.places.add_job(job)
        return job

    def begins(self, job: KeptJob) -> None:
        """Its lease is taken, and it runs."""
        job.move(Stage.ADMITTED)
        self._admitted.append(job)
        self.places.begun(job)

    def end(self, job: Job) -> None:
        job.move(Stage.RECORDING)
        self.places.share()


def test_who_finds_a_place_runs_at_once() -> None:
    floor = Floor(limit=2)
    request, job = floor.request(), floor.job()
    assert floor.running == [request] and floor.beginning == [job] and not floor.places.has_waiting


def test_who_finds_none_waits_and_they_get_the_next_ones_in_turn() -> None:
    floor = Floor(limit=1)
    first = floor.request()
    jobs, requests = [floor.job(), floor.job()], [floor.request(), floor.request()]
    assert (floor.running, floor.beginning) == ([first], [])
    floor.end(first)
    assert floor.beginning == jobs[:1], "a job has its place while it takes its lease"
    floor.begins(jobs[0])
    floor.end(jobs[0])
    assert floor.running == [first, requests[0]]
    floor.end(requests[0])
    assert floor.beginning == jobs
    floor.begins(jobs[1])
    floor.end(jobs[1])
    assert floor.running == [first, *requests] and not floor.places.has_waiting


def test_a_job_that_does_not_get_its_lease_leaves_its_place() -> None:
    floor = Floor(limit=1)
    job, request = floor.job(), floor.request()
    assert floor.running == []
    floor.places.begun(job)
    floor.places.share()
    assert floor.running == [request]


def test_no_more_jobs_begin_than_can_run_and_requests_pass_them() -> None:
    floor = Floor(limit=64, job_limit=1)
    jobs = [floor.job(), floor.job()]
    assert floor.beginning == jobs[:1]
    requests = [floor.request(), floor.request()]
    assert floor.running == requests
    floor.begins(jobs[0])
    floor.end(jobs[0])
    assert floor.beginning == jobs


def test_what_was_answered_while_it_waited_takes_no_place() -> None:
    floor = Floor(limit=1)
    first, cancelled, third = floor.request(), floor.request(), floor.request()
    cancelled.move(Stage.RECORDING)
    floor.end(first)
    assert floor.running == [first, third]


def test_what_waits_can_be_withdrawn() -> None:
    floor = Floor(limit=0)
    job, request = floor.job(), floor.request()
    assert floor.places.withdraw_jobs() == [job] and floor.places.withdraw_requests() == [request]
    assert not floor.places.has_waiting
