"""A replica's server without a worker: what would run is kept for the test to look at, and to end."""

import asyncio
import math
from typing import Any, cast

from mqserve.broker.envelope import Envelope, Header
from mqserve.broker.memory.queue import EmbeddedQueue
from mqserve.broker.memory.store import EmbeddedStore
from mqserve.broker.results import Result
from mqserve.broker.settings import Settings
from mqserve.controller.state.documents import Backend
from mqserve.replicas.handler import Handler
from mqserve.replicas.metrics import ReplicaMetrics
from mqserve.replicas.request_loop import RequestLoop
from mqserve.replicas.stages import Job
from mqserve.replicas.worker import Worker
from tests.broker.traffic import publish, publish_job, until

MINTED = "a" * 32


class IdleWorker:
    """Runs nothing: `jobs` are what it was given."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.run_s = 0.0
        self.responding = 0
        self.blocked_s = 0.0
        self.hook_since = math.inf
        self.thread = self.flowing = self.sockets = self.touched = self
        self.missed = 0
        self.on_touched: object = None
        self.new_link: object = None

    def __len__(self) -> int:
        """Sessions."""
        return 0

    def ask_for_life(self, *, may_be_busy: bool) -> None:
        pass

    @property
    def waiting(self) -> int:
        return sum(not job.started for job in self.jobs)

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def withdraw(self) -> list[Job]:
        withdrawn = [job for job in self.jobs if not job.started]
        self.jobs = [job for job in self.jobs if job.started]
        return withdrawn

    def give_up(self, job: Job, result: Result) -> None:
        job.given_up = result

    def resume(self, job: Job) -> None:
        pass

    def configure(self, config: object) -> None:
        pass


class Serving:
    """A server that takes from some generations of backend `b`. Use as a context manager on a running loop. Unless it `tunes`, it is as
    one that is frozen: it renews no leases."""

    def __init__(
        self,
        queue: EmbeddedQueue | None = None,
        store: EmbeddedStore | None = None,
        *,
        generations: tuple[int, ...] = (1,),
        replica_id: str = "b#1",
        tunes: bool = False,
        **config: Any,
    ) -> None:
        self._generations = generations
        self._tunes = tunes
        self.queue = queue or EmbeddedQueue()
        self.store = store or EmbeddedStore("tests")
        self.worker = IdleWorker()
        backend = Backend("b", "", "b", config)
        self.server = RequestLoop(
            Settings.read({}, namespace="tests"), backend, self.queue, self.store, cast(Worker, self.worker),
            Handler(lambda request: None, is_function=True), ReplicaMetrics("b", replica_id), replica_id,
        )  # fmt: skip
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Serving":
        for generation in self._generations:
            await self.queue.declare("b", generation, None)
        self.server.want(dict.fromkeys(self._generations, 1))
        works = [self.server.keep_taking_forever(lambda: None), self.server.listen()]
        if self._tunes:
            works.append(self.server.tune_forever())
        self._tasks = [asyncio.create_task(work) for work in works]
        await until(lambda: self.server.generations == self._generations)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.server.abandon()

    async def send(self, envelope: Envelope) -> None:
        assert await publish(self.queue, envelope) is None

    async def send_job(self, envelope: Envelope) -> None:
        assert await publish_job(self.queue, envelope) is None

    async def taken(self) -> Job:
        """The only request that is to run."""
        await until(lambda: self.worker.jobs)
        (job,) = self.worker.jobs
        return job

    def end(self, job: Job, result: Result) -> None:
        """As the worker does when the user's code has returned."""
        self.worker.jobs.remove(job)
        job.started = job.started or 1.0
        self.server.on_done(job, result)

    async def settled(self) -> None:
        """Nothing waits in the queue, and nothing is held."""

        async def is_settled() -> bool:
            return not await self.queue.depth("b", 1) and not self.server.running

        await until(is_settled)


def request(body: bytes = b"x", **fields: Any) -> Envelope:
    """Of a direct publisher, with an id of its own."""
    return Envelope(**{"id": "order-17", "body": body, "content_type": "text/plain", **fields})


def minted(**header: Any) -> Envelope:
    """Of a handle."""
    return Envelope(MINTED, b"x", "text/plain", Header(origin="handle", **header))
