"""The ends of jobs whose backend is gone: the leader records them, since no replica is there to do it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from ..broker.envelope import Envelope, JobHead
from ..broker.errors import BadEnvelope, MQServeError
from ..broker.jobs import JOB_RESULT_TTL_S, JobEnd, state_of
from ..broker.process.tasks import Tasks
from ..broker.queue import Delivery, Queue
from ..broker.results import ErrorInfo, Outcome, Result, entry_of
from ..broker.store import Store, recorded

logger = logging.getLogger(__name__)

HELD = 64  # jobs whose end is on its way: each may have a body of 1 MiB
TURN_S = 2.0  # for as long the leader looks after nothing else
_LOOK_EVERY_S = 0.02


class Senders(Protocol):
    """Decides whose messages count: the leader acts on what they say, and vouches for what it publishes again."""

    demands_seals: bool

    def check_header(self, envelope: Envelope) -> None:
        """Raises BadSignature."""
        ...

    def check_pickle(self, envelope: Envelope) -> None:
        """Raises BadEnvelope."""
        ...


async def end_as_gone(store: Store, backend: str, envelope: Envelope, why: str) -> None:
    """Records the end of a job, unless it has one. Raises StoreUnavailable."""
    future_id = envelope.future_id(backend)
    if not future_id:
        return
    result = Result(status=503, backend=backend, error=ErrorInfo(type=Outcome.GONE, message=f"{why}: submit it again once it is served"))
    raw = result.to_bytes()
    head = envelope.header.job or JobHead()
    end = JobEnd(
        future_id, raw, entry_of(future_id, raw), state_of(result), result.status, backend, store.now_ms(),
        (head.result_ttl_s or JOB_RESULT_TTL_S) * 1000, inbox=envelope.header.inbox, endpoint=envelope.header.meta.endpoint,
        callback=head.callback, stage=head.stage, member=head.member,
    )  # fmt: skip
    await recorded(store.jobs.end_then, end)


class Leftovers:
    """The jobs that wait in a queue which is about to be deleted for good."""

    def __init__(self, queue: Queue, store: Store, senders: Senders) -> None:
        self._queue = queue
        self._store = store
        self._senders = senders

    def __repr__(self) -> str:
        return f"<Leftovers of {self._queue!r}>"

    async def end_some(self, backend: str, generation: int) -> bool:
        """Ends jobs for a while; returns whether none is left: neither in the queue nor on its way to its end. Jobs whose end could not be
        recorded return to the queue. Raises BrokerUnavailable."""
        if not await self._queue.count_jobs(backend, generation):
            return True
        tasks = Tasks()

        def take(delivery: Delivery) -> None:
            tasks.start(self._end(backend, delivery))

        consumption = await self._queue.consume(backend, generation, HELD, take, jobs=True)
        until = time.monotonic() + TURN_S
        try:
            while time.monotonic() < until and await self._queue.count_jobs(backend, generation):
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            await consumption.cancel()
            await tasks.wait(TURN_S)
        return not tasks and not await self._queue.count_jobs(backend, generation)

    async def _end(self, backend: str, delivery: Delivery) -> None:
        try:
            envelope = delivery.envelope()
            self._senders.check_header(envelope)
            await end_as_gone(self._store, backend, envelope, f"backend {backend!r} was deleted before the job began")
        except BadEnvelope as error:
            logger.warning("a message among the jobs of backend %s, which is gone, is dropped: %s", backend, error)
        except MQServeError as error:
            logger.warning("a job of backend %s, which is gone, has no end yet: %s", backend, error)
            return delivery.requeue()
        except Exception:
            logger.exception("a job of backend %s, which is gone, has no end yet: that is a bug in mqserve, please report it", backend)
            return delivery.requeue()
        delivery.ack()
