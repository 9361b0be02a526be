"""The jobs of the embedded form, in memory. docs/design.md says what each step means; `redis/jobs.lua` takes the same ones."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from ..envelope import Member
from ..job_groups import ENDS, STATE_OF_BYTE, GroupFacts, GroupRecord, ends_in
from ..job_store import NumberedEvent, OnDone, PlacedEnd
from ..jobs import (
    JOB_RESULT_TTL_S,
    KEPT_ATTEMPTS,
    KEPT_EVENTS,
    LEASE_MS,
    MESSAGE_TTL_S,
    UNENDED_TTL_S,
    WAIT_TTL_S,
    Attempt,
    Begun,
    Done,
    EventKind,
    Held,
    JobEnd,
    JobEvent,
    JobFacts,
    JobRecord,
    JobState,
    Leased,
    Pipeline,
    Run,
    event_entry,
    matches,
    record_of,
    score_of,
)
from ..store_keys import StoreKeys
from .expiring import Expiring

_Place = tuple[int, str]  # the score, and the id


class _Job:
    """What is kept of one job."""

    def __init__(self) -> None:
        self.fields: dict[bytes, bytes] = {}
        self.created_ms = 0
        self.is_held = False  # it is sent once others have ended
        self.place: _Place | None = None  # while it waits
        self.queue = ""  # the backend among whose jobs
        self.runs = 0
        self.token: bytes | None = None  # of the latest run; empty once that was given back or is tried again
        self.last_event = 0
        self.waiters = Expiring[str]()  # inboxes
        self.followers = Expiring[str]()

    def __repr__(self) -> str:
        return f"<_Job {sorted(self.fields)}, {self.runs} runs>"

    @property
    def has_facts(self) -> bool:
        return b"facts" in self.fields

    @property
    def has_ended(self) -> bool:
        return b"state" in self.fields

    def is_of(self, token: bytes) -> bool:
        """Whether no other run has begun since this one did."""
        return self.token is None or self.token == token

    def keep_facts(self, facts: JobFacts) -> bool:
        """Returns whether the record has not had any, or those of a job that was held."""
        is_new = not self.has_facts or self.is_held
        if is_new:
            self.is_held = False
            self.fields[b"facts"] = facts.to_bytes()
            self.created_ms = facts.created_ms
        return is_new


class _Group:
    """What is kept of one group."""

    def __init__(self, facts: GroupFacts, call: bytes) -> None:
        self.facts = facts
        self.call = call
        self.ends = bytearray(facts.total)

    def __repr__(self) -> str:
        return f"<_Group of {self.facts.total}>"


class EmbeddedJobs:
    """Implements `JobStore`. `values` are those of the store, `post` appends to an inbox, `on_end` is called for each entry of the
    outbox."""

    def __init__(
        self,
        keys: StoreKeys,
        values: Expiring[bytes],
        post: Callable[[str, bytes], None],
        now_ms: Callable[[], int],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._keys = keys
        self._values = values
        self._post = post
        self._now_ms = now_ms
        self._on_end = on_end
        self._jobs = Expiring[_Job]()
        self._events = Expiring[deque[NumberedEvent]]()  # as long as the result, where the record stays as long again
        self._groups = Expiring[_Group]()
        self._waiting: dict[str, list[_Place]] = {}  # by backend, in order: those that wait
        self._ends: dict[str, bytes] = {}  # by place, in order
        self._last_end = 0

    def __repr__(self) -> str:
        return f"<EmbeddedJobs, {len(self._jobs)} of them>"

    def clear(self) -> None:
        self._jobs.clear()
        self._groups.clear()
        self._events.clear()
        self._waiting.clear()
        self._ends.clear()

    # Writing.

    def add_then(self, future_id: str, facts: JobFacts, on_done: OnDone, message: bytes = b"") -> None:
        job = self._jobs.get(future_id) or _Job()
        if job.keep_facts(facts) and not job.has_ended and not job.runs:
            if not facts.stages:  # a pipeline waits in no queue
                self._join_queue(future_id, job, facts.backend, score_of(facts))
            self._tell(future_id, job, _state(JobState.QUEUED, facts.created_ms))
        ttl_s = UNENDED_TTL_S
        if job.has_ended:  # it may be tried again all the same
            ttl_s = MESSAGE_TTL_S if job.fields[b"state"] == JobState.SUCCEEDED.encode() else JOB_RESULT_TTL_S
        else:
            self._jobs.put(future_id, job, ttl_s * 1000)
        if message:
            self._values.put(self._keys.message(future_id), message, ttl_s * 1000)
        on_done(True)

    async def begin(self, run: Run) -> Begun:
        job = self._jobs.get(run.id) or _Job()
        if (result := self._values.get(self._keys.future(run.id))) is not None or job.has_ended:
            return Done(result or b"")
        lease = self._keys.lease(run.id)
        if self._values.get(lease) not in (None, run.token):
            return Held(max(1, self._values.left_ms(lease)))
        self._values.put(lease, run.token, LEASE_MS)
        if job.token != run.token:
            job.keep_facts(run.facts)
            job.runs += 1
            job.fields[b"runs"] = b"%d" % job.runs
            job.token = run.token
            self._leave_queue(job)
            job.fields[b"run:%d" % job.runs] = _attempt_of(run)
            for old in (b"run:%d" % (job.runs - KEPT_ATTEMPTS), b"end:%d" % (job.runs - KEPT_ATTEMPTS)):
                job.fields.pop(old, None)
            self._tell(run.id, job, _state(JobState.RUNNING, run.now_ms))
            if run.pipeline is not None:
                self._begin_pipeline(run.pipeline, run, is_first_run=job.runs == 1)
        self._jobs.put(run.id, job, run.ttl_s * 1000)
        return Leased(job.runs)

    def _begin_pipeline(self, pipeline: Pipeline, run: Run, *, is_first_run: bool) -> None:
        whole = self._jobs.get(pipeline.id) or _Job()
        if whole.has_ended:
            return
        whole.keep_facts(pipeline.facts)
        if not whole.runs:
            whole.runs = 1
            whole.fields |= {b"runs": b"1", b"run:1": _attempt_of(run)}
            self._tell(pipeline.id, whole, _state(JobState.RUNNING, run.now_ms))
        if is_first_run:
            self._tell(pipeline.id, whole, JobEvent(EventKind.LOG, run.now_ms, text=pipeline.note))
        self._jobs.put(pipeline.id, whole, UNENDED_TTL_S * 1000)

    async def renew(self, future_id: str, token: bytes) -> bool:
        job = self._jobs.get(future_id)
        if job is None:
            return True
        if job.is_of(token) and not job.has_ended:
            self._values.put(self._keys.lease(future_id), token, LEASE_MS)
        return job.is_of(token)

    async def try_again(self, future_id: str, token: bytes, attempt: Attempt, facts: JobFacts) -> bool:
        job, name, raw = self._jobs.get(future_id) or _Job(), b"end:%d" % attempt.number, attempt.to_bytes()
        if job.fields.get(name) == raw:  # our own
            return True
        if not job.is_of(token) or job.has_ended or self._values.get(self._keys.future(future_id)) is not None:
            return False
        job.fields[name] = raw
        self._release(future_id, job, facts.backend, score_of(facts, attempt.again_ms))
        self._tell(future_id, job, _state(JobState.QUEUED, attempt.ended_ms))
        self._jobs.put(future_id, job, UNENDED_TTL_S * 1000)
        return True

    async def give_back(self, future_id: str, token: bytes, facts: JobFacts) -> None:
        job = self._jobs.get(future_id)
        if job is None or job.token != token or job.has_ended:
            return
        job.fields.pop(b"run:%d" % job.runs, None)
        job.runs -= 1
        job.fields[b"runs"] = b"%d" % job.runs
        self._release(future_id, job, facts.backend, score_of(facts))
        self._tell(future_id, job, _state(JobState.QUEUED, self._now_ms()))

    def end_then(self, end: JobEnd, on_done: OnDone) -> None:
        future, ttl_ms = self._keys.future(end.id), end.result_ttl_ms
        job = self._jobs.get(end.id) or _Job()
        if (found := self._values.get(future)) is None:
            is_stale = bool(end.token) and end.state is not JobState.SUCCEEDED and not job.is_of(end.token)
            if job.has_ended or is_stale:  # one that has ended has no result any more
                return on_done(False)
            self._values.put(future, end.result, ttl_ms)
        elif found != end.result:
            return on_done(False)
        if not job.has_ended:
            job.fields |= {b"state": end.state.encode(), b"status": b"%d" % end.status, b"ended": b"%d" % end.ended_ms}
            self._leave_queue(job)
            self._jobs.put(end.id, job, 2 * ttl_ms)
            kept_ms = min(ttl_ms, MESSAGE_TTL_S * 1000) if end.state is JobState.SUCCEEDED else ttl_ms
            for key in (self._keys.message(end.id), self._keys.body(end.id)):
                self._values.expire(key, kept_ms)
            self._tell(end.id, job, _state(end.state, end.ended_ms))
            self._events.expire(end.id, ttl_ms)
            if end.outbox_entry:
                self._add_end(end.outbox_entry)
            if end.member is not None:
                self._count(end.member, end)
        if end.token and self._values.get(self._keys.lease(end.id)) == end.token:
            self._values.pop(self._keys.lease(end.id))
        for inbox in {*filter(None, [end.inbox]), *job.waiters}:
            self._post(inbox, end.note)
        on_done(True)

    def _add_end(self, entry: bytes) -> None:
        self._last_end += 1
        self._ends[str(self._last_end)] = entry
        self._on_end()

    def _count(self, member: Member, end: JobEnd) -> None:
        group = self._groups.get(member.group)
        if group is None or member.number >= len(group.ends) or group.ends[member.number]:
            return
        group.ends[member.number] = _BYTE_OF_STATE[end.state]
        self._groups.extend(member.group, UNENDED_TTL_S * 1000)
        if group.call and 0 not in group.ends:
            self._add_end(end.last_of_group_entry)

    def note(self, future_id: str, token: bytes, event: JobEvent) -> None:
        job = self._jobs.get(future_id)
        if job is None or job.token != token or job.has_ended:
            return
        if event.kind is EventKind.PROGRESS:
            job.fields[b"progress"] = event.to_bytes()
        self._tell(future_id, job, event)

    async def forget(self, future_id: str) -> bool:
        job = self._jobs.get(future_id)
        if job is not None and job.fields and not job.has_ended:
            return False
        self._jobs.pop(future_id)
        self._events.pop(future_id)
        keys = self._keys
        for key in (keys.future(future_id), keys.result_body(future_id), keys.message(future_id), keys.body(future_id)):
            self._values.pop(key)
        return True

    async def hold(self, future_id: str, facts: JobFacts) -> None:
        job = self._jobs.get(future_id) or _Job()
        if not job.has_facts:
            job.keep_facts(facts)
            job.is_held = True
            self._jobs.put(future_id, job, UNENDED_TTL_S * 1000)
            self._tell(future_id, job, _state(JobState.QUEUED, facts.created_ms))

    async def keep_group(self, group_id: str, facts: GroupFacts, call: bytes = b"") -> None:
        self._groups.put(group_id, _Group(facts, call), UNENDED_TTL_S * 1000, only_new=True)

    def _join_queue(self, future_id: str, job: _Job, backend: str, score: int) -> None:
        self._leave_queue(job)
        job.place, job.queue = (score, future_id), backend
        insort(self._waiting.setdefault(backend, []), job.place)

    def _leave_queue(self, job: _Job) -> None:
        if job.place is None:
            return
        waiting = self._waiting[job.queue]
        del waiting[bisect_left(waiting, job.place)]
        job.place = None
        if not waiting:
            del self._waiting[job.queue]

    def _release(self, future_id: str, job: _Job, backend: str, score: int) -> None:
        """Has the job wait for another run."""
        job.token = b""
        self._values.pop(self._keys.lease(future_id))
        self._join_queue(future_id, job, backend, score)

    def _tell(self, future_id: str, job: _Job, event: JobEvent) -> None:
        job.last_event += 1
        if (events := self._events.get(future_id)) is None:
            events = deque(maxlen=KEPT_EVENTS)
            self._events.put(future_id, events, UNENDED_TTL_S * 1000)
        events.append(NumberedEvent(job.last_event, event))
        for inbox in job.followers:
            self._post(inbox, event_entry(future_id, job.last_event, event.to_bytes()))

    # Reading.

    async def group(self, group_id: str) -> GroupRecord | None:
        if (group := self._groups.get(group_id)) is None:
            return None
        return GroupRecord(group.facts, {state: group.ends.count(_BYTE_OF_STATE[state]) for state in ENDS}, group.call)

    async def group_ends(self, group_id: str) -> Mapping[int, JobState]:
        group = self._groups.get(group_id)
        return {} if group is None else ends_in(bytes(group.ends))

    async def read(self, future_id: str) -> JobRecord | None:
        job = self._jobs.get(future_id)
        if job is None or not job.fields:
            return None
        return record_of(future_id, job.fields, has_result=self._values.get(self._keys.future(future_id)) is not None)

    async def message(self, future_id: str) -> bytes | None:
        return self._values.get(self._keys.message(future_id))

    async def wait(self, future_id: str, inbox: str) -> JobRecord | None:
        self._registered(future_id).waiters.put(inbox, inbox, WAIT_TTL_S * 1000)
        return await self.read(future_id)

    async def follow(self, future_id: str, inbox: str) -> JobRecord | None:
        self._registered(future_id).followers.put(inbox, inbox, WAIT_TTL_S * 1000)
        return await self.read(future_id)

    def _registered(self, future_id: str) -> _Job:
        """Somebody may wait for a job that is not known yet."""
        if (job := self._jobs.get(future_id)) is None:
            job = _Job()
            self._jobs.put(future_id, job, WAIT_TTL_S * 1000)
        elif not job.fields:
            self._jobs.extend(future_id, WAIT_TTL_S * 1000)
        return job

    async def events(self, future_id: str, after: int = 0) -> Sequence[NumberedEvent]:
        return [event for event in self._events.get(future_id) or () if event.seq > after]

    async def ends(self, at_most: int, after: str = "") -> Sequence[PlacedEnd]:
        behind = (PlacedEnd(place, note) for place, note in self._ends.items() if not after or int(place) > int(after))
        return list(islice(behind, at_most))

    async def drop_ends(self, *places: str) -> None:
        for place in places:
            self._ends.pop(place, None)

    async def place(self, future_id: str, facts: JobFacts) -> int | None:
        job = self._jobs.get(future_id)
        return None if job is None or job.place is None else bisect_left(self._waiting[job.queue], job.place)

    async def list(self, *, backend: str = "", tag: str = "", states: Sequence[str] = (), at_most: int = 100) -> Sequence[JobRecord]:
        found: list[JobRecord] = []
        for name in sorted(self._jobs, key=self._created_ms, reverse=True):
            record = await self.read(name)
            if record is not None and matches(record, backend, tag, states):
                found.append(record)
                if len(found) >= at_most:
                    break
        return found

    def _created_ms(self, future_id: str) -> int:
        job = self._jobs.get(future_id)
        return 0 if job is None else job.created_ms


_BYTE_OF_STATE = {state: byte for byte, state in STATE_OF_BYTE.items()}


def _attempt_of(run: Run) -> bytes:
    return Attempt(replica=run.replica, started_ms=run.now_ms, result_ttl_s=run.result_ttl_s).to_bytes()


def _state(state: JobState, at_ms: int) -> JobEvent:
    return JobEvent(EventKind.STATE, at_ms, state)
