"""`mqserve jobs`: lists jobs, shows, cancels, retries, watches and forgets them. No command opens a pickle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..broker.callbacks import receiver_of
from ..broker.calls.job_sending import JobSender
from ..broker.envelope import mint_id
from ..broker.errors import BadValue, JobGoesOn, MQServeError, ResultGone, UnknownJob
from ..broker.job_groups import GroupRecord, member_id
from ..broker.job_store import JobStore
from ..broker.jobs import JobEvent, JobRecord, JobState, priority_name
from ..broker.overload import HeldBytes
from ..broker.process.printable import printable
from ..broker.redis.store import open_redis
from ..broker.result_bodies import forget_job
from ..broker.results import Result
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.times import rfc3339
from ..connections import Connections, open_connections
from ..controller import lease
from .printing import print_about, print_json, print_sentence, when
from .status_table import fitting_table, make_console, print_table

ASK_ABOVE = 10
_LOOK_EVERY_S = 1.0
_AT_MOST = 10_000  # jobs that one command acts on
_COLORS = {
    JobState.RUNNING: "yellow",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.EXPIRED: "red",
    JobState.CANCELLED: "dim",
}
UNENDED = (JobState.QUEUED, JobState.RUNNING)
ENDED = tuple(state for state in JobState if state.is_final)
FAILED = (JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)


class Filter(NamedTuple):
    """Which jobs a list has."""

    backend: str = ""
    tag: str = ""
    states: tuple[JobState, ...] = ()


class Selection(NamedTuple):
    """The jobs that a command acts on: those with these ids, or those that the filter lets through."""

    ids: tuple[str, ...]
    filter: Filter

    @classmethod
    def read(cls, ids: tuple[str, ...], filter: Filter, *, everything: bool) -> Selection:
        """Parses the arguments. Raises BadValue for none of them, and for ids beside a filter."""
        is_filtered = everything or filter != Filter()
        if bool(ids) == is_filtered:
            raise BadValue("name jobs by their ids, as `mqserve jobs list` shows them, or choose by --backend, --tag, --state or --all")
        return cls(ids, filter)


async def list_jobs(settings: Settings, filter: Filter, limit: int, *, as_json: bool, console: Console | None = None) -> int:
    """Prints the latest jobs as a table, or as JSON, one per line. Raises InstanceError where there are neither jobs nor an instance."""
    console = console or make_console()
    async with _opened(settings) as (store, keys):
        jobs = store.jobs
        found = await _listed(jobs, filter, limit)
        if not found and await store.get(keys.desired) is None:
            raise lease.no_instance()
        if as_json:
            return print_json(console, [facts_of(record, await _place(jobs, record)) for record in found])
    if not found:
        return print_sentence(console, "There are no such jobs." if filter != Filter() else "There are no jobs.")
    print_table(console, table_of(console, found, limit))
    return 0


async def watch_jobs(settings: Settings, filter: Filter, limit: int, *, as_json: bool, console: Console | None = None) -> int:
    """Shows the latest jobs until it is interrupted: as a table that changes in a terminal, else a line, or JSON, for each that is new or
    has changed its state."""
    console = console or make_console()
    seen: dict[str, JobState] = {}
    async with _opened(settings) as (store, _):
        with ExitStack() as stack:
            live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal and not as_json else None
            while True:
                found = await _listed(store.jobs, filter, limit)
                if live is not None:
                    live.update(table_of(console, found, limit), refresh=True)
                else:
                    _print_changes(console, [record for record in reversed(found) if seen.get(record.id) != record.state], as_json)
                    seen = {record.id: record.state for record in found}
                await asyncio.sleep(_LOOK_EVERY_S)


def _print_changes(console: Console, records: Sequence[JobRecord], as_json: bool) -> None:
    for record in records:
        facts = facts_of(record, None)
        if as_json:
            print_json(console, [facts])
        else:
            words = (facts["id"], facts["status"], facts["endpoint"] or facts["backend"], facts["tag"])
            print_sentence(console, " ".join(printable(word) for word in words if word))
    console.file.flush()


async def show_jobs(settings: Settings, ids: Sequence[str], *, as_json: bool, console: Console | None = None) -> int:
    """Prints all that is known of each job, and the counts of a group. Raises BadValue for an unknown id, after the others."""
    console = console or make_console()
    missing: list[str] = []
    async with _connected(settings) as connections:
        jobs = connections.store.jobs
        for job_id in ids:
            record = await jobs.read(job_id)
            if record is None:
                if (group := await jobs.group(job_id)) is None:
                    missing.append(job_id)
                else:
                    _print_one(console, group_facts(job_id, group), as_json)
                continue
            facts = facts_of(record, await _place(jobs, record)) | {"error": await _error(connections, record)}
            facts["stages"] = [
                {"endpoint": stage.endpoint, "id": stage.id, "status": stage.state and stage.state.value}
                for stage in await _sender(connections).stages(record)
            ]
            facts["history"] = history_of(record)
            facts["events"] = [event_facts(number, event) for number, event in await jobs.events(job_id)]
            _print_one(console, facts, as_json)
    if missing:
        raise BadValue(no_such(missing))
    return 0


def _print_one(console: Console, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(console, [facts])
    else:
        print_about(console, facts)


async def purge_jobs(settings: Settings, selection: Selection, *, yes: bool, console: Console | None = None) -> int:
    """Removes record, result and events of jobs that have ended. Raises BadValue for ids that are unknown or have not ended."""
    return await act(settings, selection, PURGE, yes=yes, console=console)


async def cancel_jobs(settings: Settings, selection: Selection, *, yes: bool, console: Console | None = None) -> int:
    """Cancels jobs that have not ended, of a group all these. Raises MQServeError for ids that are unknown or have ended."""
    return await act(settings, selection, CANCEL, yes=yes, console=console)


async def retry_jobs(settings: Settings, selection: Selection, *, yes: bool, console: Console | None = None) -> int:
    """Sends jobs that have ended again, and prints the ids of the new ones. Raises ResultGone for one whose message is not kept."""
    console = console or make_console()

    async def retry(connections: Connections, record: JobRecord) -> bool:
        if record.facts.stage is not None and not selection.ids:
            return False  # its pipeline is retried
        new_id = mint_id()
        await _sender(connections).retry(record.id, new_id)
        console.print(f"{printable(record.id)} again as {new_id}", highlight=False, markup=False, soft_wrap=True)
        return True

    states = ENDED if selection.ids or selection.filter.states else FAILED
    again = Act("retry", "retried", states, "has not ended: cancel it first", retry, sends=True)
    return await act(settings, selection, again, yes=yes, console=console)


async def _cancel(connections: Connections, record: JobRecord) -> bool:
    return await _sender(connections).cancel(record.id)


def _sender(connections: Connections) -> JobSender:
    return JobSender(connections.queue, connections.store, connections.keys, HeldBytes(), connections.settings.signer)


async def _forget(connections: Connections, record: JobRecord) -> bool:
    return await forget_job(connections.store, connections.keys, record.id)


class Act(NamedTuple):
    """What a command does to jobs in these states. `step` returns False for one that has changed its state meanwhile."""

    verb: str
    done: str
    states: tuple[JobState, ...]
    refusal: str  # for one that was named and is in another state
    step: Callable[[Connections, JobRecord], Awaitable[bool]]
    takes_groups: bool = False  # the id of a group stands for its members
    sends: bool = False  # it needs RabbitMQ


CANCEL = Act("cancel", "cancelled", UNENDED, "has ended already", _cancel, takes_groups=True)
PURGE = Act("purge", "purged", ENDED, "has not ended: cancel it first", _forget)


async def act(settings: Settings, selection: Selection, act: Act, *, yes: bool, console: Console | None) -> int:
    """Does it to all jobs that are selected, and prints how many these were."""
    kept: list[str] = []
    count = 0
    async with _connected(settings, broker_may_be_away=not act.sends) as connections:
        records = await _selected(connections.store.jobs, selection, act, kept)
        if not selection.ids and len(records) > ASK_ABOVE and not yes:
            raise BadValue(f"there are {len(records)} such jobs: add --yes to {act.verb} them all")
        for record in records:
            try:
                taken = record.state in act.states and await act.step(connections, record)
            except (JobGoesOn, ResultGone, UnknownJob) as error:
                kept.append(printable(str(error)))
                continue
            count += taken
            if not taken and record.id in selection.ids:
                kept.append(f"job {printable(record.id)} {act.refusal}")
        told = f"{count} {act.done}." if count or selection.ids else await _none(connections.store.jobs, selection.filter, act)
    if kept:
        raise MQServeError("; ".join([f"{act.done}: {count}", *kept]))
    return print_sentence(console, told)


async def _none(jobs: JobStore, filter: Filter, act: Act) -> str:
    """Returns the sentence for a filter that found no job to act on: perhaps it lets others through."""
    others = len(await _listed(jobs, filter, _AT_MOST))
    if not others:
        return "There are no such jobs."
    *first, last = act.states
    there = "is 1 such job" if others == 1 else f"are {others} such jobs"
    return f"0 {act.done}: there {there}, and none that is {', '.join(first)} or {last}."


async def _selected(jobs: JobStore, selection: Selection, act: Act, kept: list[str]) -> Sequence[JobRecord]:
    """Returns the records of the jobs. Adds to `kept` why there is none for an id."""
    if not selection.ids:
        wanted = tuple(state for state in selection.filter.states or act.states if state in act.states)
        return await _listed(jobs, selection.filter._replace(states=wanted), _AT_MOST) if wanted else ()
    found: list[JobRecord] = []
    for job_id in selection.ids:
        if (record := await jobs.read(job_id)) is not None:
            found.append(record)
        elif (group := await jobs.group(job_id)) is None:
            kept.append(no_such([job_id]))
        elif act.takes_groups:
            found += await _members(jobs, job_id, group, act.states)
        else:
            kept.append(f"{printable(job_id)!r} is the id of a group, not of a job: {act.verb} its jobs by their own ids")
    return found


async def _members(jobs: JobStore, group_id: str, group: GroupRecord, states: tuple[JobState, ...]) -> list[JobRecord]:
    """Returns the records of a group's jobs that are in one of these states."""
    ended = await jobs.group_ends(group_id)
    places = [member_id(group_id, number) for number in range(group.facts.total) if ended.get(number, JobState.QUEUED) in states]
    records = [await jobs.read(place) for place in places]
    return [record for record in records if record is not None and record.state in states]


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[Store, StoreKeys]]:
    """For what does without RabbitMQ."""
    async with open_redis(settings.store_url, settings.namespace) as store:
        yield store, StoreKeys(settings.namespace)


@asynccontextmanager
async def _connected(settings: Settings, *, broker_may_be_away: bool = True) -> AsyncIterator[Connections]:
    async with open_connections(settings, "jobs", broker_may_be_away=broker_may_be_away) as connections:
        yield connections


async def _listed(jobs: JobStore, filter: Filter, at_most: int) -> Sequence[JobRecord]:
    return await jobs.list(backend=filter.backend, tag=filter.tag, states=filter.states, at_most=at_most)


async def _place(jobs: JobStore, record: JobRecord) -> int | None:
    waits = record.state is JobState.QUEUED and not record.facts.stages
    return await jobs.place(record.id, record.facts) if waits else None


async def _error(connections: Connections, record: JobRecord) -> dict[str, str] | None:
    """Returns the type and message of what its result says went wrong; None if there is no such result."""
    raw = await connections.store.get(connections.keys.future(record.id)) if record.has_result else None
    error = None if raw is None else Result.from_bytes(raw).error
    return None if error is None else {"type": error.type, "message": error.message}


# What is printed.


def group_facts(group_id: str, group: GroupRecord) -> dict[str, Any]:
    """Returns what is known of a group, and how many of its jobs have ended in which way."""
    facts, counts = group.facts, {state.value: count for state, count in group.ended.items()}
    return {
        "group": group_id,
        "endpoint": facts.endpoint,
        "created_at": rfc3339(facts.created_ms),
        "expires_at": rfc3339(facts.expires_ms),
        "total": facts.total,
        "pending": facts.total - sum(counts.values()),
        **counts,
        "then": facts.then,
    }


def facts_of(record: JobRecord, place: int | None) -> dict[str, Any]:
    """Returns what is known of a job, under the names that it has over HTTP."""
    facts, progress = record.facts, record.progress
    return {
        "id": record.id,
        "status": record.state.value,
        "backend": facts.backend,
        "endpoint": facts.endpoint,
        "created_at": rfc3339(facts.created_ms),
        "not_before": rfc3339(facts.not_before_ms),
        "expires_at": rfc3339(facts.expires_ms),
        "started_at": rfc3339(record.started_ms),
        "ended_at": rfc3339(record.ended_ms),
        "attempts": len(record.attempts),
        "progress": None if progress is None else progress.view(),
        "position": place,
        "http_status": record.status or None,
        "has_result": record.has_result,
        "priority": priority_name(facts.priority),
        "tag": facts.tag,
        "retry_of": facts.retry_of,
        "callback_host": receiver_of(facts.callback),
    }


def history_of(record: JobRecord) -> list[dict[str, Any]]:
    return [
        {
            "number": attempt.number,
            "replica": attempt.replica,
            "started_at": rfc3339(attempt.started_ms),
            "ended_at": rfc3339(attempt.ended_ms),
            "error": attempt.error,
            "again_at": rfc3339(attempt.again_ms),
        }
        for attempt in record.attempts
    ]


def event_facts(number: int, event: JobEvent) -> dict[str, Any]:
    return {"seq": number, "event": event.kind.value, **event.view()}


def table_of(console: Console, records: Sequence[JobRecord], limit: int) -> Any:
    """Returns rich's table of jobs, the latest first."""
    title = f"Jobs, the latest {limit}" if len(records) == limit else "Jobs"
    rows: list[list[Text]] = []
    for record in records:
        facts = record.facts
        target = facts.endpoint or facts.backend
        progress = "" if record.progress is None else progress_words(record.progress)
        words = (target, facts.tag, when(facts.created_ms) if facts.created_ms else "", str(len(record.attempts)), progress)
        state = Text(record.state.value, _COLORS.get(record.state, ""))
        rows.append([Text(printable(record.id)), state, *(Text(printable(word)) for word in words)])
    columns = ("id", "status", "for", "tag", "created", "runs", "progress")
    return fitting_table(console, title, columns, rows, ("runs", "tag", "created", "progress"))


def progress_words(event: JobEvent) -> str:
    return " ".join(word for word in ("" if event.fraction is None else f"{event.fraction:.0%}", event.text) if word)


def no_such(ids: Sequence[str]) -> str:
    return "; ".join(f"nothing is known of a job {printable(job_id)!r}: see `mqserve jobs list`" for job_id in ids)
