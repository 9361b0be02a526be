"""Makes the job of a schedule and sends it: the leader does at each of its times, and a client when it is asked to."""

from __future__ import annotations

import msgspec

from ..broker.calls.job_sending import JobSender, JobTerms
from ..broker.calls.scheduled_calls import ScheduledCall
from ..broker.errors import BadEnvelope, BadValue
from ..broker.jobs import UNENDED_TTL_S, JobFacts
from ..broker.pipelines import message_id
from ..broker.times import utc
from ..broker.values.signing import Signer
from .state.documents import Desired, Schedule
from .state.traffic import choose, entry_of, stages_of


async def send_scheduled(
    jobs: JobSender, signer: Signer, desired: Desired, schedule: Schedule, job_id: str, at_ms: int, *, refusal: str = ""
) -> JobFacts:
    """Returns once the broker has the job. Raises what `JobSender.submit` does, BadEnvelope for a call that is not ours, and BadValue if
    there is no such endpoint."""
    endpoint = desired.endpoints.get(schedule.endpoint)
    if endpoint is None:
        raise BadValue(f"there is no endpoint {schedule.endpoint!r} any more: create it, or delete the schedule")
    call = opened_call(schedule, signer)
    stages, entry = stages_of(endpoint, call.shard_key), entry_of(endpoint, desired.endpoints)
    backend, _ = choose(entry, call.shard_key or job_id)  # by the id, so that a second sending goes the same way
    sent_id = message_id(job_id, stages)
    body = call.body_for(signer, schedule.endpoint, schedule.name, backend, sent_id, UNENDED_TTL_S * 1000)
    headers = (*call.head.headers, (b"x-schedule", schedule.name.encode()), (b"x-scheduled-for", _iso(at_ms).encode()))
    head = msgspec.structs.replace(call.head, headers=headers)
    terms = JobTerms(
        expires_ms=jobs.store.now_ms() + call.expires_ms if call.expires_ms else 0,
        result_ttl_s=call.result_ttl_s,
        priority=call.priority,
        tag=call.tag,
        callback=call.callback,
        once=desired.backends[backend].config.delivery == "at_most_once",
        stages=stages,
    )
    return await jobs.submit(job_id, backend, body, call.content_type, head, origin="handle", terms=terms, refusal=refusal)


def opened_call(schedule: Schedule, signer: Signer) -> ScheduledCall:
    """Raises BadEnvelope for one that no process with our key made."""
    try:
        return ScheduledCall.opened(schedule.call, signer, schedule.endpoint, schedule.name)
    except BadEnvelope as error:
        raise BadEnvelope(f"its call was not made by a process with this instance's key ({error}): declare it again") from error


def _iso(ms: int) -> str:
    return f"{utc(ms):%Y-%m-%dT%H:%M:%SZ}"
