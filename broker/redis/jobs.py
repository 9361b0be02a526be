"""The jobs of the distributed form: each method is a step that `jobs.lua` takes, but for reads of what may be long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, Protocol

from ..errors import BadEnvelope, StoreUnavailable, WrongType
from ..job_groups import ENDS, GroupFacts, GroupRecord, ends_in
from ..job_store import NumberedEvent, OnDone, PlacedEnd
from ..jobs import (
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
    Run,
    matches,
    record_of,
    score_of,
)
from ..results import EVENT_KIND, read_entry
from ..store_keys import StoreKeys
from .client import Client
from .job_script import JobScript, JobSteps, Step

_LISTED_AT_ONCE = 100  # records
_LOOKED_AT = 20_000  # records that a list reads at most


class Call(Protocol):
    """Makes a call to the store within its budget."""

    async def __call__(self, call: Callable[[], Awaitable[Any]]) -> Any: ...


class RedisJobs:
    """Implements `JobStore`."""

    def __init__(self, keys: StoreKeys, script: JobScript, client: Client, call: Call, now_ms: Callable[[], int]) -> None:
        self._keys = keys
        self._script = script
        self._client = client
        self._call = call
        self._now_ms = now_ms
        self._steps = JobSteps(script.take)
        self._notes = count(1)

    def __repr__(self) -> str:
        return f"<RedisJobs {self._steps!r}>"

    async def close(self, budget_s: float) -> None:
        """Takes the remaining steps within the budget."""
        await self._steps.close(budget_s)
        self._script.close()

    def hang_up(self) -> None:
        self._script.hang_up()

    # Writing.

    def add_then(self, future_id: str, facts: JobFacts, on_done: OnDone, message: bytes = b"") -> None:
        step = self._step(
            "add", future_id, *_EVENT_KEYS, waiting="" if facts.stages else self._keys.waiting(facts.backend),
            message_key=self._keys.message(future_id),
            facts=facts.to_bytes(), message=message, score=score_of(facts), created=facts.created_ms,
            event=_state(JobState.QUEUED, facts.created_ms),
        )  # fmt: skip
        self._steps.take_then(step, lambda outcome: on_done(_done(outcome)))

    async def begin(self, run: Run) -> Begun:
        attempt = Attempt(replica=run.replica, started_ms=run.now_ms, result_ttl_s=run.result_ttl_s)
        step = self._step(
            "begin", run.id, "future", "lease", *_EVENT_KEYS, waiting=self._keys.waiting(run.facts.backend), token=run.token,
            facts=run.facts.to_bytes(), created=run.facts.created_ms, run=attempt.to_bytes(), ttl=run.ttl_s * 1000,
            event=_state(JobState.RUNNING, run.now_ms), **self._pipeline(run),
        )  # fmt: skip
        match await self._steps.take(step):
            case [b"leased", int() as number]:
                return Leased(number)
            case [b"held", int() as left_ms]:
                return Held(left_ms)
            case [b"done", bytes() as result]:
                return Done(result)
            case other:
                raise _strange(other)

    def _pipeline(self, run: Run) -> dict[str, str | bytes | int]:
        if (pipeline := run.pipeline) is None:
            return {}
        keys = {key: getattr(self._keys, key)(pipeline.id) for key in _EVENT_KEYS}
        whole = {
            "id": pipeline.id, "record": self._keys.job(pipeline.id), **keys, "facts": pipeline.facts.to_bytes(),
            "created": pipeline.facts.created_ms, "note": JobEvent(EventKind.LOG, run.now_ms, text=pipeline.note).to_bytes(),
        }  # fmt: skip
        return {f"pipeline_{name}": value for name, value in whole.items()}

    async def renew(self, future_id: str, token: bytes) -> bool:
        return bool(await self._steps.take(self._step("renew", future_id, "lease", token=token)) == 1)

    async def try_again(self, future_id: str, token: bytes, attempt: Attempt, facts: JobFacts) -> bool:
        step = self._step(
            "try_again", future_id, "future", "lease", *_EVENT_KEYS, token=token, name=f"end:{attempt.number}", attempt=attempt.to_bytes(),
            waiting=self._keys.waiting(facts.backend), score=score_of(facts, attempt.again_ms),
            event=_state(JobState.QUEUED, attempt.ended_ms),
        )  # fmt: skip
        return bool(await self._steps.take(step) == 1)

    async def give_back(self, future_id: str, token: bytes, facts: JobFacts) -> None:
        step = self._step(
            "give_back", future_id, "lease", *_EVENT_KEYS, token=token, waiting=self._keys.waiting(facts.backend), score=score_of(facts),
            event=_state(JobState.QUEUED, self._now_ms()),
        )  # fmt: skip
        await self._steps.take(step)

    def end_then(self, end: JobEnd, on_done: OnDone) -> None:
        step = self._step(
            "end", end.id, "future", "lease", "waiters", "body", *_EVENT_KEYS,
            waiting=self._keys.waiting(end.backend), message_key=self._keys.message(end.id), result=end.result,
            note=end.note, outbox=end.outbox_entry, state=end.state, status=end.status, ended=end.ended_ms, ttl=end.result_ttl_ms,
            token=end.token, inbox=end.inbox,
            event=_state(end.state, end.ended_ms), **self._of_group(end),
        )  # fmt: skip
        self._steps.take_then(step, lambda outcome: on_done(_done(outcome)))

    def _of_group(self, end: JobEnd) -> dict[str, str | bytes | int]:
        if (member := end.member) is None:
            return {}
        keys: dict[str, str | bytes | int] = {"group": self._keys.group(member.group), "group_ends": self._keys.group_ends(member.group)}
        return {**keys, "number": member.number, "last_of_group": end.last_of_group_entry}

    def note(self, future_id: str, token: bytes, event: JobEvent) -> None:
        number = next(self._notes)  # by which the script knows one that is sent twice: each run has its notes from one process, in order
        step = self._step("note", future_id, *_EVENT_KEYS, token=token, number=number, kind=event.kind, event=event.to_bytes())
        self._steps.take_then(step, _not_missed)

    async def forget(self, future_id: str) -> bool:
        keys = {"message_key": self._keys.message(future_id), "result_body": self._keys.result_body(future_id)}
        return bool(await self._steps.take(self._step("forget", future_id, "future", "events", "body", **keys)) == 1)

    async def hold(self, future_id: str, facts: JobFacts) -> None:
        event = _state(JobState.QUEUED, facts.created_ms)
        await self._steps.take(self._step("hold", future_id, *_EVENT_KEYS, facts=facts.to_bytes(), created=facts.created_ms, event=event))

    async def keep_group(self, group_id: str, facts: GroupFacts, call: bytes = b"") -> None:
        await self._steps.take(
            Step("keep_group", self._keys.group(group_id), {"facts": facts.to_bytes(), "total": facts.total, "call": call})
        )

    # Reading.

    async def group(self, group_id: str) -> GroupRecord | None:
        found = _pairs(await self._steps.take(Step("group", self._keys.group(group_id), {})))
        if b"facts" not in found:
            return None
        counts = {state: _number(found.get(state.encode(), b"0")) for state in ENDS}
        return GroupRecord(GroupFacts.from_bytes(found[b"facts"]), counts, found.get(b"call", b""))

    async def group_ends(self, group_id: str) -> Mapping[int, JobState]:
        key = self._keys.group_ends(group_id)
        try:
            found: Any = await self._call(lambda: self._client.get(key))
        except WrongType:
            return {}
        return ends_in(found or b"")

    async def read(self, future_id: str) -> JobRecord | None:
        return _record(future_id, await self._steps.take(self._step("read", future_id, "future")))

    async def message(self, future_id: str) -> bytes | None:
        key = self._keys.message(future_id)
        try:
            found: Any = await self._call(lambda: self._client.get(key))
        except WrongType:
            return None
        return found  # type: ignore[no-any-return]

    async def wait(self, future_id: str, inbox: str) -> JobRecord | None:
        return _record(future_id, await self._steps.take(self._step("wait", future_id, "future", "waiters", inbox=inbox)))

    async def follow(self, future_id: str, inbox: str) -> JobRecord | None:
        return _record(future_id, await self._steps.take(self._step("follow", future_id, "future", "followers", inbox=inbox)))

    async def events(self, future_id: str, after: int = 0) -> Sequence[NumberedEvent]:
        key = self._keys.events(future_id)
        try:
            found: Any = await self._call(lambda: self._client.lrange(key, -_LATEST_EVENTS if after else 0, -1))
            events = _events(found)
            if after and len(found) == _LATEST_EVENTS and not (events and events[0].seq <= after + 1):
                events = _events(await self._call(lambda: self._client.lrange(key, 0, -1)))
        except WrongType:
            return []
        return [event for event in events if event.seq > after]

    async def place(self, future_id: str, facts: JobFacts) -> int | None:
        found = await self._steps.take(self._step("place", future_id, waiting=self._keys.waiting(facts.backend)))
        return found if isinstance(found, int) and found >= 0 else None

    async def ends(self, at_most: int, after: str = "") -> Sequence[PlacedEnd]:
        first = f"({after}" if after else "-"
        try:
            found: Any = await self._call(lambda: self._client.xrange(self._keys.ends, min=first, count=at_most))
        except WrongType:
            return []  # the next end replaces it
        return [PlacedEnd(place.decode(), fields.get(b"end", b"")) for place, fields in found]

    async def drop_ends(self, *places: str) -> None:
        with suppress(WrongType):
            await self._call(lambda: self._client.xdel(self._keys.ends, *places))

    async def list(self, *, backend: str = "", tag: str = "", states: Sequence[str] = (), at_most: int = 100) -> Sequence[JobRecord]:
        records: list[JobRecord] = []
        async for ids in self._ids():
            for record in await asyncio.gather(*map(self._read_if_sound, ids)):
                if record is not None and matches(record, backend, tag, states):
                    records.append(record)
            if len(records) >= at_most:
                break
        return records[:at_most]

    async def _ids(self) -> AsyncIterator[Sequence[str]]:
        """Yields the ids of the latest jobs, page by page, each once. A page begins at the time of the last job before it, since jobs that
        come and go meanwhile change the ranks of the others."""
        seen: set[bytes] = set()
        before: float | str = "+inf"
        passed = 0  # of that time
        while len(seen) < _LOOKED_AT:
            page = partial(self._client.zrange, self._keys.jobs, before, "-inf", desc=True, byscore=True)
            found: Any = await self._call(partial(page, offset=passed, num=_LISTED_AT_ONCE, withscores=True))
            yield [raw.decode(errors="replace") for raw, _ in found if raw not in seen]
            if len(found) < _LISTED_AT_ONCE:
                return
            seen.update(raw for raw, _ in found)
            last = found[-1][1]
            passed = sum(score == last for _, score in found) + (passed if last == before else 0)
            before = last

    async def _read_if_sound(self, future_id: str) -> JobRecord | None:
        try:
            return await self.read(future_id)
        except BadEnvelope:
            return None

    def _step(self, name: str, future_id: str, /, *keys: str, **arguments: str | bytes | int) -> Step:
        """`keys` are names of keys of this job, which are those of the script's arguments, too."""
        found: dict[str, str | bytes | int] = {key: getattr(self._keys, key)(future_id) for key in keys}
        return Step(name, self._keys.job(future_id), {"id": future_id, **found, **arguments})


_EVENT_KEYS = ("events", "followers")
_LATEST_EVENTS = 8  # are read first where those before them are known: most renewals find nothing new


def _state(state: JobState, at_ms: int) -> bytes:
    return JobEvent(EventKind.STATE, at_ms, state).to_bytes()


def _done(outcome: Any) -> bool | Exception:
    return outcome if isinstance(outcome, Exception) else outcome == 1


def _not_missed(outcome: Any) -> None:
    """An event that is lost is not missed; if that was a chunk, the offset of the next one says so, or the length of the result."""


def _record(future_id: str, outcome: Any) -> JobRecord | None:
    match outcome:
        case [[*_] as found, int() as has_result]:
            fields = _pairs(found)
            return record_of(future_id, fields, has_result=bool(has_result)) if fields else None
    raise _strange(outcome)


def _pairs(outcome: Any) -> dict[bytes, bytes]:
    """Returns the fields of a hash."""
    match outcome:
        case [*pairs] if len(pairs) % 2 == 0 and all(isinstance(part, bytes) for part in pairs):
            return dict(zip(pairs[::2], pairs[1::2], strict=True))
    raise _strange(outcome)


def _number(raw: bytes) -> int:
    """Raises BadEnvelope."""
    if not raw.isdigit():
        raise BadEnvelope(f"a count of a group does not parse ({raw[:20]!r}): another program wrote it")
    return int(raw)


def _events(found: Any) -> list[NumberedEvent]:
    return [event for raw in found if (event := _event(raw)) is not None]


def _event(raw: bytes) -> NumberedEvent | None:
    """What an inbox was told of the same event. An entry of another shape is not ours."""
    entry = read_entry(raw)
    if entry is None or entry.kind != EVENT_KIND:
        return None
    try:
        return NumberedEvent(entry.seq, JobEvent.from_bytes(entry.payload))
    except BadEnvelope:
        return None


def _strange(outcome: Any) -> StoreUnavailable:
    return StoreUnavailable(f"Redis answered a step of a job with {str(outcome)[:100]!r}: its script is another version's")
