"""Chords: once all jobs of a group have succeeded, the leader sends the job that gets their results. That job's id is in the call which the
group keeps, so a leader that dies on the way costs nothing: the next one sends the same job again, which replicas recognize by its record.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

from ..broker.calls.chord_calls import ChordCall
from ..broker.calls.job_sending import JobSender, JobTerms
from ..broker.calls.sending import MAX_BODY_BYTES
from ..broker.errors import BackendGone, BadEnvelope, MembersFailed, MQServeError, TooLarge, UnknownJob
from ..broker.job_groups import GroupFacts, chord_id, member_id
from ..broker.jobs import EndNote, JobState
from ..broker.process.printable import printable
from ..broker.result_bodies import with_body
from ..broker.result_files import BodyGone
from ..broker.results import ErrorInfo, Outcome, Result, members_failed
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values.carried import CARRIED, CarriedResult, carry_all
from ..broker.values.signing import Signer
from .latest_document import LatestDocument
from .state.documents import Desired
from .state.traffic import choose, entry_of, stages_of

_READ_AT_ONCE = 50  # results, of at most 256 KiB each
_NAMED = 3  # jobs in an error
_FRAME_BYTES = 100  # of a result's id, backend and content type beside its body


class Chords:
    """Sends what follows from the groups of one instance, as the document says that `follow` got last."""

    def __init__(self, jobs: JobSender, store: Store, keys: StoreKeys, signer: Signer) -> None:
        self._jobs = jobs
        self._store = store
        self._keys = keys
        self._signer = signer
        self._document = LatestDocument(store, keys)
        self._refusal = ""
        self._one = asyncio.Lock()  # at a time: each may have 64 MiB

    def __repr__(self) -> str:
        return f"<Chords over {self._jobs!r}>"

    def follow(self, desired: Desired, refusal: str) -> None:
        """`refusal` says why the store is to take no jobs."""
        self._document.follow(desired)
        self._refusal = refusal

    async def send(self, end: EndNote) -> None:
        """Sends the job that follows a group whose jobs have all ended, or ends it if it cannot have their results. May be called again for
        the same group. Raises the errors of broker and store, and BadEnvelope for a group that no process of this instance has sent."""
        async with self._one:
            await self._send_after(end.group)

    async def _send_after(self, group_id: str) -> None:
        group = await self._store.jobs.group(group_id)
        if group is None or not group.call or sum(group.ended.values()) < group.facts.total:  # all senders may write into the outbox
            return
        try:
            call = ChordCall.opened(group.call, self._signer, group_id)
        except BadEnvelope as error:
            result = members_failed(f"what was kept of this job until all jobs of its group have ended cannot be used: {error}")
            await self._fail(chord_id(group_id), result)
            raise
        record = await self._jobs.look(call.id)
        if record is not None and (record.state is not JobState.QUEUED or record.facts.backend or record.facts.stages):
            return  # it was cancelled, say, or a leader before has sent it
        try:
            await self._check_ends(group_id, group.facts, group.ended[JobState.SUCCEEDED])
            await self._send(call, carry_all(await self._results(group_id, group.facts)))
        except (MembersFailed, TooLarge) as error:
            await self._fail(call.id, members_failed(str(error)))
        except BackendGone as error:
            await self._fail(call.id, _gone(str(error)))

    async def _send(self, call: ChordCall, body: bytes) -> None:
        desired = await self._document.with_endpoint(call.head.endpoint)
        endpoint = desired.endpoints.get(call.head.endpoint)
        if endpoint is None or desired.closing:
            raise BackendGone("the instance was shut down" if desired.closing else f"endpoint {call.head.endpoint!r} was deleted")
        shard_key = call.shard_key or call.id  # so that a second sending goes the same way
        backend, _ = choose(entry_of(endpoint, desired.endpoints), shard_key)
        terms = JobTerms(
            not_before_ms=call.not_before_ms,
            expires_ms=call.expires_ms,
            result_ttl_s=call.result_ttl_s,
            priority=call.priority,
            tag=call.tag,
            callback=call.callback,
            carried=True,
            stages=stages_of(endpoint, call.shard_key),
            created_ms=call.created_ms,
            once=desired.backends[backend].config.delivery == "at_most_once",
        )
        await self._jobs.submit(call.id, backend, body, CARRIED, call.head, origin="handle", terms=terms, refusal=self._refusal)

    async def _check_ends(self, group_id: str, facts: GroupFacts, succeeded: int) -> None:
        """Raises MembersFailed, and names the first ones, unless all have succeeded."""
        if succeeded == facts.total:
            return
        ends = await self._store.jobs.group_ends(group_id)
        others = {number: state for number, state in sorted(ends.items()) if state is not JobState.SUCCEEDED}
        counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(others.values()).items()))
        first = {member_id(group_id, number): state for number, state in list(others.items())[:_NAMED]}
        raws = await self._store.get_many([self._keys.future(member) for member in first])
        named = [f"{member} ({_end_of(state, raw)})" for (member, state), raw in zip(first.items(), raws, strict=True)]
        more = " and others" if len(others) > _NAMED else ""
        raise MembersFailed(f"not all of the {facts.total} jobs of its group have succeeded: {counts}; {', '.join(named)}{more}")

    async def _results(self, group_id: str, facts: GroupFacts) -> list[CarriedResult]:
        """Raises MembersFailed if one is not kept any more, and TooLarge."""
        found: list[CarriedResult] = []
        size = 0
        ids = [member_id(group_id, number) for number in range(facts.total)]
        for start in range(0, len(ids), _READ_AT_ONCE):
            some = ids[start : start + _READ_AT_ONCE]
            for member, raw in zip(some, await self._store.get_many([self._keys.future(member) for member in some]), strict=True):
                head = _head_of(member, raw)
                if size + _size_of(head) > MAX_BODY_BYTES:
                    raise _too_large(facts.total)
                result = await self._whole(member, head)
                size += len(result.body) + _FRAME_BYTES
                if size > MAX_BODY_BYTES:
                    raise _too_large(facts.total)
                found.append(CarriedResult(result.content_type, result.body, result.backend, member))
        return found

    async def _whole(self, member: str, head: Result) -> Result:
        """Returns a result with its body, wherever that stands. Raises MembersFailed, and StoreUnavailable."""
        try:
            return await with_body(self._store, self._keys, member, head)
        except BodyGone as error:
            raise _unreadable(member, error) from error

    async def _fail(self, job_id: str, result: Result) -> None:
        with suppress(UnknownJob):
            await self._jobs.fail(job_id, result)


def _gone(why: str) -> Result:
    message = f"{why} before this job, which follows a group, was sent: send the group again once it is served"
    return Result(status=503, error=ErrorInfo(type=Outcome.GONE, message=message))


def _end_of(state: JobState, raw: bytes | None) -> str:
    """Returns how a job has ended. Of an error that is its type: its message is not for all who may read the result of what follows."""
    if state is not JobState.FAILED or raw is None:
        return state
    try:
        result = Result.from_bytes(raw)
    except BadEnvelope:
        return state
    return state if result.error is None else f"{state}: {printable(result.error.type)}"


def _head_of(member: str, raw: bytes | None) -> Result:
    """Raises MembersFailed for what is no value."""
    if raw is None:
        raise MembersFailed(f"the result of job {member} of its group is not kept any more: raise result_ttl_s of those jobs")
    try:
        head = Result.from_bytes(raw)
    except BadEnvelope as error:
        raise _unreadable(member, error) from error
    if head.error is not None:
        raise MembersFailed(f"the result of job {member} of its group is an error, {printable(head.error.type)}")
    if head.frames:
        raise MembersFailed(f"the result of job {member} of its group was streamed, and is not in one piece: let it return a list")
    return head


def _size_of(head: Result) -> int:
    """Returns the size of a body as far as it is known before that is read."""
    return len(head.body) if head.file is None else head.file.size


def _unreadable(member: str, error: MQServeError) -> MembersFailed:
    return MembersFailed(f"the result of job {member} of its group cannot be read: {error}")


def _too_large(total: int) -> TooLarge:
    return TooLarge(
        f"the results of the {total} jobs of its group have more than {MAX_BODY_BYTES} bytes together, the limit of a job's body: return "
        "less, or references to it"
    )
