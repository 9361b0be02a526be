"""Gives up the requests of a replica that nobody waits for any more: their time is spent, or they were cancelled."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..broker.calls.cancellations import CANCELLED, Cancellations
from ..broker.results import Result
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from .flows import Flows
from .register import Register
from .sessions import Sessions
from .settlement import is_kept
from .stages import Job, KeptJob
from .worker import Worker


class GivingUp:
    """Answers such requests at once. If their call runs, its slot is free only when the call has ended. `flows` and `sessions` are set
    before any request arrives."""

    flows: Flows
    sessions: Sessions

    def __init__(self, backend: str, store: Store, keys: StoreKeys, register: Register, worker: Worker) -> None:
        self._backend = backend
        self._register = register
        self._worker = worker
        self._cancellations = Cancellations(store, keys, self._on_cancelled)

    def __repr__(self) -> str:
        return f"<GivingUp requests of {self._backend}, {self._cancellations!r}>"

    async def listen(self) -> None:
        """Follows the log of cancelled requests until cancelled itself."""
        await self._cancellations.listen()

    def is_cancelled(self, job: Job) -> bool:
        return bool(self._cancellations) and self._names(job)

    def give_up_late(self) -> None:
        now = time.monotonic()
        for job in self._register.with_worker():
            if job.deadline <= now and job.given_up is None:
                self.give_up(job, job.unwanted_result)

    def give_up(self, job: Job, result: Result) -> None:
        """Answers the request with `result` now."""
        result = self.with_frames(job, result)
        if job.started and is_kept(job.envelope) and job.given_up is None:
            self.flows.record_early(job, result)
        self._worker.give_up(job, result)
        if job.flow is not None:
            self.flows.settle_given_up(job, job.flow)

    def with_frames(self, job: Job, result: Result) -> Result:
        return result if job.flow is None else self.flows.give_up(job.flow, result)

    def _on_cancelled(self, names: Sequence[str]) -> None:
        self.sessions.proxies_died(names)
        for job in self._register.with_worker():
            if not self._names(job):
                continue
            future_id = job.envelope.future_id(self._backend)
            if job.flow is not None and job.flow.can_wait and not self._cancellations.has(future_id):
                self.flows.sender_is_gone(job, job.flow)  # its proxy has died, and the client may come back by another one
            else:
                self.give_up(job, CANCELLED)

    def _names(self, job: Job) -> bool:
        """Whether the log names the request. A job outlives the proxy that sent it."""
        future_id = job.envelope.future_id(self._backend)
        return self._cancellations.has(future_id) if isinstance(job, KeptJob) else self._cancellations.names(job.envelope, future_id)
