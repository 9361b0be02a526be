"""The agent of one machine: reports its resources, and runs the replicas and the proxies that the controller assigns to it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from ..broker.calls.cancellations import notice_of_proxy, notice_of_replica
from ..broker.errors import InstanceError, StoreUnavailable, words_of
from ..broker.process.lifeline import Stop
from ..broker.process.ticks import next_tick_s
from ..broker.store import Store
from ..broker.store_keys import LOST_TTL_S, StoreKeys
from ..broker.values.signing import Signer
from .environments import check_environment, find_python
from .lost_files import put_back_files
from .machine_resources import replica_environment
from .node_metrics import FOLDER_VARIABLE, NodeMetrics
from .restarts import ENDED_WELL, Restarts
from .state.beats import BEAT_EVERY_S, PROXY_DRAIN_S, Beat, MemberState, NodeBeat, read_beats
from .state.config import BackendConfig
from .state.documents import Assignment, Desired, Observed
from .state.following import follow_state
from .state.presence import Presence
from .state.resources import ActorOptions, Capacity

logger = logging.getLogger(__name__)

SILENT_CHILD_AFTER_S = 20.0  # a replica or proxy whose I/O loop is silent for this long is killed
FORCED_GRACE_S = 2.0  # drain time of a replica whose backend is deleted by force: it tells its callers
STOP_MARGIN_S = 5.0  # after a child's own drain time; then it is killed
PARENT_GONE_S = 6.0  # drain time of the children when the node's own parent is gone
NAME_WATCHED_FOR_S = 3.0
_CHECK_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1


class Child(Protocol):
    """A replica or proxy that this node started."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> str:
        """Returns how it ended: an empty string for a clean end, else a reason for operators."""
        ...

    def stop(self) -> None:
        """Tells it to drain and end."""
        ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Share:
    """The variables and the interpreter that keep a replica to its share of the node."""

    environment: Mapping[str, str]
    python: str


class Launcher(Protocol):
    """Starts children, as processes or inside this process."""

    def replica(self, backend: str, replica_id: str, node: str, share: Share) -> Child: ...

    def proxy(self, proxy_id: str, host: str, port: int, node: str, *, shares_port: bool) -> Child:
        """Starts a proxy, beside those that still drain if need be, or as one of several that share the port."""
        ...

    def stop_listening(self) -> None:
        """Says that no proxy follows: once the last one drains, new connections are refused."""
        ...


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """Options of one node. `http_host`, `http_port` and `http_workers` override the instance's, since two nodes may share a machine, and
    machines differ.

    `ends_with_instance` is set for a detached starter's own node, which nobody else would end; other nodes wait for the next instance.
    `trouble` returns further problems of this machine, for operators.
    """

    node_id: str
    http_host: str | None = None
    http_port: int | None = None
    http_workers: int | None = None
    takes_proxy: bool = True
    capacity: Capacity = field(default_factory=Capacity)
    metrics: NodeMetrics | None = None  # None: the proxy of this process serves them
    ends_with_instance: bool = False
    trouble: Callable[[], str] = lambda: ""


@dataclass(eq=False, slots=True)
class _Running:
    child: Child
    watching: asyncio.Task[None]
    grace_s: float
    heard_at: int  # store ms of its last beat; at first, of the time when the first beat is due
    backend: str = ""
    worker: int = 0  # of a proxy: see `_workers`
    stopping: bool = False


async def check_name_is_free(store: Store, keys: StoreKeys, node_id: str) -> None:
    """Raises InstanceError if a living node has this name: both would run everything that is assigned to the name."""

    async def last_beat() -> Beat | None:
        return read_beats(await store.fields(keys.beats)).get(f"node:{node_id}")

    first = await last_beat()
    if first is None or not first.is_recent(store.now_ms()):
        return
    until = time.monotonic() + NAME_WATCHED_FOR_S
    while time.monotonic() < until:  # the beat may be that of a node that was killed a moment ago
        await asyncio.sleep(_LOOK_EVERY_S)
        if (beat := await last_beat()) is not None and beat.at != first.at:
            raise InstanceError(
                f"a node {node_id!r} runs already ({beat.host}, process {beat.pid}): choose another --node-id, or end that one"
            )


class Node:
    """The agent of one machine. It owns its children: none survives it."""

    def __init__(self, options: NodeOptions, store: Store, keys: StoreKeys, launcher: Launcher, signer: Signer) -> None:
        self._options = options
        self._signer = signer
        self._store = store
        self._keys = keys
        self._launcher = launcher
        self._replicas: dict[str, _Running] = {}
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._proxies: dict[str, _Running] = {}  # the current ones, and those that drain
        self._dead_proxies: dict[str, int] = {}  # whose last beats are to be dropped -> which worker it was
        self._announced_dead: set[str] = set()  # those of them whose death is in the cancellation log
        self._proxy_wanted = False
        self._proxy_restarts: defaultdict[int, Restarts] = defaultdict(Restarts)  # by worker
        self._desired = Desired()
        self._ended: dict[str, str] = {}
        self._stoppers: set[asyncio.Task[None]] = set()
        self._giving_back: asyncio.Task[None] | None = None  # files that the store lost
        self._is_draining = False
        self._tasks = asyncio.TaskGroup()  # entered by `run`; owns the tasks that watch children
        field = f"node:{options.node_id}"
        self._presence = Presence(store, keys.beats, field, lambda: self._beat().to_bytes(), BEAT_EVERY_S)

    def __repr__(self) -> str:
        return f"<Node {self._options.node_id}, {len(self._replicas)} replicas, {len(self._proxies)} proxies>"

    async def run(self, stop: Stop) -> None:
        """Runs until `stop` is set; then drains every child, and kills those that do not end."""
        async with asyncio.TaskGroup() as self._tasks:
            tasks = self._tasks
            working = [tasks.create_task(work) for work in (self._presence.beat_forever(), self._follow(stop), self._check_children())]
            await stop.wait()
            for task in working[1:]:
                task.cancel()
            self._is_draining = True
            self._presence.tell()
            await self._stop_all(PARENT_GONE_S if stop.orphaned else math.inf)
            await self._presence.leave(with_last_words=False)
            self._stop_giving_back()
            working[0].cancel()

    def _stop_giving_back(self) -> None:
        if self._giving_back is not None:
            self._giving_back.cancel()

    async def _follow(self, stop: Stop) -> None:
        async for desired, observed in follow_state(self._store, self._keys):
            if desired is None and self._desired.closing:  # the instance was cleared, so none of its processes may run on
                if self._options.ends_with_instance:
                    stop.set()
                    return
                observed = Observed()
            if observed is None:
                continue
            before, self._desired = self._desired, desired or Desired()
            if self._desired.epoch > before.epoch:  # the store lost data, and a controller wrote the documents back
                self._stop_giving_back()
                self._giving_back = self._tasks.create_task(put_back_files(self._store, self._keys, self._desired))
            mine = {name: assigned for name, assigned in observed.replicas.items() if assigned.node == self._options.node_id}
            self._reconcile_replicas(mine)
            self._reconcile_proxies(wanted=self._options.node_id in observed.proxies)

    def _reconcile_replicas(self, mine: Mapping[str, Assignment]) -> None:
        self._ended = {replica_id: how for replica_id, how in self._ended.items() if replica_id in mine}
        for replica_id, running in list(self._replicas.items()):
            if replica_id not in mine:
                self._stop(running, at_once=running.backend in self._desired.forced)
        self._preparing = {replica_id: task for replica_id, task in self._preparing.items() if not task.done()}
        for replica_id, assignment in mine.items():
            if replica_id not in self._replicas and replica_id not in self._ended and replica_id not in self._preparing:
                self._preparing[replica_id] = self._tasks.create_task(self._start_replica(replica_id, assignment))
        for replica_id in set(self._preparing) - set(mine):
            self._preparing[replica_id].cancel()

    async def _start_replica(self, replica_id: str, assignment: Assignment) -> None:
        """Starts a replica, after its interpreter was found or built."""
        backend = self._desired.backends.get(assignment.backend)
        options = backend.options if backend is not None else ActorOptions()
        config = backend.config if backend is not None else BackendConfig()
        try:
            check_environment(options, assignment.backend, self._signer)
            variables = replica_environment(assignment.demand, self._options.capacity, assignment.gpus, os.environ)
            python = await find_python(options)
            if self._options.metrics is not None:
                variables[FOLDER_VARIABLE] = self._options.metrics.make_folder(replica_id)
            child = self._launcher.replica(assignment.backend, replica_id, self._options.node_id, Share(variables, python))
        except Exception as error:  # one bad assignment must not stop the other replicas
            logger.warning("cannot start %s: %s", replica_id, words_of(error))
            if self._options.metrics is not None:
                self._options.metrics.forget(replica_id)
            self._ended[replica_id] = words_of(error)
            self._presence.tell()
            return
        watching = self._tasks.create_task(self._watch_replica(replica_id, child))
        first_beat_by = self._store.now_ms() + int(config.start_timeout_s * 1000)
        self._replicas[replica_id] = _Running(
            child, watching, config.graceful_shutdown_timeout_s + STOP_MARGIN_S, first_beat_by, assignment.backend
        )

    async def _watch_replica(self, replica_id: str, child: Child) -> None:
        how = await child.wait()
        if self._options.metrics is not None:
            self._options.metrics.forget(replica_id)
        running = self._replicas.pop(replica_id, None)
        if running is not None and not running.stopping:
            self._ended[replica_id] = how or ENDED_WELL
            self._presence.tell()
        if how:  # one that has drained has ended its streams and WebSocket sessions itself; without this notice they end later, by silence
            with suppress(StoreUnavailable):
                await self._store.set(self._keys.lost(replica_id), b"1", ttl_ms=LOST_TTL_S * 1000)
                await self._store.append_log(self._keys.cancelled, notice_of_replica(self._keys.feed(replica_id)))

    def _workers(self) -> Sequence[int]:
        """The numbers of the workers, which are the proxies that share the socket: from 1, or 0 for one that has the socket alone."""
        count = self._options.http_workers or self._desired.http.workers
        return range(1, count + 1) if count > 1 else (0,)

    def _reconcile_proxies(self, *, wanted: bool) -> None:
        self._proxy_wanted = wanted
        if not wanted:
            self._launcher.stop_listening()
        workers = self._workers() if wanted else ()
        for running in self._proxies.values():
            if running.worker not in workers:
                self._stop(running)
        serving = {running.worker for running in self._proxies.values() if not running.stopping}
        for worker in workers:
            if worker not in serving and time.monotonic() >= self._proxy_restarts[worker].not_before:
                self._start_proxy(worker)

    def _start_proxy(self, worker: int) -> None:
        http, options = self._desired.http, self._options
        host = options.http_host or http.host
        port = http.port if options.http_port is None else options.http_port
        # an id of its own, so that messages to a dead proxy do not reach the next
        proxy_id = f"proxy-{options.node_id}{f'.{worker}' if worker else ''}#{secrets.token_hex(3)}"
        try:
            child = self._launcher.proxy(proxy_id, host, port, options.node_id, shares_port=worker > 0)
        except Exception as error:  # no descriptors or processes left, a host that does not resolve: replicas must not stop for that
            logger.error("cannot start %s: %s", proxy_id, words_of(error))
            return self._proxy_restarts[worker].died_early(time.monotonic(), words_of(error))
        watching = self._tasks.create_task(self._watch_proxy(proxy_id, child))
        grace_s = STOP_MARGIN_S + PROXY_DRAIN_S
        self._proxies[proxy_id] = _Running(child, watching, grace_s, self._store.now_ms(), worker=worker)

    async def _watch_proxy(self, proxy_id: str, child: Child) -> None:
        started = time.monotonic()
        how = await child.wait()
        running = self._proxies.pop(proxy_id)
        if not running.stopping:
            logger.warning("%s ended (%s)", proxy_id, how or "by itself")
            self._proxy_restarts[running.worker].died(time.monotonic(), how, lived_s=time.monotonic() - started)
            self._reconcile_proxies(wanted=self._proxy_wanted)  # if it has to wait, `_check_children` starts it later
        self._dead_proxies[proxy_id] = running.worker
        if not how:  # it has drained, so no request is left
            self._announced_dead.add(proxy_id)
        await self._forget_dead_proxies()

    async def _forget_dead_proxies(self) -> None:
        """Cancels the requests of dead proxies, whose clients are gone, and drops their beats, which say that they live. The beat of a
        failed one, which carries the reason, stays until the next one is started."""
        if unannounced := self._dead_proxies.keys() - self._announced_dead:
            with suppress(StoreUnavailable):
                await self._store.append_log(self._keys.cancelled, *(notice_of_proxy(self._keys.inbox(name)) for name in unannounced))
                self._announced_dead |= unannounced & self._dead_proxies.keys()  # without those that another task has dropped meanwhile
        awaited = set(self._workers() if self._proxy_wanted else ()) - {running.worker for running in self._proxies.values()}
        dead = {proxy_id for proxy_id, worker in self._dead_proxies.items() if worker not in awaited} & self._announced_dead
        if dead:
            with suppress(StoreUnavailable):
                await self._store.drop_fields(self._keys.beats, *(f"proxy:{proxy_id}" for proxy_id in dead))
                self._announced_dead -= dead
                for proxy_id in dead:
                    self._dead_proxies.pop(proxy_id, None)  # another task may have dropped the same beats meanwhile

    def _stop(self, running: _Running, *, at_once: bool = False) -> None:
        if running.stopping:
            return
        running.stopping = True
        if at_once:
            running.grace_s = FORCED_GRACE_S
        running.child.stop()
        task = self._tasks.create_task(_kill_late(running))
        self._stoppers.add(task)
        task.add_done_callback(self._stoppers.discard)

    async def _stop_all(self, at_most_s: float) -> None:
        self._proxy_wanted = False
        self._launcher.stop_listening()
        for preparing in self._preparing.values():
            preparing.cancel()
        for running in self._all():
            running.grace_s = min(running.grace_s, at_most_s)
            self._stop(running)
        while self._stoppers:
            await asyncio.wait(self._stoppers)  # gather returns at once for tasks that are done (3.12), before they are discarded

    def _all(self) -> Iterable[_Running]:
        return [*self._replicas.values(), *self._proxies.values()]

    async def _check_children(self) -> None:
        """Starts a proxy whose pause is over, or beside one that drains. Kills children whose I/O loop is silent although the store takes
        our own beats."""
        changed = self._store.watch()
        try:
            while True:
                changed.clear()
                self._reconcile_proxies(wanted=self._proxy_wanted)
                with suppress(StoreUnavailable):
                    await self._forget_dead_proxies()
                    beats = read_beats(await self._store.fields(self._keys.beats))
                    self._follow_draining_proxies(beats)
                    self._kill_silent(beats)
                with suppress(TimeoutError):
                    async with asyncio.timeout(next_tick_s(_CHECK_EVERY_S)):
                        await changed.wait()
        finally:
            self._store.unwatch(changed)

    def _follow_draining_proxies(self, beats: Mapping[str, Beat]) -> None:
        """Notices in its beat that a proxy was told to end: the next one takes over the socket now, not after it has ended."""
        for proxy_id, running in self._proxies.items():
            if not running.stopping and (beat := beats.get(f"proxy:{proxy_id}")) and beat.state is MemberState.DRAINING:
                self._stop(running)
        self._reconcile_proxies(wanted=self._proxy_wanted)

    def _kill_silent(self, beats: Mapping[str, Beat]) -> None:
        mine = beats.get(f"node:{self._options.node_id}")
        if mine is None or self._presence.steady_s < SILENT_CHILD_AFTER_S:
            return  # the store was away, so their beats could not land either
        for kind, children in (("replica", self._replicas), ("proxy", self._proxies)):
            for name, running in children.items():
                if beat := beats.get(f"{kind}:{name}"):  # absent if the controller dropped an old one
                    running.heard_at = beat.at
                if mine.at - running.heard_at > SILENT_CHILD_AFTER_S * 1000:
                    logger.error("%s has been silent for %d s: killing it", name, (mine.at - running.heard_at) // 1000)
                    running.child.kill()

    def _beat(self) -> NodeBeat:
        options = self._options
        return NodeBeat(
            id=options.node_id, at=self._store.now_ms(), pid=os.getpid(), host=socket.gethostname(), ended=self._ended,
            state=MemberState.DRAINING if self._is_draining else MemberState.READY,
            takes_proxy=options.takes_proxy, capacity=options.capacity, running=len(self._replicas),
            url=options.metrics.url if options.metrics else "", error=options.trouble(), noted=self._store.health.noted,
        )  # fmt: skip


async def _kill_late(running: _Running) -> None:
    done, _ = await asyncio.wait([running.watching], timeout=running.grace_s)
    if not done:
        running.child.kill()
        await asyncio.wait([running.watching], timeout=STOP_MARGIN_S)
