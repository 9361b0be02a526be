"""Jobs that wait for their time: the leader takes them from the broker, and sends each to its backend or lets it wait on. From the same
queue it takes what was published to endpoints (`endpoint_jobs.py`).

A job is acked once the broker has it elsewhere, so none is lost, and two leaders may both send it: replicas know it by its id.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection

from ..broker.dead_letters import Death
from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope, MQServeError, NotRouted
from ..broker.later import DueJob, Later
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.process.tasks import Tasks
from ..broker.queue import Consumption
from ..broker.queue_names import ENDPOINTS
from ..broker.store import Store
from .endpoint_jobs import EndpointJobs
from .job_ends import Senders, end_as_gone
from .queues import WhileLeading
from .state.documents import Desired

logger = logging.getLogger(__name__)

HELD = 64  # jobs that are on their way at once: each may have a body of 1 MiB
AGAIN_MS = 1000
DECLARE_AGAIN_S = 15.0  # a broker may come back empty
TRY_AGAIN_S = 1.0
_LAST_CONFIRMS_S = 2.0


class DueJobs:
    """The jobs whose time the leader looks at. It takes some while it leads (`go_on`), and none otherwise (`stop`)."""

    def __init__(self, later: Later, endpoints: EndpointJobs, senders: Senders, store: Store, while_leading: WhileLeading) -> None:
        self._later = later
        self._endpoints = endpoints
        self._while_leading = while_leading
        self._senders = senders
        self._store = store
        self._backends: Collection[str] = ()
        self._consumption: Consumption | None = None
        self._declared_at = -math.inf  # monotonic
        self._dead = 0  # messages to endpoints that were set aside
        self._tasks = Tasks()
        self._trouble, self._odd = RateLimitedLog(logger), RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<DueJobs, {len(self._tasks)} on their way{', stopped' if self._consumption is None else ''}>"

    @property
    def problems(self) -> dict[str, str]:
        """What operators are told."""
        if not (self.is_going_on and self._dead):
            return {}
        return {"messages to endpoints refused": f"{self._dead}: `mqserve dead list {ENDPOINTS}` shows why"}

    @property
    def is_going_on(self) -> bool:
        return self._consumption is not None

    async def go_on(self, desired: Desired, *, sealed: bool) -> None:
        """Takes jobs from now on, for the backends and endpoints that exist. Raises BrokerUnavailable."""
        self._backends, self._senders.demands_seals = desired.backends, sealed
        self._endpoints.follow(desired)
        if time.monotonic() - self._declared_at > DECLARE_AGAIN_S:
            self._dead = await self._while_leading(self._later.declare)
            self._declared_at = time.monotonic()
        if self._consumption is None:
            self._consumption = await self._while_leading(lambda: self._later.consume(HELD, self._take))

    async def stop(self) -> None:
        """Takes no more. Those that are on their way are finished, or given back after a moment."""
        if self._consumption is None:
            return
        consumption, self._consumption = self._consumption, None
        await consumption.cancel()
        await self._tasks.wait(_LAST_CONFIRMS_S)
        self._tasks.cancel()

    async def tidy(self) -> None:
        """Deletes the queues at the end of an instance, if no job waits in them. Raises BrokerUnavailable."""
        await self.stop()
        await self._while_leading(self._later.delete_if_empty)
        self._declared_at = -math.inf

    def _take(self, job: DueJob) -> None:
        self._tasks.start(self._settle(job))

    async def _settle(self, job: DueJob) -> None:
        try:
            while True:
                try:
                    await self._send_on(job)
                    break
                except MQServeError as error:
                    self._trouble.say(f"a job whose time may have come waits on, and is tried again: {error}")
                except Exception:
                    logger.exception("a job whose time may have come waits on: that is a bug in mqserve, please report it")
                await asyncio.sleep(TRY_AGAIN_S)
        except asyncio.CancelledError:
            job.requeue()
            raise
        self._trouble.over()
        job.ack()

    async def _send_on(self, job: DueJob) -> None:
        """Returns once the broker has the job elsewhere. Raises the errors of broker and store."""
        if job.endpoint is not None:
            return await self._endpoints.send_on(job, job.endpoint)
        if not job.backend:
            return self._odd.say("a message among the jobs that wait names no backend (mq-to), and is dropped: see docs/protocol.md")
        try:
            envelope = job.envelope()
            self._senders.check_header(envelope)
            self._senders.check_pickle(envelope)
        except BadEnvelope as error:
            return await self._later.set_aside(job, Death(str(error), died_at_ms=self._store.now_ms()))
        due_ms = envelope.header.job.not_before_ms if envelope.header.job is not None else 0
        while (left_ms := due_ms - self._store.now_ms()) > 0:
            if await self._later.wait(job, left_ms):
                return
        try:
            await self._later.forward(job)
        except NotRouted:
            if job.backend in self._backends:  # its queue is about to be declared, and jobs of others must not wait for that
                while not await self._later.wait(job, AGAIN_MS):
                    pass
            else:
                await self._bury(job, envelope)

    async def _bury(self, job: DueJob, envelope: Envelope) -> None:
        """Ends a job whose backend is gone, as replicas end those that wait when theirs goes."""
        why = f"backend {job.backend!r} was deleted before the time of this job came"
        await end_as_gone(self._store, job.backend, envelope, why)
        await self._later.set_aside(job, Death(f"{why}: deploy it again, and retry this", died_at_ms=self._store.now_ms()))
