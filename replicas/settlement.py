"""Settles each delivery once: it is answered, dead-lettered or requeued. An answer stores the result, notifies the caller, then acks."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec

from ..broker.amqp_replies import send_reply
from ..broker.backoff import delays
from ..broker.dead_letters import Death
from ..broker.envelope import Envelope
from ..broker.errors import BadEnvelope, BrokerUnavailable, MQServeError, StoreUnavailable, words_of
from ..broker.failures import traceback_of
from ..broker.jobs import facts_of
from ..broker.process.printable import printable, printable_lines
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.process.tasks import Tasks, read_error
from ..broker.queue import Delivery, Queue, fate_of
from ..broker.results import BodyFile, ErrorInfo, Result, entry_of
from ..broker.store import Record, Store
from ..broker.store_keys import RESULT_TTL_S, StoreKeys
from ..controller.state.config import BackendConfig
from .admission import Admission, LostBody, Poison
from .job_ends import JobEnds
from .metrics import ReplicaMetrics
from .register import Register
from .stages import Job, KeptJob, Stage
from .takeover import behind_shown, is_kept_for_replay

logger = logging.getLogger(__name__)
T = TypeVar("T")

INLINE_RESULT_BYTES = 256 * 1024  # a larger body gets a key of its own: a script copies its arguments several times
INLINE_FOR_STRANGERS_BYTES = 1024 * 1024  # who publishes by AMQP may read the result by its key, and finds the body in it up to this size
GIVE_BACK_AFTER_S = 0.5
UNLIMITED_S = 60.0  # for a request without a deadline: how long storing its result is retried
JOB_UNLIMITED_S = 600.0  # for a job, whose run may have taken days
_CONFIRM_BUDGET_S = 10.0
_LAST_STEPS_S = 5.0
_MARKED_BUDGET_S = 1.0


class Unforeseen(BadEnvelope):
    """A bug in mqserve kept this message from being answered, twice. It becomes a dead letter, to be retried once the bug is fixed."""


class Settlement:
    """Settles the requests of one replica. Owns the tasks for that, so that a request is settled whatever its task raises."""

    def __init__(
        self,
        backend: str,
        queue: Queue,
        store: Store,
        keys: StoreKeys,
        admission: Admission,
        metrics: ReplicaMetrics,
        register: Register,
        job_ends: JobEnds,
    ) -> None:
        self._backend = backend
        self._job_ends = job_ends
        self._queue = queue
        self._store = store
        self._keys = keys
        self._admission = admission
        self._metrics = metrics
        self._register = register
        self._tasks = Tasks()
        self._marked: set[asyncio.Future[Any]] = set()  # what is under way for requests that have a start mark
        self._unanswered, self._undead, self._set_aside_words = RateLimitedLog(logger), RateLimitedLog(logger), RateLimitedLog(logger)
        self._bugs = RateLimitedLog(logger, logging.ERROR)
        self.at_most_once = False
        self._result_ttl_ms = 0  # 0: as any other

    def __repr__(self) -> str:
        return f"<Settlement of {self._backend}, {len(self._tasks)} under way>"

    def configure(self, config: BackendConfig) -> None:
        self.at_most_once = config.delivery == "at_most_once"
        self._job_ends.config = config
        self._result_ttl_ms = int((config.result_ttl_s or 0) * 1000)

    # Answering.

    def answer(self, job: Job, result: Result) -> None:
        """Stores the result, notifies the caller and acks. Requeues the message if the result cannot be stored in time."""
        envelope = job.envelope
        job.move(Stage.RECORDING)
        if envelope.header.shadow:
            self.ack(job)
        elif envelope.reply_to or job.mark or _is_large(envelope, result.body):
            self._await_for(job, self.start(job, self._answer_slowly(job, result)))
        elif envelope.id:
            self._store.record_then(self._record_of(job, result), partial(self._recorded, job))
        else:
            self._answered(job)

    def _await_for(self, job: Job, work: asyncio.Future[Any]) -> None:
        if job.mark:
            self._marked.add(work)
            work.add_done_callback(self._marked.discard)

    async def marked_recorded(self) -> None:
        """Waits, for a moment at most, until the results of finished runs that have a start mark are stored: if this replica died before,
        its death would count as an attempt of them."""
        if self._marked:
            await asyncio.wait(self._marked, timeout=_MARKED_BUDGET_S)

    def record(self, job: Job, result: Result) -> asyncio.Future[bool]:
        """Records the result of a request that has an id; see `Store.record`. That of a job is not retried here."""
        if isinstance(job, KeptJob):
            return self._job_ends.record(job, result)
        return self._store.record(self._record_of(job, result))

    def record_early(self, job: Job, result: Result) -> None:
        """Records a result before the run ends. A failed write does no harm: the end of the run records the result again, and requeues the
        message if that fails."""
        self.record(job, result).add_done_callback(read_error)

    def _record_of(self, job: Job, result: Result) -> Record:
        envelope = job.envelope
        future_id = envelope.future_id(self._backend)
        raw = (result if envelope.attempt == 1 else msgspec.structs.replace(result, attempt=envelope.attempt)).to_bytes()
        deadline_ms = envelope.header.deadline or self._store.now_ms() + int(UNLIMITED_S * 1000)
        return Record(self._keys.future(future_id), raw, envelope.header.inbox, entry_of(future_id, raw), deadline_ms, self._result_ttl_ms)

    def _recorded(self, job: Job, outcome: bool | Exception) -> None:
        try:
            if not isinstance(outcome, Exception):
                self._answered(job)
            elif isinstance(outcome, MQServeError):
                self._cannot_answer(job, outcome)
            else:
                self.fail(job, outcome)
        except Exception as unforeseen:
            self.fail(job, unforeseen)

    async def _answer_slowly(self, job: Job, result: Result) -> None:
        """Answers with a large result or an AMQP reply, which take more than one step, or answers a job, or a request that has a start
        mark, whose result others wait for."""
        envelope = job.envelope
        if job.flow is not None and job.flow.shown:  # such a request was delivered before, and so has a start mark
            result = msgspec.structs.replace(behind_shown(result), frames=job.flow.sent)
        try:
            if isinstance(job, KeptJob):
                if await self._goes_on(job, result):
                    return self.ack(job)
                result = await self._job_ends.filed(job, result)
            if envelope.id:
                stored = await self._stored(job, result)
                if stored is None and isinstance(job, KeptJob):
                    return self.ack(job)  # another run has begun since then: it answers
                result = stored or result
            if envelope.reply_to:
                chunks = job.flow.sent if job.flow is not None and job.flow.is_reply else None
                send = partial(send_reply, self._queue, self._backend, envelope, result, _CONFIRM_BUDGET_S, chunks)
                await _insist(send, self._until(job) if isinstance(job, KeptJob) else job.deadline)
        except MQServeError as error:
            self._cannot_answer(job, error)
        else:
            self._answered(job)

    async def _goes_on(self, job: KeptJob, result: Result) -> bool:
        """Whether the job has failed and another run of it was arranged, so that this is no end. One that has had all its attempts becomes
        a dead letter before its result is recorded, since a message that has a result is acked."""
        until = self._until(job)
        if (pause_s := self._job_ends.pause_s(job, result)) is not None:
            await self._job_ends.try_again(job, result, pause_s, lambda act: _insist(act, until))
            return True
        self._job_ends.tell(job)  # before the reply
        death = await _insist(lambda: self._job_ends.death_of(job, result), until)
        if death is not None and (failure := await self._set_aside(job.delivery, death)):
            raise failure
        return False

    def _until(self, job: Job) -> float:
        """Until when an answer is retried while broker or store are away."""
        if isinstance(job, KeptJob):
            return time.monotonic() + JOB_UNLIMITED_S
        return job.deadline if job.envelope.header.deadline else time.monotonic() + UNLIMITED_S

    async def _stored(self, job: Job, result: Result) -> Result | None:
        """Stores the result and returns the one that counts: another run of the same request may have been first. None if that one's is not
        there (yet, or any more)."""
        envelope, body, until = job.envelope, result.body, self._until(job)
        if not _is_large(envelope, body):
            first = await _insist(lambda: self.record(job, result), until)
        else:
            key = self._keys.result_body(envelope.future_id(self._backend))
            first = await _insist(lambda: self._put_body(job, key, body), until)
            small = msgspec.structs.replace(result, body=b"", ref=key)
            first = first and await _insist(lambda: self.record(job, small), until)
        if result.file is not None and not first:
            await self._drop_file(envelope.future_id(self._backend), result.file)
        return result if first or not envelope.reply_to else await _insist(lambda: self._admission.stored(envelope), until)

    async def _drop_file(self, future_id: str, file: BodyFile) -> None:
        """Removes the file of a result that does not count, unless that which counts has the same one. Else it goes when it expires."""
        with suppress(MQServeError):
            raw = await self._store.get(self._keys.future(future_id))
            if raw is not None and Result.from_bytes(raw).file != file:
                await self._store.files.drop(future_id, file)

    async def _put_body(self, job: Job, key: str, body: bytes) -> bool:
        """Writes the body of a large result, and returns True; returns False if another run was first. All runs share the key, and that
        one's body may have been read and deleted already: nobody would delete this one."""
        may_be_second = job.mark or job.delivery.redelivered or job.stage is Stage.RETURNED
        if may_be_second and await self._store.get(self._keys.future(job.envelope.future_id(self._backend))) is not None:
            return False
        kept_ms = self._job_ends.result_ttl_ms(job.envelope) if isinstance(job, KeptJob) else self._result_ttl_ms
        await self._store.set(key, body, ttl_ms=kept_ms or RESULT_TTL_S * 1000)
        return True

    def _answered(self, job: Job) -> None:
        """Acks. Unless the id is minted, and so used only once, it also deletes the counters, so that the next use of the id starts afresh.
        With at-most-once delivery they stay, so that the id never runs twice. Those of a message that is kept for a replay go, too, since
        they would stay long. The record of a job counts for itself."""
        if (job.delivery.redelivered or job.mark) and self._leaves_counters(job):
            self._await_for(job, self.start(job, self._admission.forget(job.envelope)))
        self.ack(job)

    def _leaves_counters(self, job: Job) -> bool:
        envelope = job.envelope
        if self.at_most_once and envelope.id:
            return False
        return not (envelope.minted or _is_recorded(job)) or is_kept_for_replay(envelope)

    def streamed(self, job: Job) -> None:
        """Acks a request whose result the store has behind the chunks of its answer."""
        self._answered(job)

    def _cannot_answer(self, job: Job, error: BaseException) -> None:
        self._unanswered.say(f"giving back finished requests of {self._backend}: their results could not be stored or sent ({error})")
        self.give_back(job, later=True)

    def ack(self, job: Job, *, body_stays: bool = False) -> None:
        """Acks the message and, unless `body_stays`, deletes a body that travelled by reference. That of a job stays for retries."""
        stage = job.stage
        if stage is Stage.SETTLED:
            return
        self._register.settle(job)
        if stage is not Stage.RETURNED:
            job.delivery.ack()
            if job.envelope.header.ref and not (body_stays or isinstance(job, KeptJob)):
                self._store.drop_soon(job.envelope.header.ref)

    # Setting aside.

    async def refuse(self, job: Job, error: BadEnvelope) -> None:
        """Dead-letters a message that will never parse or is poison, then tells its sender. In this order, since a redelivered message
        that has a result is acked, and would never reach the dead letters."""
        if job.envelope.header.shadow and isinstance(error, LostBody):
            return self.ack(job)  # redelivered after its run had deleted the body
        job.move(Stage.LEAVING)
        death = Death(str(error), attempts=error.attempts if isinstance(error, Poison) else (), died_at_ms=self._store.now_ms())
        if failure := await self._set_aside(job.delivery, death):
            self._undead.say(
                f"messages of {self._backend} that are to be dead letters go back to the queue, and come round again: {failure}"
            )
            return self._requeue_soon(job, later=True)
        status = 500 if isinstance(error, Poison | LostBody | Unforeseen) else 422
        refusal = Result(status=status, backend=self._backend, error=ErrorInfo(type=f"mqserve.{type(error).__name__}", message=str(error)))
        try:
            if is_kept(job.envelope):
                await _insist(lambda: self.record(job, refusal), time.monotonic() + (UNLIMITED_S if isinstance(job, KeptJob) else 0))
            if job.envelope.reply_to:
                await send_reply(self._queue, self._backend, job.envelope, refusal, _CONFIRM_BUDGET_S)
        except Exception as failure:  # any kind: it is a dead letter, and must not become a second one
            logger.warning("cannot tell the sender of a refused message of %s: %s", self._backend, words_of(failure))
        self.ack(job, body_stays=True)  # a retry of the dead letter needs the body

    async def _set_aside(self, delivery: Delivery, death: Death) -> MQServeError | None:
        """Publishes the message to the dead letters. Returns the error if that failed."""
        failure = await fate_of(partial(self._queue.dead_letter, self._backend, delivery, death), _CONFIRM_BUDGET_S)
        if failure is None:
            self._metrics.dropped["dead letter"] += 1
            why = printable(death.reason)
            self._set_aside_words.say(
                f"a message of {self._backend} is a dead letter (`mqserve dead list {self._backend}` shows all): {why}"
            )
        return failure

    # Giving back.

    def give_back(self, job: Job, *, later: bool = False, mark_stays: bool = False) -> None:
        """Requeues the message for other replicas. Removes its start mark first, or its run would count as an attempt though the replica
        lives. Of a request that was admitted and has not started it notes that (NOT_STARTED), so that its next delivery does not count
        as a redelivery. With at-most-once delivery it notes it of each that has not started, and the mark of one that has started stays,
        so that it never runs again. The lease of a job ends, so that another replica may begin at once.

        `later` requeues after a pause, for failures of broker or store: at once, the message would be redelivered at full speed. Its slot
        stays taken meanwhile.
        """
        if job.stage is Stage.RETURNED:
            return self._register.settle(job)
        if job.stage is Stage.SETTLED:
            return
        waited = job.stage is Stage.ADMITTED and not job.suspect and bool(job.envelope.id) and not self._store.health.trouble
        job.move(Stage.LEAVING)
        if isinstance(job, KeptJob) and job.is_recorded:
            self._give_back_job(job, later)
        elif self.at_most_once and job.envelope.id and not job.started and not mark_stays:
            self.start(job, self._requeue_unstarted(job, later))
        elif job.mark and not mark_stays and not self.at_most_once:
            self.start(job, self._unmark_and_requeue(job, later))
        elif waited and not mark_stays:
            self.start(job, self._requeue_unstarted(job, later))
        else:
            self._requeue_soon(job, later)

    def give_back_unstored(self) -> bool:
        """Requeues the messages whose results cannot be stored, since other replicas may reach the store. Returns whether no result is
        left to store.

        This replica still retries to store the results, so that a redelivered message has its result already.
        """
        recording = self._register.at(Stage.RECORDING)
        if not self.at_most_once:  # with at-most-once delivery no other replica may run them
            for job in recording:
                job.move(Stage.RETURNED)
                job.delivery.requeue()
        return not recording and not self._register.at(Stage.RETURNED)

    def _give_back_job(self, job: KeptJob, later: bool) -> None:
        """Ends its lease; the run is no attempt then. With at-most-once delivery a run that has started stays in the record."""
        if job.begun and not (self.at_most_once and job.started):
            self.start(job, self._end_lease_and_requeue(job, later))
        else:
            self._requeue_soon(job, later)

    async def _end_lease_and_requeue(self, job: KeptJob, later: bool) -> None:
        try:
            facts = facts_of(self._backend, job.envelope, self._store.now_ms())
            await self._store.jobs.give_back(job.envelope.future_id(self._backend), job.mark, facts)
        except StoreUnavailable as error:
            logger.warning("a job of %s goes back before its lease has ended, for which the next replica waits: %s", self._backend, error)
        self._requeue_soon(job, later)

    async def _unmark_and_requeue(self, job: Job, later: bool) -> None:
        try:
            await self._admission.unmark(job.envelope, job.mark)
        except StoreUnavailable as error:
            logger.warning("a request of %s keeps a mark of a run that did not end in a death: %s", self._backend, error)
        self._requeue_soon(job, later)

    async def _requeue_unstarted(self, job: Job, later: bool) -> None:
        try:
            came_before = self.at_most_once and (job.delivery.redelivered or job.envelope.header.again)
            await self._admission.give_back(job.envelope, job.mark, came_before=came_before)
        except StoreUnavailable as error:
            effect = "is answered 502" if self.at_most_once else "counts as redelivered"
            logger.warning("a request of %s goes back without word that it was not started, and %s: %s", self._backend, effect, error)
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

    # Unforeseen exceptions.

    def start(self, job: Job, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` as a task that ends with this replica. If it raises an exception, `fail` settles the job."""
        return self._tasks.start(self._own(job, work))

    async def _own(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self.fail(job, error)

    def fail(self, job: Job, error: BaseException) -> None:
        """Settles the job after an exception that is a bug of ours: the message is requeued once, perhaps for another replica; if that run
        fails too, it becomes a dead letter and its sender is told."""
        trace = printable_lines(traceback_of(error).rstrip())
        self._bugs.say(f"a request of {self._backend} met a bug in mqserve, please report it, and is tried once more:\n{trace}")
        try:
            if job.stage is Stage.LEAVING:  # it cannot move there again
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
        """Waits for the tasks under way: start marks must be removed before other replicas get the requests."""
        await self._tasks.wait(_LAST_STEPS_S)

    def abandon(self) -> None:
        """Cancels the tasks and requeues all messages, as if the process had died."""
        self._tasks.cancel()
        for job in self._register:
            if job.stage is Stage.RETURNED:
                self._register.settle(job)
            else:
                self._requeue(job)


def is_kept(envelope: Envelope) -> bool:
    """Whether the result is stored: not for a request without an id (fire and forget), and not for a shadow, whose result nobody reads."""
    return bool(envelope.id) and not envelope.header.shadow


def _is_recorded(job: Job) -> bool:
    """Whether it is a job of which the store has a record."""
    return isinstance(job, KeptJob) and job.is_recorded


def _is_large(envelope: Envelope, body: bytes) -> bool:
    """Whether the body of the request's result gets a key of its own."""
    return len(body) > (INLINE_RESULT_BYTES if envelope.header.origin else INLINE_FOR_STRANGERS_BYTES)


async def _insist(act: Callable[[], Awaitable[T]], until: float) -> T:
    """Retries `act` while broker or store are away, until a monotonic time: a finished request should not run again because of that."""
    pauses = delays()
    while True:
        try:
            return await act()
        except (BrokerUnavailable, StoreUnavailable):
            if time.monotonic() > until:
                raise
        await asyncio.sleep(next(pauses))
