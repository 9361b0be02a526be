"""Jobs: requests that are kept until they are done, as Python sees them. `handle.submit` sends one, `serve.job` finds one by its id."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ..broker.calls.job_events import JobFollower
from ..broker.calls.job_sending import StageRecord
from ..broker.errors import BadValue
from ..broker.job_store import NumberedEvent
from ..broker.jobs import Attempt, EventKind, JobRecord, JobState, priority_name
from ..broker.process import forks
from ..broker.results import Result
from ..broker.times import utc
from ..broker.values.whole_numbers import whole_number
from .futures import Found, Future

if TYPE_CHECKING:
    from .job_calls import JobCalls


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """One run of a job. `error` says why it failed and `again_at` when the job is tried again; the last run has neither."""

    number: int
    replica: str
    started_at: datetime | None
    ended_at: datetime | None
    error: str
    again_at: datetime | None


@dataclass(frozen=True, slots=True)
class JobStage:
    """One stage of a pipeline: a job with an id of its own. Without a state it is not sent yet."""

    endpoint: str
    id: str
    state: JobState | None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What is known of a job at one moment."""

    id: str
    state: JobState
    backend: str
    endpoint: str
    created_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    not_before: datetime | None
    expires_at: datetime | None
    attempts: int
    history: tuple[JobAttempt, ...]
    progress: float | None
    message: str
    """The text of the last progress."""
    position: int | None
    """How many jobs of the backend are before it, an estimate; None once it has begun."""
    status: int
    """The HTTP status of its result; 0 while it has none."""
    has_result: bool
    """Whether its result can be read. It is kept for `result_ttl_s`, the record for twice as long."""
    priority: str
    tag: str
    retry_of: str
    stages: tuple[JobStage, ...] = ()
    """Those of a pipeline, in order."""

    @classmethod
    def of(cls, record: JobRecord, position: int | None, stages: Sequence[StageRecord] = ()) -> JobStatus:
        facts, progress = record.facts, record.progress
        return cls(
            id=record.id,
            state=record.state,
            backend=facts.backend,
            endpoint=facts.endpoint,
            created_at=_time(facts.created_ms),
            started_at=_time(record.started_ms),
            ended_at=_time(record.ended_ms),
            not_before=_time(facts.not_before_ms),
            expires_at=_time(facts.expires_ms),
            attempts=len(record.attempts),
            history=tuple(map(_attempt, record.attempts)),
            progress=None if progress is None else progress.fraction,
            message="" if progress is None else progress.text,
            position=position,
            status=record.status,
            has_result=record.has_result,
            priority=priority_name(facts.priority),
            tag=facts.tag,
            retry_of=facts.retry_of,
            stages=tuple(JobStage(stage.endpoint, stage.id, stage.state) for stage in stages),
        )


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job: a change of its state, a `serve.progress` or a `serve.log` of its handler, or a `chunk`: what the
    handler has yielded since the one before, as `text` (values that are no text as lines of JSON), or as `data` if it is bytes."""

    seq: int
    """Its number, behind which `Job.events(after=seq)` goes on. Numbers grow."""
    kind: EventKind
    at: datetime | None
    state: JobState | None
    fraction: float | None
    text: str
    data: bytes
    offset: int
    """Of a chunk: how many bytes this run has told before, text as UTF-8. 0 is a new run; a hole is a chunk that was lost."""
    cut: bool
    """Of a chunk: it is the last one, and only the result has what follows."""

    @classmethod
    def of(cls, numbered: NumberedEvent) -> JobEvent:
        event = numbered.event
        state = JobState(event.state) if event.state else None
        return cls(numbered.seq, event.kind, _time(event.at_ms), state, event.fraction, event.text, event.data, event.offset, event.cut)


class Job(Future):
    """A request that is kept until it is done; `handle.submit`, `serve.job` and `retry` return one. It is a future, too: `await` it in a
    coroutine, or call `result()` anywhere else, and `serve.get`, `serve.wait` and `serve.gather` take it. Nobody has to wait for it: any
    process finds it again by its id.

    Every method asks the store. In a coroutine that blocks for the time of one answer of Redis.
    """

    def __init__(self, job_id: str, source: Kept) -> None:
        super().__init__(job_id, source)

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a job does not pickle: pass on its id, and call serve.job(id) where it arrives")

    def status(self) -> JobStatus:
        """Returns what is known of it now. Raises UnknownJob if nothing is (any more), and StoreUnavailable."""
        kept = self._kept
        return kept.calls.status(kept.key)

    def events(self, after: int = 0) -> JobEvents:
        """Returns its events behind the one with that number, those of the past first, to iterate with `for`, or with `async for` in a
        coroutine, until it has ended. The latest thousand are kept. Raises BadValue for a number that no event has."""
        kept = self._kept
        return JobEvents(kept.key, kept.calls, after)

    def retry(self) -> Job:
        """Sends a job that has ended once more, as a new one, whose status names this one in `retry_of`; a result is written only once.
        Raises JobGoesOn for one that has not ended, UnknownJob, ResultGone if its request is not kept any more (ten minutes behind a
        success, else as long as its result), and the errors of `handle.submit`."""
        kept = self._kept
        return kept.calls.retry(kept.key, plain=kept.plain)

    @property
    def _kept(self) -> Kept:
        source = self.here()._source
        assert isinstance(source, Kept), "it was made with one"
        return source

    def _not_yet(self, limit_s: float) -> TimeoutError:
        known = "it goes on, and serve.job(id) finds it again"
        published = "wait again, if somebody published it to this backend: nothing is known of it before it begins"
        return TimeoutError(f"job {self.id} has no result yet after {limit_s:g} s; {known if self._kept.key == self.id else published}")


class Kept:
    """The result of a job. Each wait registers with the store, which tells this process of the end."""

    limit_s = None
    not_yet = state = ""

    def __init__(self, key: str, calls: JobCalls, *, plain: bool, expires_ms: int | None, found: Found | None = None) -> None:
        self.key = key
        self.calls = calls
        self.plain = plain
        self._expires_ms = expires_ms  # store time, 0 for never; None if it is not known whether there is such a job
        self._found = found

    def in_child(self, future_id: str) -> Kept:
        return Kept(self.key, self.calls.here(), plain=self.plain, expires_ms=self._expires_ms, found=self._found)

    @contextmanager
    def waiting(self) -> Iterator[concurrent.futures.Future[Found]]:
        if self._found is not None:
            done: concurrent.futures.Future[Found] = concurrent.futures.Future()
            done.set_result(self._found)
            yield done
            return
        pending = self.calls.first_result(self.key, self._expires_ms)
        try:
            yield pending
        finally:
            pending.cancel()

    def done(self) -> bool:
        return self._found is not None or self.calls.is_done(self.key)

    def cancel(self) -> bool:
        return self.calls.cancel(self.key)

    def read(self, key: str, result: Result) -> Any:
        self._found = (key, result)
        return self.calls.read(key, result, plain=self.plain)


class JobEvents:
    """The events of one job, see `Job.events`. A step that failed may be repeated."""

    def __init__(self, key: str, calls: JobCalls, after: int) -> None:
        number = whole_number(after)
        if number is None or number < 0:
            raise BadValue(f"after is the number of the last event that was taken (see `event.seq`), from 0 on, not {after!r}")
        self.seq = number
        """The number of the last event that was taken."""
        self._key = key
        self._calls = calls
        self._following: JobFollower | None = None
        self._depth = forks.depth

    def __repr__(self) -> str:
        return f"<JobEvents of {self._key} behind {self.seq}>"

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> JobEvent:
        return self._taken(self._calls_here().wait(self._next()), StopIteration)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobEvent:
        return self._taken(await self._calls_here().wait_soon(self._next()), StopAsyncIteration)

    def close(self) -> None:
        """Stops following the job; does nothing to the job. Letting the object go does the same."""
        if self._following is not None and self._depth == forks.depth:
            self._calls.stop(self._following)
        self._following = None

    def __del__(self) -> None:
        with suppress(AttributeError):  # of one whose making failed
            self.close()

    def _calls_here(self) -> JobCalls:
        if self._depth != forks.depth:
            self._calls, self._following, self._depth = self._calls.here(), None, forks.depth
        return self._calls

    async def _next(self) -> NumberedEvent | None:
        """Runs on the runtime thread."""
        if self._following is None:
            self._following = await self._calls.follow(self._key, self.seq)
        return await self._calls.next_event(self._following)

    def _taken(self, event: NumberedEvent | None, end: type[Exception]) -> JobEvent:
        if event is None:
            raise end
        self.seq = event.seq
        return JobEvent.of(event)


def _time(ms: int) -> datetime | None:
    return utc(ms) if ms else None


def _attempt(attempt: Attempt) -> JobAttempt:
    return JobAttempt(
        attempt.number, attempt.replica, _time(attempt.started_ms), _time(attempt.ended_ms), attempt.error, _time(attempt.again_ms)
    )
