"""Jobs: requests that nobody waits for. Their states, what travels with their message, and what the store keeps of them.

A job is an ordinary request whose header has a `JobHead`. Its message is persistent and waits in the backend's queue for jobs; its result
stands at `future:{id}` like any other, and for longer. The record at `job:{id}` says what became of it: a Redis hash whose fields are each
written once, so that it cannot go back. docs/protocol.md has the contract.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, StrEnum
from typing import Any, TypeVar

import msgspec

from .envelope import Envelope, Member, Stage, Whole
from .errors import UNPARSABLE, BadEnvelope
from .results import EVENT_KIND, InboxEntry, Outcome, Result
from .times import rfc3339

JOB_RESULT_TTL_S = 24 * 3600  # of a job whose backend and sender say nothing else
LEASE_MS = 10_000
RENEW_EVERY_S = 3.0
UNENDED_TTL_S = 37 * 24 * 3600  # of the record of a job without a result: the longest delay and the longest run, and seven days beside
MESSAGE_TTL_S = 600  # of the message of a job that succeeded: few run again
WAIT_TTL_S = 120  # of the word that somebody waits for a job, or follows it
KEPT_EVENTS = 1000
KEPT_ATTEMPTS = 100
MAX_RESULT_TTL_S = 30 * 24 * 3600
MAX_DELAY_S = 30 * 24 * 3600
MAX_EXPIRES_S = 365 * 24 * 3600  # within which a job may have to begin
PRIORITIES = {"high": 4, "normal": 2, "low": 0}  # AMQP's, strict within the queue; a direct publisher that names none is low

T = TypeVar("T")


class JobState(StrEnum):
    QUEUED = "queued"  # also while it waits for its time, or for another try
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # it was not started in time

    @property
    def is_final(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class JobFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a job when it is sent, and does not change: the field `facts` of its record. The backend is empty where the store
    has lost the facts and knows only how the job ended."""

    backend: str
    endpoint: str = ""
    created_ms: Whole = 0
    expires_ms: Whole = 0  # it does not start after that; 0: it waits for ever
    not_before_ms: Whole = 0
    priority: int = 0
    tag: str = ""
    retry_of: str = ""
    callback: str = ""  # the URL that is told of its end
    stage: Stage | None = None  # its place in a pipeline
    stages: tuple[str, ...] = ()  # of a pipeline: its endpoints, in order. It is no message itself: its first stage is
    done: tuple[str, ...] = ()  # of a pipeline that goes on where another one failed: the ids of the stages that it takes over
    member: Member | None = None

    def to_bytes(self) -> bytes:
        return _encode(self)


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run: the field `run:<number>` of the record when it begins, and `end:<number>` when it has failed and is tried again. In the
    store the field's name says the number."""

    number: int = 0
    replica: str = ""
    started_ms: Whole = 0
    ended_ms: Whole = 0
    error: str = ""  # type and message
    again_ms: Whole = 0  # when it is tried again
    result_ttl_s: Whole = 0  # how long its replica would keep its result

    def to_bytes(self) -> bytes:
        return _encode(self)


class EventKind(StrEnum):
    STATE = "state"
    PROGRESS = "progress"
    LOG = "log"
    CHUNK = "chunk"


class JobEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry of the list `events:{id}`, and what those who follow the job are told."""

    kind: EventKind
    at_ms: Whole = 0
    state: str = ""  # of STATE
    fraction: float | None = None  # of PROGRESS: from 0 to 1
    text: str = ""  # of PROGRESS, LOG and CHUNK
    data: bytes = b""  # of a CHUNK that is no text
    offset: Whole = 0  # of CHUNK: how many bytes its run has told before, so that a hole is seen
    cut: bool = False  # of CHUNK: no more of them come, and the result alone has the rest

    def view(self) -> dict[str, Any]:
        """Returns what the event says, for JSON, under the names that it has over HTTP."""
        found: dict[str, Any] = {"at": rfc3339(self.at_ms), "status": self.state, "fraction": self.fraction, "text": self.text}
        if self.kind is EventKind.CHUNK:
            found |= {"base64": b64encode(self.data).decode(), "offset": self.offset, "cut": self.cut or None}
        return {name: value for name, value in found.items() if value not in ("", None)}

    def to_bytes(self) -> bytes:
        return _encode(self)

    @classmethod
    def from_bytes(cls, raw: bytes) -> JobEvent:
        """Raises BadEnvelope."""
        return _parsed(_decode_event, raw, "an event of a job")


class JobRecord(msgspec.Struct, frozen=True):
    """What the store knows of a job, as it was read. `has_result` says whether its result is still there: it goes first, and the record
    stays as long again, to say so."""

    id: str
    facts: JobFacts
    state: JobState
    started_ms: int = 0
    ended_ms: int = 0
    status: int = 0  # of its result
    attempts: tuple[Attempt, ...] = ()
    progress: JobEvent | None = None
    has_result: bool = False
    has_begun: bool = False  # also if that run was given back, and is no attempt


class Pipeline(msgspec.Struct, frozen=True):
    """The pipeline of a stage that begins: its record says that it runs, and tells of the stage with `note`."""

    id: str
    facts: JobFacts  # for a record that is missing
    note: str


class Run(msgspec.Struct, frozen=True):
    """A run that asks for the lease of its job. `token` is random, and names the run from then on."""

    id: str
    token: bytes
    replica: str
    facts: JobFacts  # for a record that is missing
    now_ms: int
    ttl_s: int = UNENDED_TTL_S  # of the record
    result_ttl_s: int = 0
    pipeline: Pipeline | None = None  # if it is that of a stage


class Leased(msgspec.Struct, frozen=True):
    """The job is this run's, which is number `attempt`, until the lease lapses."""

    attempt: int


class Held(msgspec.Struct, frozen=True):
    """Another run holds the lease for `left_ms` more, if it does not renew it."""

    left_ms: int


class Done(msgspec.Struct, frozen=True):
    """The job has ended. `result` is empty if its result is not kept any more."""

    result: bytes


Begun = Leased | Held | Done


class JobEnd(msgspec.Struct, frozen=True):
    """The end of a job: its result, written once (NX). Whoever waits for it is told with `note`; `inbox` is that of its sender, if that
    waits."""

    id: str
    result: bytes
    note: bytes
    state: JobState
    status: int
    backend: str
    ended_ms: int
    result_ttl_ms: int
    token: bytes = b""  # of the run, whose lease ends with it; empty if it is none's, and counts whatever runs
    inbox: str = ""
    endpoint: str = ""
    callback: str = ""  # the URL that is told of it
    stage: Stage | None = None
    member: Member | None = None

    @property
    def outbox_entry(self) -> bytes:
        """What the outbox says of it; empty if nothing follows from it."""
        note = EndNote(self.id, self.state, self.ended_ms, self.endpoint, self.callback, self.stage)
        return _encode(note) if note.sequels else b""

    @property
    def last_of_group_entry(self) -> bytes:
        """What the outbox says if all jobs of its group have ended with this one; empty without a group."""
        if self.member is None:
            return b""
        return _encode(EndNote(self.id, self.state, self.ended_ms, self.endpoint, group=self.member.group))


class Sequel(Enum):
    """What may follow from the end of a job."""

    WEBHOOK = "webhook"
    STAGE = "next stage of a pipeline"
    CHORD = "job that gets the results of a group"


class EndNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry of the outbox, the stream `ends`: the end of a job from which something follows. The leading controller does that, and then
    removes the entry."""

    id: str
    state: JobState
    ended_ms: Whole
    endpoint: str = ""
    callback: str = ""
    stage: Stage | None = None
    group: str = ""  # all jobs of that group have ended with it, and another one follows

    @property
    def sequels(self) -> tuple[Sequel, ...]:
        follows = ((Sequel.WEBHOOK, self.callback), (Sequel.STAGE, self.stage), (Sequel.CHORD, self.group))
        return tuple(sequel for sequel, wanted in follows if wanted)

    @classmethod
    def from_bytes(cls, raw: bytes) -> EndNote:
        """Raises BadEnvelope."""
        return _parsed(_decode_end, raw, "an entry of the outbox")


def priority_name(number: int) -> str:
    """Returns the word for a priority; of one that only a direct publisher can set, the number."""
    return next((name for name, its in PRIORITIES.items() if its == number), str(number))


def state_of(result: Result) -> JobState:
    """Returns the state that a result means."""
    if result.outcome is Outcome.CANCELLED:
        return JobState.CANCELLED
    if result.error is not None or result.status >= 500:
        return JobState.FAILED
    return JobState.SUCCEEDED


def facts_of(backend: str, envelope: Envelope, now_ms: int) -> JobFacts:
    """Returns what a record says of the job in a message, for those who find it without one: its sender had no time to write it, or is a
    direct publisher."""
    header, priority = envelope.header, envelope.priority
    endpoint, expires_ms = header.meta.endpoint, header.deadline
    if (head := header.job) is None:
        return JobFacts(backend, endpoint, now_ms, expires_ms, priority=priority)
    return JobFacts(
        backend, endpoint, head.created_ms or now_ms, expires_ms, head.not_before_ms, priority, head.tag, head.retry_of, head.callback,
        head.stage, member=head.member,
    )  # fmt: skip


def score_of(facts: JobFacts, again_ms: int = 0) -> int:
    """Returns the place of a job among those of its backend that wait: by priority, then by time. `again_ms`: when it is tried again. An
    integer that a double holds exactly, since Redis's scores are doubles."""
    return (9 - min(facts.priority, 9)) * 10**13 + max(facts.created_ms, facts.not_before_ms, again_ms)


def matches(record: JobRecord, backend: str, tag: str, states: Sequence[str]) -> bool:
    """Whether a list with these filters has the job; an empty filter lets all pass."""
    facts = record.facts
    return (not backend or facts.backend == backend) and (not tag or facts.tag == tag) and (not states or record.state in states)


def event_entry(future_id: str, seq: int, event: bytes) -> bytes:
    """Returns the inbox entry that tells of an event of a job."""
    return InboxEntry(1, future_id, EVENT_KIND, seq, event).to_bytes()


def record_of(future_id: str, fields: Mapping[bytes, bytes], *, has_result: bool) -> JobRecord:
    """Reads the fields of a record. Raises BadEnvelope for what is none."""
    try:
        return _record_of(future_id, fields, has_result)
    except (ValueError, msgspec.MsgspecError) as error:
        raise BadEnvelope(f"the record of job {future_id} does not parse ({error}): another program or version wrote it") from error


def _record_of(future_id: str, fields: Mapping[bytes, bytes], has_result: bool) -> JobRecord:
    facts = _parsed(_decode_facts, fields[b"facts"], "what is known of a job") if b"facts" in fields else JobFacts(backend="")
    started = sorted((int(name[4:]), raw) for name, raw in fields.items() if name.startswith(b"run:"))
    ended = {int(name[4:]): raw for name, raw in fields.items() if name.startswith(b"end:")}
    attempts = tuple(_attempt(number, raw, ended.get(number)) for number, raw in started)
    final = fields.get(b"state")
    if final is not None:
        state = JobState(final.decode())
    elif attempts and attempts[-1].number not in ended:
        state = JobState.RUNNING
    else:
        state = JobState.QUEUED
    progress = fields.get(b"progress")
    return JobRecord(
        id=future_id, facts=facts, state=state, started_ms=attempts[0].started_ms if attempts else 0,
        ended_ms=int(fields.get(b"ended", 0)), status=int(fields.get(b"status", 0)), attempts=attempts,
        progress=None if progress is None else JobEvent.from_bytes(progress), has_result=has_result,
        has_begun=b"runs" in fields,
    )  # fmt: skip


def _attempt(number: int, started: bytes, ended: bytes | None) -> Attempt:
    attempt = _parsed(_decode_attempt, started, "a run of a job")
    if ended is None:
        return msgspec.structs.replace(attempt, number=number)
    end = _parsed(_decode_attempt, ended, "a run of a job")
    return msgspec.structs.replace(attempt, number=number, ended_ms=end.ended_ms, error=end.error, again_ms=end.again_ms)


def _parsed(decode: Callable[[bytes], T], raw: bytes, what: str) -> T:
    try:
        return decode(raw)
    except UNPARSABLE as error:
        raise BadEnvelope(f"{what} does not parse ({error}): another program or version wrote it") from error


_encode = msgspec.msgpack.Encoder().encode
_decode_facts = msgspec.msgpack.Decoder(JobFacts).decode
_decode_attempt = msgspec.msgpack.Decoder(Attempt).decode
_decode_event = msgspec.msgpack.Decoder(JobEvent).decode
_decode_end = msgspec.msgpack.Decoder(EndNote).decode
