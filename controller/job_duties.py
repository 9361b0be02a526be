"""What a controller does for jobs, beside its comparisons. The leader fires schedules, forwards jobs whose time has come, sends what
follows from the ends of jobs, and removes large results that have expired; each controller posts webhooks.

A new duty is added here: `Controller` tells all of them together when to begin, to stop, and to tidy up.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from ..broker.callbacks import CallbackRules
from ..broker.calls.job_sending import JobSender
from ..broker.errors import BrokerUnavailable
from ..broker.overload import HeldBytes
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.queue import Queue
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from .due import DueJobs
from .endpoint_jobs import EndpointJobs
from .firing import Firings
from .job_ends import Leftovers, Senders
from .lease import Leader
from .queues import WhileLeading
from .sequels import Sequels
from .state.documents import Desired, Observed
from .sweeps import Sweeps

logger = logging.getLogger(__name__)


class JobDuties:
    """The duties of one controller. `senders` is None where replicas, which judge senders likewise, cannot start either: then the jobs that
    wait for their time wait on."""

    def __init__(
        self,
        store: Store,
        keys: StoreKeys,
        queue: Queue,
        leader: Leader,
        while_leading: WhileLeading,
        senders: Senders | None,
        settings: Settings,
    ) -> None:
        signer = settings.signer
        endpoints = EndpointJobs(settings.namespace, queue, store, keys)
        self._due = DueJobs(queue.later, endpoints, senders, store, while_leading) if senders is not None else None
        self._firings = Firings(JobSender(queue, store, keys, HeldBytes(), signer), store, keys, signer, leader)
        self._sequels = Sequels(queue, store, keys, settings)
        self._sweeps = Sweeps(store)
        self._due_waits = RateLimitedLog(logger)
        self.leftovers = Leftovers(queue, store, senders) if senders is not None else None

    def __repr__(self) -> str:
        return f"<JobDuties {self._due!r}, {self._firings!r}, {self._sequels!r}>"

    @property
    def problems(self) -> dict[str, str]:
        """What operators are told, for the observed document."""
        due = self._due.problems if self._due is not None else {}
        return self._firings.problems | self._sequels.problems | self._sweeps.problems | due

    @property
    def callbacks(self) -> CallbackRules:
        """Which callback URLs jobs may have."""
        return self._sequels.rules

    async def go_on(self, desired: Desired, observed: Observed | None, *, leads: bool) -> None:
        """Does what each controller does. Called in each round."""
        await self._sequels.turn(desired, observed, leads=leads)
        if desired.schedules and not leads:
            await self._firings.follow()

    async def lead_on(self, desired: Desired, observed: Observed) -> None:
        """Does what the leader alone does, from the first backend on until the instance closes. Called after each comparison."""
        if desired.closing:
            return await self.step_down()
        self._firings.go_on(desired, observed)
        self._sweeps.go_on()
        if self._due is None or not (desired.backends or self._due.is_going_on):
            return
        try:
            await self._due.go_on(desired, sealed=observed.sealed)
            self._due_waits.over()
        except BrokerUnavailable as error:
            self._due_waits.say(f"jobs that wait for their time wait longer: {error}")

    async def step_down(self) -> None:
        """Ends what `lead_on` began."""
        await self._firings.stop()
        await self._sweeps.stop()
        if self._due is not None:
            await self._due.stop()

    async def stop(self) -> None:
        await self.step_down()
        await self._sequels.stop()

    async def tidy(self) -> None:
        """Deletes the queues at the end of an instance, if they are empty. If the broker is away they are left, without a job, or with one
        for the next instance of the namespace."""
        with suppress(BrokerUnavailable):
            if self._due is not None:
                await self._due.tidy()
            await self._sequels.tidy()
