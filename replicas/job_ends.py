"""How the run of a job ends: with the job's result, or in order to be tried again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import msgspec

from ..broker.amqp_replies import reply_of_event
from ..broker.dead_letters import Attempt as LostRun
from ..broker.dead_letters import Death
from ..broker.envelope import Envelope, JobHead
from ..broker.errors import MQServeError
from ..broker.jobs import JOB_RESULT_TTL_S, MAX_RESULT_TTL_S, Attempt, JobEnd, JobRecord, JobState, facts_of, state_of
from ..broker.process.printable import printable
from ..broker.queue import Queue, fate_of
from ..broker.result_files import MAX_IN_STORE, RECORDED_WITHIN_MS, NotWritten
from ..broker.results import ErrorInfo, Outcome, Phase, Result, entry_of
from ..broker.store import Store, recorded
from ..controller.state.config import BackendConfig
from ..controller.state.retries import is_exhausted, next_pause_s
from .stages import KeptJob, Stage

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ERROR = 500  # characters of an error in the history of a job
_CONFIRM_BUDGET_S = 10.0
_IN_A_FILE = "file"  # the `ref` of a body that is no value in the store

Insist = Callable[[Callable[[], Awaitable[T]]], Awaitable[T]]


class JobEnds:
    """The ends of the jobs of one replica that have a record. `config` is replaced when the replica gets another one."""

    def __init__(self, backend: str, store: Store, queue: Queue, config: BackendConfig) -> None:
        self._backend = backend
        self._store = store
        self._queue = queue
        self.config = config

    def __repr__(self) -> str:
        return f"<JobEnds of {self._backend}>"

    # With a result.

    def record(self, job: KeptJob, result: Result) -> asyncio.Future[bool]:
        """Records the result, and with it the end of the job; as `Store.record`, but tries once. What the handler has said before goes
        first."""
        self.tell(job)
        return recorded(self._store.jobs.end_then, self._end_of(job, result))

    def tell(self, job: KeptJob, *, is_last: bool = True) -> None:
        """Passes on what the handler has said since the last time; `is_last` before the end. Nobody waits for that, and it may be lost."""
        if not job.words:
            return
        future_id = job.envelope.future_id(self._backend)
        for event in job.words.take(self._store.now_ms(), is_last=is_last):
            if job.begun:
                self._store.jobs.note(future_id, job.mark, event)
            if job.tells_caller and not job.is_stale:
                with suppress(MQServeError):
                    self._queue.reply(reply_of_event(job.envelope, event), job.envelope.reply_to, _may_be_lost)

    async def filed(self, job: KeptJob, result: Result) -> Result:
        """Returns the result with its body in a file, if it is too large for the store; or an error, if it cannot be written."""
        if len(result.body) <= MAX_IN_STORE or not job.is_recorded:
            return result
        future_id = job.envelope.future_id(self._backend)
        expires_ms = self._store.now_ms() + RECORDED_WITHIN_MS + self.result_ttl_ms(job.envelope)
        try:
            file = await self._store.files.put(future_id, result.body, expires_ms)
        except NotWritten as error:
            logger.error("the result of job %s of %s is lost: %r", printable(job.envelope.id), self._backend, error.__cause__)
            return Result(status=500, backend=self._backend, error=ErrorInfo(type="mqserve.NotWritten", message=str(error)))
        return msgspec.structs.replace(result, body=b"", ref=_IN_A_FILE, file=file)

    def _end_of(self, job: KeptJob, result: Result) -> JobEnd:
        envelope = job.envelope
        head, future_id = envelope.header.job or JobHead(), envelope.future_id(self._backend)
        raw = (result if envelope.attempt == 1 else msgspec.structs.replace(result, attempt=envelope.attempt)).to_bytes()
        return JobEnd(
            id=future_id,
            result=raw,
            note=entry_of(future_id, raw),
            state=_state_of(result),
            status=result.status,
            backend=self._backend,
            ended_ms=self._store.now_ms(),
            result_ttl_ms=self.result_ttl_ms(envelope),
            token=job.mark if job.begun else b"",
            inbox=envelope.header.inbox,
            endpoint=envelope.header.meta.endpoint,
            callback=head.callback,
            stage=head.stage,
            member=head.member,
        )

    def result_ttl_ms(self, envelope: Envelope) -> int:
        asked = envelope.header.job.result_ttl_s if envelope.header.job is not None else 0
        return int(min(asked or self.config.result_ttl_s or JOB_RESULT_TTL_S, MAX_RESULT_TTL_S) * 1000)

    # To be tried again.

    def pause_s(self, job: KeptJob, result: Result) -> float | None:
        """Returns after how many seconds the job is tried again, None if this is its end. Whoever waits at a queue for the reply gets the
        first one."""
        if not _has_failed(job, result) or job.envelope.reply_to:
            return None
        return next_pause_s(self.config.retry, job.error_names, job.again_after_s, _tries(job.envelope))

    async def try_again(self, job: KeptJob, result: Result, pause_s: float, insist: Insist[bool]) -> None:
        """Publishes the job for another run, after a pause. Returns without that if another run has the lease, or the job has a result.
        Raises MQServeError.

        A replica that dies in between leaves the message unacked, and perhaps a second one: whichever comes first runs.
        """
        assert result.error is not None
        self.tell(job)
        envelope, now_ms = job.envelope, self._store.now_ms()
        again_ms = now_ms + int(pause_s * 1000)
        error = f"{result.error.type}: {result.error.message}"[:MAX_ERROR]
        attempt = Attempt(envelope.attempt, ended_ms=now_ms, error=error, again_ms=again_ms)
        facts = facts_of(self._backend, envelope, now_ms)
        future_id = envelope.future_id(self._backend)
        is_taken = await insist(lambda: self._store.jobs.try_again(future_id, job.mark, attempt, facts))
        if is_taken and job.stage is not Stage.RETURNED:  # that one's message is in the queue already, and is its next try
            again = _for_another_try(envelope, again_ms, now_ms)
            failure = await fate_of(partial(self._queue.publish_later, self._backend, again, pause_s), _CONFIRM_BUDGET_S)
            if failure is not None:
                raise failure
            told = printable(envelope.id)
            logger.info("job %s of %s has failed (%s) and is tried again in %.1f s", told, self._backend, printable(error), pause_s)

    async def death_of(self, job: KeptJob, result: Result) -> Death | None:
        """Returns the death of a job that has had all its attempts, for the dead letters; None for one that was not tried again anyway.
        Raises StoreUnavailable."""
        tries = _tries(job.envelope)
        if not _has_failed(job, result) or not is_exhausted(self.config.retry, job.error_names, job.again_after_s, tries):
            return None
        assert result.error is not None
        record = await self._store.jobs.read(job.envelope.future_id(self._backend))
        if record is not None and record.attempts and record.attempts[-1].number != job.envelope.attempt:
            return None  # another run has begun since then, and its end counts
        error = f"{result.error.type}: {result.error.message}"
        runs = history(record)
        if runs:
            runs[-1] = msgspec.structs.replace(runs[-1], ended=error[:MAX_ERROR])
        reason = f"it has failed {tries + 1} times, and is not tried again (retry): {error}"
        return Death(reason, result.error.traceback, tuple(runs), self._store.now_ms())


def _may_be_lost(error: MQServeError | None) -> None:
    """Does nothing: the caller's queue may be full or gone."""


def history(record: JobRecord | None) -> list[LostRun]:
    """Returns the runs of a job as a dead letter has them."""
    lost = "its replica was lost before there was a result"
    attempts = record.attempts if record is not None else ()
    return [LostRun(attempt.replica, attempt.started_ms, attempt.error if attempt.ended_ms else lost) for attempt in attempts]


def _state_of(result: Result) -> JobState:
    never_ran = result.outcome is Outcome.LATE and result.error is not None and result.error.phase is Phase.QUEUE
    return JobState.EXPIRED if never_ran else state_of(result)


def _has_failed(job: KeptJob, result: Result) -> bool:
    """Whether the result is an exception of the handler."""
    is_its = result.error is not None and bool(job.error_names) and result.error.type == job.error_names[0]
    return is_its and job.given_up is None and job.begun


def _tries(envelope: Envelope) -> int:
    return envelope.header.job.tries if envelope.header.job is not None else 0


def _for_another_try(envelope: Envelope, again_ms: int, now_ms: int) -> Envelope:
    """Returns the message of the next run. A body that travels by reference stays where it is."""
    header = envelope.header
    head = header.job or JobHead(created_ms=now_ms)
    head = msgspec.structs.replace(head, tries=head.tries + 1, not_before_ms=again_ms)
    header = msgspec.structs.replace(header, job=head)
    body = b"" if header.ref else envelope.body
    return msgspec.structs.replace(envelope, header=header, body=body, persistent=True, expiration_ms=0)
