"""What a delivery ends in, once: answered, set aside or given back. In order: store the result, tell who waits, ack."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import msgspec

from ..broker.backoff import delays
from ..broker.dead_letters import Death
from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope, BrokerUnavailable, MQServeError, StoreUnavailable, words_of
from ..broker.process.printable import printable
from ..broker.process.tasks import Tasks
from ..broker.queue import Delivery, Queue, fate_of
from ..broker.results import ErrorInfo, Result, entry_of
from ..broker.store import Record, Store
from ..broker.store_keys import RESULT_TTL_S, StoreKeys
from ..controller.state.config import BackendConfig
from .admission import Admission, LostBody, Poison
from .amqp_replies import send_reply
from .job import Job, Stage
from .metrics import ReplicaMetrics
from .register import Register

logger = logging.getLogger(__name__)
T = TypeVar("T")

INLINE_RESULT_BYTES = 1024 * 1024  # a larger body stands under a key of its own
GIVE_BACK_AFTER_S = 0.5
UNLIMITED_S = 60.0  # how long the result of a request without a deadline is tried to be stored
_CONFIRM_BUDGET_S = 10.0
_LAST_STEPS_S = 5.0


class Unforeseen(BadEnvelope):
    """A bug in mqserve kept this message from being answered, twice: it is set aside, for whoever mends that."""


class Settlement:
    """The ends that the requests of one replica come to. Owns the tasks that this takes: a request is settled whatever its task raises."""

    def __init__(
        self,
        backend: str,
        queue: Queue,
        store: Store,
        keys: StoreKeys,
        admission: Admission,
        metrics: ReplicaMetrics,
        register: Register,
    ) -> None:
        self._backend = backend
        self._queue = queue
        self._store = store
        self._keys = keys
        self._admission = admission
        self._metrics = metrics
        self._register = register
        self._tasks = Tasks()
        self.at_most_once = False

    def __repr__(self) -> str:
        return f"<Settlement of {self._backend}, {len(self._tasks)} under way>"

    def configure(self, config: BackendConfig) -> None:
        self.at_most_once = config.delivery == "at_most_once"

    # Answering.

    def answer(self, job: Job, result: Result) -> None:
        """Stores, tells, acks; gives back what cannot be stored in its time."""
        envelope = job.envelope
        job.move(Stage.RECORDING)
        if envelope.header.shadow:
            self.ack(job)
        elif envelope.reply_to or len(result.body) > INLINE_RESULT_BYTES:
            self.start(job, self._answer_slowly(job, result))
        elif envelope.id:
            self.record(job, result).add_done_callback(partial(self._recorded, job))
        else:
            self._answered(job)

    def record(self, job: Job, result: Result) -> asyncio.Future[bool]:
        """See `Store.record`; of a request with an id."""
        envelope = job.envelope
        future_id = envelope.future_id(self._backend)
        raw = (result if envelope.attempt == 1 else msgspec.structs.replace(result, attempt=envelope.attempt)).to_bytes()
        deadline_ms = envelope.header.deadline or self._store.now_ms() + int(UNLIMITED_S * 1000)
        return self._store.record(Record(self._keys.future(future_id), raw, envelope.header.inbox, entry_of(future_id, raw), deadline_ms))

    def _recorded(self, job: Job, done: asyncio.Future[bool]) -> None:
        error = StoreUnavailable("the store was closed") if done.cancelled() else done.exception()
        try:
            if error is None:
                self._answered(job)
            elif isinstance(error, MQServeError):
                self._cannot_answer(job, error)
            else:
                self.fail(job, error)
        except Exception as unforeseen:
            self.fail(job, unforeseen)

    async def _answer_slowly(self, job: Job, result: Result) -> None:
        """Large results and AMQP replies, which take more than one step."""
        envelope = job.envelope
        try:
            if envelope.id:
                result = await self._stored(job, result)
            if envelope.reply_to:
                await _insist(partial(send_reply, self._queue, self._backend, envelope, result, _CONFIRM_BUDGET_S), job.deadline)
        except MQServeError as error:
            self._cannot_answer(job, error)
        else:
            self._answered(job)

    async def _stored(self, job: Job, result: Result) -> Result:
        """The result that counts: another run of the same request may have been first."""
        envelope, body = job.envelope, result.body
        until = job.deadline if envelope.header.deadline else time.monotonic() + UNLIMITED_S
        kept = result
        if len(body) > INLINE_RESULT_BYTES:
            key = self._keys.result_body(envelope.future_id(self._backend))
            await _insist(lambda: self._store.set(key, body, ttl_ms=RESULT_TTL_S * 1000), until)
            kept = msgspec.structs.replace(result, body=b"", ref=key)
        first = await self.record(job, kept)
        return result if first else await _insist(lambda: self._admission.stored(envelope, result), until)

    def _answered(self, job: Job) -> None:
        """A minted id is used once; of any other nothing may be held against its next use, but that it was delivered at most once."""
        if (job.redelivered or job.mark) and not job.envelope.minted and not (self.at_most_once and job.envelope.id):
            self.start(job, self._admission.forget(job.envelope))
        self.ack(job)

    def _cannot_answer(self, job: Job, error: BaseException) -> None:
        logger.warning("giving back a finished request of %s: its result could not be stored or sent (%s)", self._backend, error)
        self.give_back(job, later=True)

    def ack(self, job: Job, *, body_stays: bool = False) -> None:
        """A body that travelled by reference goes with it, since nobody asks for it any more."""
        stage = job.stage
        if stage is Stage.SETTLED:
            return
        self._register.settle(job)
        if stage is not Stage.RETURNED:
            job.delivery.ack()
            if job.envelope.header.ref and not body_stays:
                self._store.drop_soon(job.envelope.header.ref)

    # Setting aside.

    async def refuse(self, job: Job, error: BadEnvelope) -> None:
        """Bytes that will never parse, or poison: set aside for operators, and then whoever waits is told. Not the other way round: what
        has a result is acked when it comes round again."""
        if job.envelope.header.shadow and isinstance(error, LostBody):
            return self.ack(job)  # it came twice, and ran once
        job.move(Stage.LEAVING)
        if failure := await self._set_aside(job.delivery, error):
            logger.warning("cannot dead-letter a message of %s yet: %s", self._backend, failure)
            return self._requeue_soon(job, later=True)
        status = 500 if isinstance(error, Poison | LostBody | Unforeseen) else 422
        refusal = Result(status=status, backend=self._backend, error=ErrorInfo(type=f"mqserve.{type(error).__name__}", message=str(error)))
        try:
            if is_kept(job.envelope):
                await self.record(job, refusal)
            if job.envelope.reply_to:
                await send_reply(self._queue, self._backend, job.envelope, refusal, _CONFIRM_BUDGET_S)
        except Exception as failure:  # of whatever kind: it stands among the dead letters, and is not to come there twice
            logger.warning("cannot tell the sender of a refused message of %s: %s", self._backend, words_of(failure))
        self.ack(job, body_stays=True)  # it may be tried again

    async def _set_aside(self, delivery: Delivery, error: BadEnvelope) -> MQServeError | None:
        """To the dead letters; what kept it from there."""
        logger.warning("a message of %s goes to the dead letters: %s", self._backend, printable(str(error)))
        attempts = error.attempts if isinstance(error, Poison) else ()
        death = Death(str(error), attempts=attempts, died_at_ms=self._store.now_ms())
        failure = await fate_of(partial(self._queue.dead_letter, self._backend, delivery, death), _CONFIRM_BUDGET_S)
        if failure is None:
            self._metrics.dropped["dead letter"] += 1
        return failure

    # Giving back.

    def give_back(self, job: Job, *, later: bool = False, mark_stays: bool = False) -> None:
        """To the queue, for others. Its mark goes first: it would blame the request for a death that none was, or for a run that never
        began. Delivered at most once, a request that did not start takes word of that along, and a run that did begin is never begun
        again.

        `later`: after a failure of broker or store, since it would come round again at full speed; its slot stays taken meanwhile.
        """
        if job.stage is Stage.RETURNED:
            return self._register.settle(job)
        if job.stage is Stage.SETTLED:
            return
        job.move(Stage.LEAVING)
        if self.at_most_once and job.envelope.id and not job.started and not mark_stays:
            self.start(job, self._requeue_unstarted(job, later))
        elif job.mark and not mark_stays and not self.at_most_once:
            self.start(job, self._unmark_and_requeue(job, later))
        else:
            self._requeue_soon(job, later)

    def give_back_unstored(self) -> bool:
        """While the store is away: what has its answer and cannot store it, since others may reach it; whether nothing is left.

        The results are kept and tried to be stored all the same, so that what comes round again is found answered.
        """
        recording = self._register.at(Stage.RECORDING)
        if not self.at_most_once:  # there nobody else may run it
            for job in recording:
                job.move(Stage.RETURNED)
                job.delivery.requeue()
        return not recording and not self._register.at(Stage.RETURNED)

    async def _unmark_and_requeue(self, job: Job, later: bool) -> None:
        try:
            await self._admission.unmark(job.envelope, job.mark)
        except StoreUnavailable as error:
            logger.warning("a request of %s keeps a mark of a run that did not end in a death: %s", self._backend, error)
        self._requeue_soon(job, later)

    async def _requeue_unstarted(self, job: Job, later: bool) -> None:
        try:
            came_before = job.delivery.redelivered or job.envelope.header.again
            await self._admission.give_back(job.envelope, job.mark, came_before=came_before)
        except StoreUnavailable as error:
            logger.warning("a request of %s goes back without word that it was not started, and is answered 502: %s", self._backend, error)
        self._requeue_soon(job, later)

    def _requeue_soon(self, job: Job, later: bool) -> None:
        if later:
            asyncio.get_running_loop().call_later(GIVE_BACK_AFTER_S * (0.5 + random.random()), self._requeue, job)
        else:
            self._requeue(job)

    def _requeue(self, job: Job) -> None:
        if job.stage is not Stage.SETTLED:
            self._register.settle(job)
            job.delivery.requeue()

    # What nobody foresaw.

    def start(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """As a task that ends with this replica, and settles the job whatever it raises."""
        self._tasks.start(self._own(job, work))

    async def _own(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self.fail(job, error)

    def fail(self, job: Job, error: BaseException) -> None:
        """After an exception that is a bug of ours. The request is tried once more, perhaps by another replica; if that fails too, it is
        set aside, and its sender is told."""
        logger.error("request %s of %s met a bug in mqserve, please report it", printable(job.envelope.id), self._backend, exc_info=error)
        try:
            if job.stage is Stage.LEAVING:  # as far as that went
                self._requeue_soon(job, later=True)
            elif job.delivery.redelivered and job.stage in (Stage.HELD, Stage.ADMITTED, Stage.RUNNING, Stage.RECORDING):
                self.start(job, self.refuse(job, Unforeseen(f"a bug in mqserve kept it from being answered: {words_of(error)}")))
            else:
                self.give_back(job, later=True)
        except Exception:
            logger.exception("a request of %s goes back after a second bug", self._backend)
            self._requeue(job)

    # The end.

    async def last_steps(self) -> None:
        """Marks that are taken away, before anybody else takes the requests."""
        await self._tasks.wait(_LAST_STEPS_S)

    def abandon(self) -> None:
        """As if the process had died."""
        self._tasks.cancel()
        for job in self._register:
            if job.stage is Stage.RETURNED:
                self._register.settle(job)
            else:
                self._requeue(job)


def is_kept(envelope: Envelope) -> bool:
    """Whether its result has a place to stand: fire and forget has none, and a shadow's is nobody's."""
    return bool(envelope.id) and not envelope.header.shadow


async def _insist(act: Callable[[], Awaitable[T]], until: float) -> T:
    """Tries again as long as broker or store are away, until a monotonic time: what was run is not to run again for that."""
    pauses = delays()
    while True:
        try:
            return await act()
        except (BrokerUnavailable, StoreUnavailable):
            if time.monotonic() > until:
                raise
        await asyncio.sleep(next(pauses))
