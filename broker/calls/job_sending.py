"""Sends jobs: a persistent message, which the broker confirms, and then their record. Also ends them, and sends them once more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from ..backoff import delays
from ..envelope import Envelope, Header, JobHead, Member, RequestHead, Stage, is_minted
from ..errors import (
    BadEnvelope,
    BadValue,
    JobGoesOn,
    ResultGone,
    StoreUnavailable,
    TooLarge,
    UnknownJob,
)
from ..jobs import JOB_RESULT_TTL_S, MESSAGE_TTL_S, UNENDED_TTL_S, JobEnd, JobFacts, JobRecord, JobState, facts_of
from ..overload import HeldBytes
from ..pipelines import VERSION, Plan, Stages, message_id, stage_ids
from ..process.printable import printable
from ..process.rate_limited_log import RateLimitedLog
from ..queue import Queue
from ..results import Result, entry_of, expired_result
from ..store import Store, recorded
from ..store_keys import StoreKeys
from ..values.codecs import sealed_anew
from ..values.signing import SealScope, Signer
from .cancellations import CANCELLED, notice_of_request
from .kept_messages import KeptMessage
from .sending import MAX_BODY_BYTES, until_over
from .submission import Submission

logger = logging.getLogger(__name__)

_CANCELLED_TTL_S = 7 * 24 * 3600  # of a job that waits: its message may stand in its queue for as long
_STOPPED_TTL_S = 600  # of a job that runs, at least: its message comes again if its replica dies before it has heard of the end
_KEPT_WITHIN_MS = 3000  # after the end of a job its message is in the store, if it ever is
EXPIRED_AFTER_MS = 5000  # behind its time a replica may still begin a job, as its own clock goes


class JobTerms(msgspec.Struct, frozen=True):
    """What the sender of a job says of it beside the request. Times are store time in ms, 0 for none."""

    not_before_ms: int = 0
    expires_ms: int = 0  # it does not begin after that
    result_ttl_s: int = 0  # 0: as the backend says
    priority: int = 0
    tag: str = ""
    retry_of: str = ""
    callback: str = ""  # the URL that is told of its end
    member: Member | None = None
    created_ms: int = 0  # 0: now
    once: bool = False  # the backend's delivery is at most once
    again: bool = False  # it may have been sent before
    stages: Stages | None = None  # its endpoint is a pipeline
    stage: Stage | None = None  # it is sent as a stage of one
    carried: bool = False  # its body holds results of other jobs


NO_TERMS = JobTerms()


class StageRecord(NamedTuple):
    """What is known of one stage of a pipeline. Without a state it is not sent yet."""

    endpoint: str
    id: str
    state: JobState | None


class JobSender:
    """One per process that sends jobs. `held` counts the bytes of the process that the broker has not taken."""

    def __init__(self, queue: Queue, store: Store, keys: StoreKeys, held: HeldBytes, signer: Signer) -> None:
        self.queue = queue
        self.store = store
        self.held = held
        self._keys = keys
        self._signer = signer
        self._reading = asyncio.Lock()  # a large body is read before `held` can count it: one at a time
        self._under_way = 0  # jobs that were begun and are not accepted yet
        self._unrecorded = RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<JobSender over {self.queue!r}>"

    def submit(
        self,
        future_id: str,
        backend: str,
        body: bytes,
        content_type: str,
        meta: RequestHead,
        *,
        origin: str,
        terms: JobTerms = NO_TERMS,
        refusal: str = "",
    ) -> Submission:
        """Returns a job that is ready to be sent, to be awaited or begun. Of a pipeline the message is its first stage, which has an id of
        its own (`message_id`), and `meta` is that of its request. Raises TooLarge, and StoreUnavailable if `refusal` says why the store is
        to take no jobs."""
        if refusal:
            raise StoreUnavailable(refusal, public=refusal)
        if len(body) > MAX_BODY_BYTES:
            raise TooLarge(f"the body has {len(body)} bytes and the limit is {MAX_BODY_BYTES}: send less, or a reference to it")
        now_ms = self.store.now_ms()
        plan: Plan | None = None
        created_ms = terms.created_ms or now_ms
        if (stages := terms.stages) is not None:
            plan = _plan_of(future_id, stages, origin, terms, created_ms)
            stage = Stage(plan.sealed(self._signer), len(plan.done))
            # what concerns the whole is said of that alone
            terms = replace(terms, retry_of="", callback="", member=None, stage=stage)
            meta = replace(meta, endpoint=stages.first)
        head = JobHead(
            created_ms, terms.result_ttl_s, 0, terms.not_before_ms, terms.tag, terms.retry_of, terms.callback,
            carried=terms.carried, stage=terms.stage, member=terms.member,
        )  # fmt: skip
        header = Header(origin=origin, deadline=terms.expires_ms, meta=meta, once=terms.once, job=head, again=terms.again)
        sent_id = message_id(future_id, stages)
        envelope = Envelope(sent_id, body, content_type, header, priority=terms.priority, persistent=True)
        return Submission(self, backend, envelope, facts_of(backend, envelope, now_ms), plan)

    async def look(self, future_id: str) -> JobRecord | None:
        """Returns the record, after it has ended a job that was not begun in time; None for a job that is not known (any more)."""
        record = await self.store.jobs.read(future_id)
        if record is None or not _is_expired(record, now_ms := self.store.now_ms()):
            return record
        await self._end(record, expired_result(), JobState.EXPIRED, now_ms)
        return await self.store.jobs.read(future_id)

    async def cancel(self, future_id: str, is_told: Callable[[str], bool] = lambda _: False) -> bool:
        """Records that the job is cancelled, and tells every replica, unless `is_told` says that they have heard of that id. False for one
        that has ended already. Raises UnknownJob, and StoreUnavailable: then it may have ended, and not everybody was told, so call it
        again."""
        record = await self._known(future_id)
        if not await self._cancel(record, is_told):
            return False
        await self._cancel_stages(record, is_told)
        return not record.state.is_final

    async def _cancel(self, record: JobRecord, is_told: Callable[[str], bool]) -> bool:
        """Returns False for one that has another end."""
        if not await self._end(record, CANCELLED, JobState.CANCELLED, self.store.now_ms()):
            return False
        if not is_told(record.id):
            await self.store.append_log(self._keys.cancelled, notice_of_request(record.id))
        return True

    async def _cancel_stages(self, record: JobRecord, is_told: Callable[[str], bool]) -> None:
        """Cancels the stage of a pipeline that is under way. Where none is, the next one may be on its way to the broker: its end is
        recorded, so that it will not run."""
        names = record.facts.stages
        for index, place in enumerate(stage_ids(record.id, record.facts)):
            stage = await self.store.jobs.read(place)
            if stage is None and index >= len(record.facts.done):
                stage = JobRecord(place, JobFacts("", names[index]), JobState.QUEUED)
            if stage is not None and (not stage.state.is_final or stage.state is JobState.CANCELLED):
                await self._cancel(stage, is_told)
                return

    async def fail(self, future_id: str, result: Result) -> None:
        """Records that a job which waits has failed, unless it has ended. Raises UnknownJob, and StoreUnavailable."""
        await self._end(await self._known(future_id), result, JobState.FAILED, self.store.now_ms())

    async def retry(self, future_id: str, new_id: str, *, refusal: str = "") -> JobFacts:
        """Sends the message of a job that has ended once more, as a job of its own. Raises UnknownJob, JobGoesOn, ResultGone if the message
        is not kept (any more), BadSignature if it was not this instance that kept it, and what `submit` raises."""
        record = await self._known(future_id)
        if not record.state.is_final:
            raise JobGoesOn(f"job {future_id} is {record.state}: a job can be retried once it has ended; cancel it first")
        if record.facts.stage is not None:
            whole = Plan.opened(record.facts.stage.plan, self._signer).id
            raise BadValue(f"job {future_id} is a stage of pipeline {whole}: retry that, which goes on from the stage that failed")
        if not (record.facts.backend or record.facts.stages or record.attempts):
            raise ResultGone(
                f"job {future_id} was never sent, so it cannot be retried: it waited for the jobs of its group, or the stage before it, "
                "and ended before these had all succeeded. Send the group or the pipeline again"
            )
        sent = record if not record.facts.stages else await self._stage_to_repeat(record)
        kept = await self._kept_message(sent)
        if not kept.header.ref:
            return await self._send_kept(kept, kept.body, record, sent, new_id, refusal)
        async with self._reading:
            return await self._send_kept(kept, await self._body_of(sent.id), record, sent, new_id, refusal)

    async def _send_kept(self, kept: KeptMessage, body: bytes, record: JobRecord, sent: JobRecord, new_id: str, refusal: str) -> JobFacts:
        """Sends the message of `sent` once more, which is the job of the record or, if that is a pipeline, one of its stages."""
        header, facts = kept.header, record.facts
        stages = None if sent is record else self._rest_of(record, sent, header.job)
        backend, new_message = sent.facts.backend, message_id(new_id, stages)
        body = sealed_anew(
            body, kept.content_type, self._signer, SealScope("request", backend, sent.id), SealScope("request", backend, new_message),
            UNENDED_TTL_S * 1000,
        )  # fmt: skip
        within_ms = header.deadline - sent.facts.created_ms if header.deadline else 0
        head = header.job or JobHead()
        terms = JobTerms(
            expires_ms=self.store.now_ms() + within_ms if within_ms else 0, result_ttl_s=head.result_ttl_s, priority=kept.priority,
            tag=facts.tag, retry_of=record.id, callback=facts.callback, once=header.once, stages=stages, carried=head.carried,
        )  # fmt: skip
        return await self.submit(new_id, backend, body, kept.content_type, header.meta, origin=header.origin, terms=terms, refusal=refusal)

    async def _kept_message(self, record: JobRecord) -> KeptMessage:
        """Returns the message of a job that has ended. Its sender keeps it once the broker has confirmed it: after a short run, that may be
        a moment after the end."""
        for pause_s in delays():
            if (raw := await self.store.jobs.message(record.id)) is not None:
                return KeptMessage.opened(raw, self._signer, record.facts.backend, record.id)
            if not is_minted(record.id) or self.store.now_ms() - record.ended_ms > _KEPT_WITHIN_MS:
                break
            await asyncio.sleep(pause_s)
        raise ResultGone(
            f"the message of job {record.id} is not kept (any more), so it cannot be retried: send it again (a success keeps it for "
            f"{MESSAGE_TTL_S // 60} minutes, any other end as long as the result; a direct publisher's job has none)"
        )

    async def _stage_to_repeat(self, record: JobRecord) -> JobRecord:
        """Returns the last stage that was sent of a pipeline which has ended; the first one, if all of them have succeeded."""
        latest: JobRecord | None = None
        for place in stage_ids(record.id, record.facts)[len(record.facts.done) :]:
            stage = await self.store.jobs.read(place)
            if stage is None or not stage.facts.backend:  # it was cancelled before it was sent
                break
            latest = stage
            if record.state is JobState.SUCCEEDED:
                break
        if latest is None:
            raise ResultGone(f"of the stages of pipeline {record.id} nothing is known any more, so it cannot be retried: send it again")
        return latest

    def _rest_of(self, record: JobRecord, sent: JobRecord, head: JobHead | None) -> Stages:
        """Returns what is left of a pipeline from that stage on. Raises BadEnvelope, and BadSignature."""
        if head is None or head.stage is None or (plan := Plan.opened(head.stage.plan, self._signer)).id != record.id:
            raise BadEnvelope(f"the message of job {sent.id} is no stage of pipeline {record.id}: another program wrote it")
        done = tuple(stage_ids(record.id, plan.facts)[: head.stage.index])
        return Stages(plan.name, plan.stages, plan.shard_key, done)

    async def stages(self, record: JobRecord) -> list[StageRecord]:
        """Returns what is known of each stage of a pipeline; nothing for any other job."""
        found: list[StageRecord] = []
        ids = stage_ids(record.id, record.facts)
        for name, place, stage in zip(record.facts.stages, ids, await asyncio.gather(*map(self.store.jobs.read, ids)), strict=True):
            state = stage.state if stage is not None else JobState.SUCCEEDED if place in record.facts.done else None
            found.append(StageRecord(name, place, state))
        return found

    async def _known(self, future_id: str) -> JobRecord:
        record = await self.store.jobs.read(future_id)
        if record is None:
            raise UnknownJob(f"nothing is known of job {printable(future_id)}: there was none, or its record is not kept any more")
        return record

    async def _body_of(self, future_id: str) -> bytes:
        body = await self.store.get_large(self._keys.body(future_id))
        if body is None:
            raise ResultGone(f"the body of job {future_id} is not kept any more, so it cannot be retried: send it again")
        return body

    async def _end(self, record: JobRecord, result: Result, state: JobState, now_ms: int) -> bool:
        raw = result.to_bytes()
        note, ttl_ms = entry_of(record.id, raw), _kept_ms(record, now_ms)
        facts = record.facts
        end = JobEnd(
            record.id, raw, note, state, result.status, facts.backend, now_ms, ttl_ms, endpoint=facts.endpoint, callback=facts.callback,
            stage=facts.stage, member=facts.member,
        )  # fmt: skip
        return await recorded(self.store.jobs.end_then, end)

    async def settle(self) -> None:
        """Until the jobs that are on their way have been accepted, or not; at most as long as a broker is waited for."""
        await until_over(lambda: not self._under_way)

    # For its submissions.

    def take(self, size: int) -> None:
        """A job with a body of so many bytes is on its way. Raises Overloaded."""
        self.held.take(size)
        self._under_way += 1

    def give(self, size: int) -> None:
        """A job with a body of so many bytes has been accepted, or not: it is not on its way any more."""
        self.held.give(size)
        self._under_way -= 1

    async def by_reference(self, envelope: Envelope) -> Envelope:
        """Puts the body into the store, and returns the envelope with its key instead. Raises StoreUnavailable."""
        key = self._keys.body(envelope.id)
        await self.store.set(key, envelope.body, ttl_ms=UNENDED_TTL_S * 1000)
        return replace(envelope, body=b"", header=replace(envelope.header, ref=key))

    def kept_message(self, backend: str, envelope: Envelope) -> bytes:
        """Returns the message as the store keeps it."""
        return KeptMessage.of(envelope).sealed(self._signer, backend, envelope.id)

    def add(self, future_id: str, facts: JobFacts, kept: bytes, plan: Plan | None, added: Callable[[], None]) -> None:
        """Writes the record of a job that the broker has, and that of the pipeline of which it is the first stage. Calls `added` once it is
        there, or could not be taken."""

        def noted(outcome: bool | Exception) -> None:
            if isinstance(outcome, Exception):
                self._unrecorded.say(f"jobs are accepted without a record, which their replicas write when they begin: {outcome}")

        def tried(outcome: bool | Exception) -> None:
            noted(outcome)
            added()

        if plan is not None:
            self.store.jobs.add_then(plan.id, plan.facts, noted)
        self.store.jobs.add_then(future_id, facts, tried, kept)

    def drop_body(self, future_id: str) -> None:
        """The message will not come, so nobody asks for its body."""
        self.store.drop_soon(self._keys.body(future_id))


def _plan_of(job_id: str, stages: Stages, origin: str, terms: JobTerms, now_ms: int) -> Plan:
    return Plan(
        VERSION, job_id, stages.pipeline, stages.endpoints, stages.done, origin, stages.shard_key, now_ms, terms.not_before_ms,
        terms.expires_ms, terms.result_ttl_s, terms.priority, terms.tag, terms.retry_of, terms.callback,
        terms.member,
    )  # fmt: skip


def _is_expired(record: JobRecord, now_ms: int) -> bool:
    """Whether no replica will begin it any more. One that has begun in time may run again after that."""
    expires_ms = record.facts.expires_ms
    return record.state is JobState.QUEUED and not record.has_begun and 0 < expires_ms < now_ms - EXPIRED_AFTER_MS


def _kept_ms(record: JobRecord, now_ms: int) -> int:
    """Returns for how long an end is kept that no replica has recorded. The message of a job that waits still comes to one, which runs it
    unless it finds the end."""
    if record.state is not JobState.QUEUED:
        kept_s = record.attempts[-1].result_ttl_s if record.attempts else 0
        return max(kept_s or JOB_RESULT_TTL_S, _STOPPED_TTL_S) * 1000
    due_ms = max(record.facts.not_before_ms, *(attempt.again_ms for attempt in record.attempts), now_ms)
    return due_ms - now_ms + _CANCELLED_TTL_S * 1000
