"""`mqserve status`: the facts about an instance, collected within two seconds; `status_table.py` prints them for people.

Facts that an unreachable server would know are reported as unknown: people ask for a status just when something is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeVar

import click
import msgspec
from rich.console import Console

from ..broker.errors import BadEnvelope, MQServeError, StoreUnavailable, WrongType, words_of
from ..broker.queue import Queue
from ..broker.rabbitmq.queue import open_rabbitmq
from ..broker.redis.refusals import REFUSED_WRITES, refusal_code
from ..broker.redis.store import open_redis
from ..broker.settings import Settings, masked
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.times import utc
from ..controller import lease
from ..controller.cron import next_time
from ..controller.state.beats import Beat, Kind, MemberState, NodeBeat, ProxyBeat, ReplicaBeat, read_beats
from ..controller.state.documents import Desired, Observed, Schedule, deaths_of
from ..controller.state.firings import Firing, problem_of, read_firings
from ..controller.state.reading import read_desired, read_observed
from ..instance.role_lock import played_here
from .status_table import make_console, print_facts

CONNECT_BUDGET_S = 0.8
BUDGET_S = 1.2  # for all reads, connecting included; starting the process takes further time
_MARGIN_S = 0.1
_IN_THE_STORE = "what the store has of it"
_IN_THE_BROKER = "what waits, and dead letters"
_MEMBERS = "its members"
T = TypeVar("T")


class ServerFacts(msgspec.Struct, frozen=True):
    """RabbitMQ or Redis. `trouble` says in a sentence why it is not up."""

    url: str
    state: Literal["up", "away", "takes no writes"]
    trouble: str = ""


class ControllerFacts(msgspec.Struct, frozen=True):
    """The leading controller. `silent_s` is the seconds since its last beat; null if unknown."""

    state: Literal["leads", "starting", "missing", "unknown"]
    id: str = ""
    silent_s: float | None = None


class MemberFacts(msgspec.Struct, frozen=True):
    """A supervisor, node, proxy or replica. `state` is what it reports (starting, ready, draining, failed), `gone` after six seconds
    without a beat, or `unknown` while the store takes no beats; `said` is always what it reported last."""

    kind: str
    id: str
    state: MemberState | Literal["gone", "unknown"]
    said: MemberState
    silent_s: float
    node: str
    host: str
    pid: int
    url: str
    external: bool
    backend: str = ""
    version: int = 0
    running: int = 0
    served: int = 0
    trouble: str = ""


class BackendFacts(msgspec.Struct, frozen=True):
    """A backend. `waiting`, `jobs` (which wait in their own queue) and `dead_letters` are null if RabbitMQ does not answer."""

    name: str
    code: str
    version: int
    state: Literal["ready", "starting", "failing", "unknown"]
    ready: int
    wanted: int
    waiting: int | None
    dead_letters: int | None
    trouble: str
    jobs: int | None = None


class EndpointFacts(msgspec.Struct, frozen=True):
    name: str
    route: str | None
    methods: tuple[str, ...]
    traffic: dict[str, float]
    shadows: dict[str, float]
    prefix: bool
    stages: tuple[str, ...] = ()  # of a pipeline: the endpoints that its requests go through


class ScheduleFacts(msgspec.Struct, frozen=True):
    """A schedule. Times are in UTC; `next_at` is null while it is paused, `last_at` before its first firing, whose job is `last_job`."""

    name: str
    endpoint: str
    cron: str
    timezone: str
    catch_up: str
    paused: bool
    next_at: datetime | None
    last_at: datetime | None
    last_job: str
    trouble: str

    @classmethod
    def of(cls, schedule: Schedule, last: Firing | None, observed: Observed, now_ms: int) -> ScheduleFacts:
        return cls(
            schedule.name, schedule.endpoint, schedule.cron, schedule.timezone, schedule.catch_up, schedule.paused,
            _at(next_time(schedule, now_ms)), _at(last.at if last is not None and last.job else None),
            last.job if last is not None else "", observed.problems.get(problem_of(schedule.name), ""),
        )  # fmt: skip


class Facts(msgspec.Struct, frozen=True):
    """All facts. `problems` maps a name to what is wrong with it, `unknown` lists what could not be read, with the reason. `here` lists
    which of a detached instance's three processes run on this machine, which needs no server to find out."""

    namespace: str
    state: Literal["runs", "drains", "none", "unknown"]
    instance: str
    started_by: str
    detached: bool
    controller: ControllerFacts
    broker: ServerFacts
    store: ServerFacts
    members: tuple[MemberFacts, ...] = ()
    backends: tuple[BackendFacts, ...] = ()
    endpoints: tuple[EndpointFacts, ...] = ()
    schedules: tuple[ScheduleFacts, ...] = ()
    problems: dict[str, str] = {}
    unknown: dict[str, str] = {}
    here: tuple[str, ...] = ()

    @property
    def is_well(self) -> bool:
        """Whether a controller leads and both servers work; the exit code says the same."""
        return self.controller.state == "leads" and self.broker.state == self.store.state == "up"


async def show_status(settings: Settings, *, as_json: bool = False, console: Console | None = None) -> int:
    """Prints the status. Returns exit code 0 if a controller leads the instance and both servers are up. Raises InstanceError if there is
    no instance, except as JSON, which has a field for that."""
    async with read_facts(settings) as facts:
        if as_json:
            print(msgspec.json.format(msgspec.json.encode(facts)).decode(), flush=True)
        elif facts.state == "none":
            raise lease.no_instance()
        else:
            print_facts(console or make_console(), facts)
            for why in dict.fromkeys([facts.broker.trouble, facts.store.trouble, *facts.unknown.values()]):
                if why:
                    click.echo(f"Error: {why}", err=True)
    return 0 if facts.is_well else 1


@asynccontextmanager
async def read_facts(settings: Settings) -> AsyncIterator[Facts]:
    """Yields the facts within BUDGET_S, also if a server does not answer. Closes the connections after that, which may take longer."""
    until = asyncio.get_running_loop().time() + BUDGET_S
    async with AsyncExitStack() as stack:
        (store, store_trouble), (queue, broker_trouble) = await asyncio.gather(
            _opened(stack, open_redis(settings.store_url, settings.namespace), settings.store_url),
            _opened(
                stack, open_rabbitmq(settings.broker_url, settings.namespace, "status", budget_s=CONNECT_BUDGET_S), settings.broker_url
            ),
        )
        stored = await _in_time(_read_stored(settings, store), until) if store is not None else None
        stored = stored or _Stored(unknown={_IN_THE_STORE: store_trouble or "Redis did not answer in time"})
        counts = await _in_time(_count(queue, stored), until) if queue is not None else None
        if counts is None and stored.desired.backends:
            stored.unknown[_IN_THE_BROKER] = broker_trouble or "RabbitMQ did not answer in time"
        broker = ServerFacts(masked(settings.broker_url), "away" if broker_trouble else "up", broker_trouble)
        yield _facts(settings.namespace, broker, _store_facts(settings, store_trouble, stored), stored, counts or {})


async def _opened(stack: AsyncExitStack, server: AbstractAsyncContextManager[T], url: str) -> tuple[T | None, str]:
    """Returns (connection, ""), or (None, the reason). A connection that is late is abandoned, since even closing it may take seconds."""
    opening = asyncio.create_task(server.__aenter__())
    await asyncio.wait([opening], timeout=CONNECT_BUDGET_S + _MARGIN_S)
    if not opening.done():
        opening.cancel()
        return None, f"no answer from {masked(url)} within {CONNECT_BUDGET_S:g} s"
    if (error := opening.exception()) is None:
        stack.push_async_callback(_close, server)
        return opening.result(), ""
    if not isinstance(error, MQServeError):
        raise error
    return None, words_of(error)


async def _close(server: AbstractAsyncContextManager[object]) -> None:
    closing = asyncio.ensure_future(server.__aexit__(None, None, None))
    await asyncio.wait([closing], timeout=_MARGIN_S)


async def _in_time(reading: Coroutine[Any, Any, T], until: float) -> T | None:
    try:
        async with asyncio.timeout_at(until):
            return await reading
    except TimeoutError:
        return None


@dataclass
class _Stored:
    """The facts read from the store, as far as they could be read."""

    lease: lease.InstanceLease | None = None
    desired: Desired = field(default_factory=Desired)
    observed: Observed = field(default_factory=Observed)
    firings: dict[str, Firing] = field(default_factory=dict)
    beats: list[Beat] = field(default_factory=list)
    now_ms: int = 0
    is_empty: bool = False
    refusal: str = ""  # why the store takes no writes
    problems: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


async def _read_stored(settings: Settings, store: Store) -> _Stored:
    keys = StoreKeys(settings.namespace)
    found = _Stored()
    try:
        documents = [keys.instance, keys.desired, keys.observed, keys.firings]
        raw_lease, raw_desired, raw_observed, raw_firings = await store.get_documents(documents)
    except StoreUnavailable as error:
        found.unknown[_IN_THE_STORE] = str(error)
        return found
    found.now_ms, found.is_empty = store.now_ms(), raw_lease is None and raw_desired is None
    found.lease = _document(found, keys.instance, lambda: lease.decode_lease(raw_lease) if raw_lease is not None else None, None)
    found.desired = _document(found, keys.desired, lambda: read_desired(raw_desired), Desired())
    found.observed = _document(found, keys.observed, lambda: read_observed(raw_observed), Observed())
    found.firings = _document(found, keys.firings, lambda: read_firings(raw_firings), {})
    try:
        found.beats = list(read_beats(await store.fields(keys.beats)).values())
    except WrongType as error:
        found.problems[keys.beats] = str(error)
        found.unknown[_MEMBERS] = "none of them can report"
    except StoreUnavailable as error:
        found.unknown[_MEMBERS] = str(error)
    try:
        await store.probe()
    except StoreUnavailable as error:
        if refusal_code(error.__cause__) in REFUSED_WRITES:
            found.refusal = str(error)
        else:
            found.unknown["whether the store takes writes"] = str(error)
    return found


def _document(found: _Stored, key: str, decode: Callable[[], T], default: T) -> T:
    try:
        return decode()
    except BadEnvelope as error:
        found.problems[key] = f"{error} (redis-cli DEL {key})"
        return default


class _Counts(NamedTuple):
    """What RabbitMQ has of a backend; None where it does not answer."""

    waiting: int | None = None
    jobs: int | None = None
    dead_letters: int | None = None


async def _count(queue: Queue, stored: _Stored) -> dict[str, _Counts]:
    """Returns the counts by backend."""
    refusals: set[str] = set()

    async def asked(count: Awaitable[int | None]) -> int | None:
        try:
            return await count or 0
        except MQServeError as error:
            refusals.add(str(error))
            return None

    async def of_one(name: str) -> _Counts:
        observed = stored.observed
        generations = [(generation, observed.shards_of(name, generation)) for generation in observed.queues.get(name, ())]
        both = _sum([await asked(queue.depth(name, generation, shards)) for generation, shards in generations])
        jobs = _sum([await asked(queue.count_jobs(name, generation)) for generation, _ in generations])
        waiting = max(0, both - jobs) if both is not None and jobs is not None else None  # it was counted first
        return _Counts(waiting, jobs, await asked(queue.count_dead(name)))

    names = list(stored.desired.backends)
    counts = dict(zip(names, await asyncio.gather(*map(of_one, names)), strict=True))
    if refusals:
        stored.unknown[_IN_THE_BROKER] = "; ".join(sorted(refusals))
    return counts


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


# Turns the documents and beats into facts.


def _store_facts(settings: Settings, trouble: str, stored: _Stored) -> ServerFacts:
    state: Literal["up", "away", "takes no writes"] = "away" if trouble else "takes no writes" if stored.refusal else "up"
    return ServerFacts(masked(settings.store_url), state, trouble or stored.refusal)


def _facts(namespace: str, broker: ServerFacts, store: ServerFacts, stored: _Stored, counts: Mapping[str, _Counts]) -> Facts:
    is_known = bool(stored.now_ms)
    state: Literal["runs", "drains", "none", "unknown"] = "drains" if stored.desired.closing else "runs"
    if not is_known or stored.is_empty:
        state = "none" if is_known else "unknown"
    members = tuple(_member(beat, stored) for beat in sorted(stored.beats, key=_place))
    held = stored.lease
    return Facts(
        namespace, state, held.id if held else stored.desired.instance, held.owner if held else "", held is not None and held.detached,
        _controller(stored, is_known=is_known), broker, store, members,
        tuple(_backend(name, stored, members, counts.get(name, _Counts())) for name in stored.desired.backends),
        tuple(
            EndpointFacts(name, endpoint.route, endpoint.methods, endpoint.traffic, endpoint.shadows, endpoint.prefix, endpoint.stages)
            for name, endpoint in stored.desired.endpoints.items()
        ),
        tuple(
            ScheduleFacts.of(schedule, stored.firings.get(name), stored.observed, stored.now_ms)
            for name, schedule in stored.desired.schedules.items()
        ),
        _problems(stored, members), stored.unknown, tuple(played_here(namespace)),
    )  # fmt: skip


def _controller(stored: _Stored, *, is_known: bool) -> ControllerFacts:
    if not is_known or stored.lease is None:
        return ControllerFacts("unknown")
    silent_s = max(0.0, (stored.now_ms - stored.lease.at) / 1000)
    if silent_s < lease.LAPSED_AFTER_S:
        return ControllerFacts("leads" if stored.lease.leader else "starting", stored.lease.leader, silent_s)
    return ControllerFacts("unknown" if stored.refusal else "missing", stored.lease.leader, silent_s)


def _place(beat: Beat) -> tuple[int, str, str]:
    """The sort key of a member. Another version's beat may have a kind that this version does not know."""
    return list(Kind).index(Kind(beat.kind)) if beat.kind in list(Kind) else len(Kind), beat.kind, beat.id


def _member(beat: Beat, stored: _Stored) -> MemberFacts:
    state: MemberState | Literal["gone", "unknown"] = beat.state
    if not beat.is_recent(stored.now_ms) and beat.state is not MemberState.FAILED:
        state = "unknown" if stored.refusal else "gone"  # the store takes nobody's beats, so silence does not mean death
    silent_s = max(0.0, (stored.now_ms - beat.at) / 1000)
    refused = beat.refused if isinstance(beat, ProxyBeat | ReplicaBeat) else ""
    if isinstance(beat, ReplicaBeat):
        refused = refused or beat.convertor_error
    facts = MemberFacts(
        beat.kind, beat.id, state, beat.state, silent_s, beat.node, beat.host, beat.pid, beat.url, beat.external,
        trouble=refused or beat.error or beat.noted,
    )  # fmt: skip
    match beat:
        case ReplicaBeat():
            return msgspec.structs.replace(facts, backend=beat.backend, version=beat.version, running=beat.running, served=beat.served)
        case NodeBeat():
            return msgspec.structs.replace(facts, running=beat.running)
    return facts


def _backend(name: str, stored: _Stored, members: Sequence[MemberFacts], counts: _Counts) -> BackendFacts:
    backend = stored.desired.backends[name]
    mine = [member for member in members if member.kind == Kind.REPLICA and member.backend == name]
    ready = sum(member.said is MemberState.READY and member.state in (MemberState.READY, "unknown") for member in mine)
    wanted = backend.config.num_replicas
    state: Literal["ready", "starting", "failing", "unknown"] = "ready" if ready >= wanted else "starting"
    if any(member.state == "unknown" for member in mine):
        state = "unknown"
    problems = stored.observed.problems
    if trouble := problems.get(name) or problems.get(deaths_of(name), ""):
        state = "failing"
    elif backend.rolled_back:
        trouble = f"the last roll-out was undone: {backend.rolled_back}"
    return BackendFacts(
        name, backend.code_name, backend.version, state, ready, wanted, counts.waiting, counts.dead_letters, trouble, counts.jobs
    )


def _at(ms: int | None) -> datetime | None:
    return None if ms is None else utc(ms)


def _problems(stored: _Stored, members: Sequence[MemberFacts]) -> dict[str, str]:
    undone = {name: f"the last roll-out was undone: {b.rolled_back}" for name, b in stored.desired.backends.items() if b.rolled_back}
    told = {member.id: member.trouble for member in members if member.trouble and member.state not in ("gone", MemberState.FAILED)}
    return {**stored.problems, **undone, **told, **stored.observed.problems}
