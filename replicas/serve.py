"""Every delivery is settled once: answered, dead-lettered or requeued. In order: store the result, tell who waits, ack."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import msgspec

from ..broker.cancellations import CANCELLED, Cancellations
from ..broker.dead_letters import Death
from ..broker.envelope import Envelope
from ..broker.errors import BackendFailed, BadEnvelope, MQServeError, StoreUnavailable
from ..broker.queue import Delivery, Queue, telling
from ..broker.results import ErrorInfo, Result, late_result, note_of
from ..broker.settings import Settings
from ..broker.store import Record, Store
from ..broker.store_keys import RESULT_TTL_S, StoreKeys
from ..controller.state import MAX_REQUEST_TIMEOUT_S, Backend, BackendConfig
from .admission import Admission, Poison
from .amqp_replies import send_reply
from .handler import Handler
from .metrics import ReplicaMetrics
from .prefetch import prefetch, slots
from .senders import Senders
from .taking import Taking
from .worker import Job, Worker

logger = logging.getLogger(__name__)

NOTHING = Envelope("", b"", "")  # of a message that could not be read

INLINE_RESULT_BYTES = 1024 * 1024  # a larger body stands under a key of its own
GIVE_BACK_AFTER_S = 0.5
UNLIMITED_MS = 60_000  # how long the result of a request without a deadline is tried to be stored
_MARK_EVERY_S = 0.05
_LONG_RUN_S = 0.04
_TUNE_EVERY_TURNS = 5
STUCK_AFTER_S = 10.0
_LAST_STEPS_S = 5.0


class Server:
    """One replica's consumers, the requests in its hands, and its worker. Lives on one I/O loop."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        queue: Queue,
        store: Store,
        worker: Worker,
        handler: Handler,
        metrics: ReplicaMetrics,
        replica_id: str,
    ) -> None:
        self._may_end = not settings.embedded  # by itself, since its node starts another
        self._backend = backend.name
        self._queue = queue
        self._store = store
        self._keys = StoreKeys(settings.namespace)
        self._admission = Admission(settings.namespace, backend.name, store, replica_id)
        self._worker = worker
        self._config = backend.config
        self._handler = handler
        self._metrics = metrics
        self._senders = Senders(settings)
        self._in_hand: dict[int, set[Delivery]] = {}  # by generation
        self._jobs: set[Job] = set()
        self._cancellations = Cancellations(store, self._keys, self._give_up_cancelled)
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._taking = Taking(backend.name, queue, store, self._prefetch, self._on_delivery, self._settle_unstored)
        self._unrecorded: set[Job] = set()  # finished, and their results not stored yet
        self.served = 0

    def __repr__(self) -> str:
        return f"<Server of {self._backend}, generations {self.generations}, {self.running} in hand>"

    @property
    def running(self) -> int:
        return sum(map(len, self._in_hand.values()))

    @property
    def generations(self) -> tuple[int, ...]:
        """The queues it takes from, or still holds messages of."""
        return tuple(sorted({*self._taking.generations, *(generation for generation, held in self._in_hand.items() if held)}))

    def configure(self, config: BackendConfig) -> None:
        """Applies from the next request on."""
        self._config = config
        self._worker.configure(config)

    @property
    def _checks_all(self) -> bool:
        return self._config.delivery == "at_most_once" or self._may_be_copies

    @property
    def _may_be_copies(self) -> bool:
        """While the binding moved to a later generation, a message may have gone into both queues: until all of those are over."""
        return time.monotonic() < self._taking.moved_at + self._config.request_timeout_s

    def want(self, generations: tuple[int, ...]) -> None:
        """Takes from exactly these generations of the queue from now on."""
        self._taking.want(generations)

    async def keep_taking_forever(self, on_taken: Callable[[], None]) -> None:
        """See `Taking.keep_forever`."""
        await self._taking.keep_forever(on_taken)

    async def tune_forever(self) -> None:
        """Gives up what is late; marks runs that last, so that a timeout can say `run`, and a replica's death is blamed on what it ran;
        follows the measured run time with the prefetch."""
        for turn in itertools.count():
            await asyncio.sleep(_MARK_EVERY_S)
            self._give_up_late()
            self._check_stuck()
            self._mark_long_runs()
            if turn % _TUNE_EVERY_TURNS:
                continue
            self._taking.tune()
            processing = sum(1 for job in self._jobs if job.started)
            self._metrics.hand_over(self.running - processing, processing)

    def _settle_unstored(self) -> bool:
        """While the store is away: what has its answer and cannot store it goes back, since others may reach it; whether nothing is left.

        The results are kept and tried to be stored all the same, so that what comes round again is found answered.
        """
        for job in self._worker.withdraw():
            self._give_back(job)
        if self._config.delivery != "at_most_once":  # there nobody else may run it
            for job in self._unrecorded:
                self._requeue(job)
        return not self._unrecorded

    async def listen(self) -> None:
        """Hears of cancelled requests, until cancelled itself."""
        await self._cancellations.listen()

    async def drain(self, at_most_s: float) -> None:
        """Takes nothing new, gives back what has not started, and finishes the rest within the graceful shutdown timeout or `at_most_s`."""
        self._draining = True
        for job in self._worker.withdraw():
            self._give_back(job)
        await self._taking.stop()
        until = time.monotonic() + min(at_most_s, self._config.graceful_shutdown_timeout_s)
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for job in list(self._jobs):
            logger.warning(
                "giving back request %s of %s: still running after the graceful shutdown timeout", job.envelope.id, self._backend
            )
            if self._config.delivery == "at_most_once":  # its mark stays: it may yet start, in a batch that gathers
                self._requeue(job)
            else:
                self._give_back(job)
        if self._tasks:  # marks that are taken away, before anybody else takes the requests
            await asyncio.wait(self._tasks, timeout=_LAST_STEPS_S)
        self._metrics.hand_over(0, 0)

    async def abandon(self) -> None:
        """As if the process had died: nothing new is taken, and what is in its hands goes back. Nothing is left to do after `drain`."""
        self._draining = True
        self._worker.withdraw()
        self._jobs.clear()
        await self._taking.stop()
        for task in self._tasks:
            task.cancel()
        for held in self._in_hand.values():
            while held:
                held.pop().requeue()

    def _prefetch(self) -> int:
        config, is_async = self._config, self._handler.is_async
        limit = config.concurrency(is_async)
        batch_size = (config.max_batch_size or 1) if self._handler.accepts_batch else 0
        can_run = slots(limit, is_async=is_async, sync_threads=config.sync_threads, batch_size=batch_size)
        return prefetch(can_run, limit, self._worker.run_s)

    def _mark_long_runs(self) -> None:
        now = time.monotonic()
        for job in self._jobs:
            if job.started and not job.marked and now - job.started > _LONG_RUN_S:
                job.marked = True
                self._admission.mark_soon(job.envelope)

    async def mark_suspects(self, jobs: Sequence[Job]) -> None:
        """Before a run of what was delivered before: whether it kills its replica at once must be known afterwards."""
        for job in jobs:
            if job.suspect and not job.marked:
                job.marked = True
                await self._admission.mark(job.envelope)

    # Giving up.

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._jobs if job.deadline <= now and job.given_up is None]:
            self._give_up(job, late_result("run" if job.started else "queue"))

    def _check_stuck(self) -> None:
        """Raises BackendFailed for a call that nobody wants and that goes on after the backend's own time: nothing else can end it."""
        if not self._may_end:
            return
        stuck_since = time.monotonic() - self._config.request_timeout_s - STUCK_AFTER_S  # no client's own clock: it must not end replicas
        for job in self._jobs:
            if job.started and job.started < stuck_since and all(member.unwanted for member in job.batch or (job,)):
                raise BackendFailed(
                    f"a call of backend {self._backend!r} goes on {STUCK_AFTER_S:g} s after request_timeout_s "
                    f"({self._config.request_timeout_s:g} s), and ends its replica: ask serve.cancelled() in it, or allow more"
                )

    def _give_up_cancelled(self) -> None:
        for job in [job for job in self._jobs if self._cancellations.names(job.envelope, job.envelope.future_id(self._backend))]:
            self._give_up(job, CANCELLED)

    def _give_up(self, job: Job, result: Result) -> None:
        """Whoever waits is told now; the slot is free when the call has ended."""
        if job.started and _is_kept(job.envelope) and job.given_up is None:
            self._record(job, result).add_done_callback(_recorded_or_not)
        self._worker.give_up(job, result)

    # Taking.

    def _on_delivery(self, generation: int, delivery: Delivery) -> None:
        if self._draining or self._taking.paused:
            return delivery.requeue()
        self._in_hand.setdefault(generation, set()).add(delivery)
        try:
            envelope = delivery.envelope()
            self._admission.check_names(envelope)
        except BadEnvelope as error:
            return self._start(self._refuse(Job(NOTHING, (generation, delivery)), error))
        header = envelope.header
        left_s = (header.deadline - self._store.now_ms()) / 1000 if header.deadline else MAX_REQUEST_TIMEOUT_S
        job = Job(envelope, (generation, delivery), time.monotonic() + left_s)
        try:
            self._senders.check(envelope)
        except BadEnvelope as error:
            return self._start(self._refuse(job, error))
        if left_s <= 0:
            self._drop(job, late_result("queue"))
        elif self._cancellations and self._cancellations.names(envelope, envelope.future_id(self._backend)):
            self._drop(job, CANCELLED)
        elif (delivery.redelivered or header.again) and self._runs_here(envelope):
            self._give_back_later(job)  # a connection was lost, and not its run: the result settles it
        elif delivery.redelivered or header.again or header.ref or not envelope.minted or self._checks_all:
            self._start(self._admit(job))
        else:
            self._run(job)  # a first delivery of an id of ours: nobody can have run it, so the store is not asked

    async def _admit(self, job: Job) -> None:
        """Looked at before it runs."""
        _, delivery = job.tag
        try:
            admitted = await self._admission.admit(
                job.envelope, self._config, redelivered=delivery.redelivered, check_copies=self._may_be_copies
            )
        except BadEnvelope as error:
            await self._refuse(job, error)
        except MQServeError as error:
            logger.warning("giving back a request of %s: %s", self._backend, error)
            self._give_back_later(job)
        else:
            if admitted is None:
                self._ack(job)
            elif isinstance(admitted, Result):
                self._finish(job, admitted)
            elif self._draining:
                self._give_back(job)
            else:
                job.envelope = admitted
                job.suspect = delivery.redelivered
                self._run(job)

    def _runs_here(self, envelope: Envelope) -> bool:
        return bool(envelope.id) and any(job.envelope.id == envelope.id for job in self._jobs)

    def _run(self, job: Job) -> None:
        self._jobs.add(job)
        self._worker.submit(job)

    def _drop(self, job: Job, result: Result) -> None:
        """It is not run any more."""
        self._metrics.dropped["cancelled" if result is CANCELLED else "late"] += 1
        self._finish(job, result)

    # Settling.

    def on_done(self, job: Job, result: Result) -> None:
        """From the worker; a job that was given back in between is the next replica's."""
        if job in self._jobs:
            self._jobs.discard(job)
            if job.unwanted and not job.started:
                return self._drop(job, job.given_up or late_result("queue"))
            self.served += 1
            if job.unwanted:  # whoever waited has been told so, and hears the same from the store
                result = job.given_up or late_result("run")
            self._metrics.done(job.envelope, result, self._store.now_ms(), job.run_s, len(job.batch) or 1)
            if (job.suspect or job.marked) and not job.envelope.id:
                self._start(self._admission.forget(job.envelope))
            self._finish(job, result)

    def _finish(self, job: Job, result: Result) -> None:
        """Stores, tells, acks."""
        envelope = job.envelope
        if envelope.header.shadow:
            self._ack(job)
        elif envelope.reply_to or len(result.body) > INLINE_RESULT_BYTES:
            self._start(self._finish_slowly(job, result))
        elif _is_kept(envelope):
            self._unrecorded.add(job)
            self._record(job, result).add_done_callback(partial(self._recorded, job))
        else:
            self._ack(job)

    def _record(self, job: Job, result: Result) -> asyncio.Future[bool]:
        envelope = job.envelope
        future_id = envelope.future_id(self._backend)
        raw = (result if envelope.attempt == 1 else msgspec.structs.replace(result, attempt=envelope.attempt)).to_bytes()
        deadline_ms = envelope.header.deadline or self._store.now_ms() + UNLIMITED_MS
        return self._store.record(Record(self._keys.future(future_id), raw, envelope.header.inbox, note_of(future_id, raw), deadline_ms))

    def _recorded(self, job: Job, done: asyncio.Future[bool]) -> None:
        self._unrecorded.discard(job)
        error = StoreUnavailable("the store was closed") if done.cancelled() else done.exception()
        if error is None:
            return self._ack(job)
        logger.warning("giving back a finished request of %s: its result could not be stored (%s)", self._backend, error)
        self._give_back_unstored(job)

    async def _finish_slowly(self, job: Job, result: Result) -> None:
        """Large results and AMQP replies, which take more than one step."""
        envelope = job.envelope
        try:
            if envelope.id and len(result.body) > INLINE_RESULT_BYTES:
                key = self._keys.body(f"{envelope.future_id(self._backend)}.result")
                await self._store.set(key, result.body, ttl_ms=RESULT_TTL_S * 1000)
                first = await self._record(job, msgspec.structs.replace(result, body=b"", ref=key))
            else:
                first = not envelope.id or await self._record(job, result)
            if envelope.reply_to:
                result = result if first else await self._admission.stored(envelope, result)
                await send_reply(self._queue, self._backend, envelope, result)
        except MQServeError as error:
            logger.warning("giving back a finished request of %s: %s", self._backend, error)
            self._give_back_unstored(job)
        else:
            self._ack(job)

    async def _refuse(self, job: Job, error: BadEnvelope) -> None:
        """Bytes that will never parse, or poison: set aside for operators, and then whoever waits is told. Not the other way round: what
        has a result is acked when it comes round again."""
        _, delivery = job.tag
        if failure := await self._set_aside(delivery, error):
            logger.warning("cannot dead-letter a message of %s yet: %s", self._backend, failure)
            return self._give_back_later(job)
        status = 500 if isinstance(error, Poison) else 422
        refusal = Result(status=status, backend=self._backend, error=ErrorInfo(type=f"mqserve.{type(error).__name__}", message=str(error)))
        try:
            if _is_kept(job.envelope):
                await self._record(job, refusal)
            if job.envelope.reply_to:
                await send_reply(self._queue, self._backend, job.envelope, refusal)
        except MQServeError as failure:
            logger.warning("cannot tell the sender of a refused message of %s: %s", self._backend, failure)
        self._ack(job)

    async def _set_aside(self, delivery: Delivery, error: BadEnvelope) -> MQServeError | None:
        """To the dead letters; what kept it from there."""
        settled: asyncio.Future[MQServeError | None] = asyncio.get_running_loop().create_future()
        logger.warning("a message of %s goes to the dead letters: %s", self._backend, error)
        self._metrics.dropped["dead letter"] += 1
        attempts = error.attempts if isinstance(error, Poison) else ()
        death = Death(str(error), attempts=attempts, died_at_ms=self._store.now_ms())
        self._queue.dead_letter(self._backend, delivery, death, telling(settled))
        return await settled

    def _ack(self, job: Job) -> None:
        generation, delivery = job.tag
        if delivery in self._in_hand[generation]:
            self._in_hand[generation].discard(delivery)
            delivery.ack()

    def _give_back(self, job: Job) -> None:
        """To the queue. Its mark goes first, where that would blame it for a death that none was, or for a run that never began."""
        self._jobs.discard(job)
        once = self._config.delivery == "at_most_once"
        if (once and not job.started and job.envelope.id) or (not once and job.marked):
            self._start(self._unmark_and_requeue(job))
        else:
            self._requeue(job)

    async def _unmark_and_requeue(self, job: Job) -> None:
        await self._unmark(job)
        self._requeue(job)

    async def _unmark(self, job: Job) -> None:
        try:
            await self._admission.unmark(job.envelope)
        except StoreUnavailable as error:
            logger.warning("a request of %s keeps a mark of a run that did not end in a death: %s", self._backend, error)

    def _give_back_unstored(self, job: Job) -> None:
        """It ran to its end: no death, whatever becomes of its result. Delivered at most once, it keeps its mark, and counts as lost."""
        if job.marked and self._config.delivery != "at_most_once":
            self._start(self._unmark(job))
        self._give_back_later(job)

    def _give_back_later(self, job: Job) -> None:
        """After a failure of broker or store: at once, it would come round again at full speed. Its slot stays taken meanwhile."""
        self._jobs.discard(job)
        asyncio.get_running_loop().call_later(GIVE_BACK_AFTER_S * (0.5 + random.random()), self._requeue, job)

    def _requeue(self, job: Job) -> None:
        generation, delivery = job.tag
        if delivery in self._in_hand[generation]:
            self._in_hand[generation].discard(delivery)
            delivery.requeue()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_kept(envelope: Envelope) -> bool:
    """Whether its result has a place to stand: fire and forget has none, and a shadow's is nobody's."""
    return bool(envelope.id) and not envelope.header.shadow


def _recorded_or_not(done: asyncio.Future[bool]) -> None:
    """The end of the run records it again, and gives the message back if that fails."""
    if not done.cancelled():
        done.exception()
