"""One machine's agent: says what it has, and runs the replicas and the proxy that the controller assigns to it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from ..broker.calls.cancellations import notice_of_proxy
from ..broker.errors import InstanceError, StoreUnavailable, words_of
from ..broker.process.lifeline import Stop
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..broker.values.signing import Signer
from .environments import check_environment, find_python
from .lost_files import put_back_files
from .machine import replica_environment
from .node_metrics import FOLDER_VARIABLE, NodeMetrics
from .restarts import ENDED_WELL, Restarts
from .state.beats import BEAT_EVERY_S, PROXY_DRAIN_S, SILENT_AFTER_S, Beat, read_beats
from .state.config import BackendConfig
from .state.documents import Assignment, Desired, Observed
from .state.following import follow_state
from .state.presence import Presence
from .state.resources import ActorOptions, Capacity

logger = logging.getLogger(__name__)

SILENT_CHILD_AFTER_S = 20.0  # a replica or proxy whose I/O loop is silent for this long is killed
STOP_MARGIN_S = 5.0  # beyond its own drain time, then it is killed
PARENT_GONE_S = 6.0  # what children get when the node's own parent is gone
NAME_WATCHED_FOR_S = 3.0
_CHECK_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1


class Child(Protocol):
    """A replica or proxy that this node started."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> str:
        """How it ended: empty for well, else words for an operator."""
        ...

    def stop(self) -> None:
        """Drain and end."""
        ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Share:
    """What keeps a replica to its part of the node: variables of its environment, and its interpreter."""

    environment: Mapping[str, str]
    python: str


class Launcher(Protocol):
    """Starts children: as processes, or inside this one."""

    def replica(self, backend: str, replica_id: str, node: str, share: Share) -> Child: ...

    def proxy(self, proxy_id: str, host: str, port: int, node: str) -> Child:
        """Beside those that still drain, if need be."""
        ...

    def stop_listening(self) -> None:
        """No proxy is to come: what connects from now on is refused, once the last one drains."""
        ...


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """`http_host` and `http_port` override the instance's, since two nodes may share a machine.

    `ends_with_instance`: a detached starter's own node, which nobody else would end; others wait for the next instance. `trouble`: what
    else is wrong on this machine, for operators.
    """

    node_id: str
    http_host: str | None = None
    http_port: int | None = None
    takes_proxy: bool = True
    capacity: Capacity = field(default_factory=Capacity)
    metrics: NodeMetrics | None = None  # None: the proxy of this process shows them
    ends_with_instance: bool = False
    trouble: Callable[[], str] = lambda: ""


@dataclass(eq=False, slots=True)
class _Running:
    child: Child
    watching: asyncio.Task[None]
    grace_s: float
    heard_at: int  # its last beat, store ms; at first when that should be there
    backend: str = ""
    stopping: bool = False


async def check_name_is_free(store: Store, keys: StoreKeys, node_id: str) -> None:
    """Raises InstanceError where a node of that name beats: each would run all that is assigned to both."""

    async def last_beat() -> Beat | None:
        return read_beats(await store.fields(keys.beats)).get(f"node:{node_id}")

    first = await last_beat()
    if first is None or store.now_ms() - first.at > SILENT_AFTER_S * 1000:
        return
    until = time.monotonic() + NAME_WATCHED_FOR_S
    while time.monotonic() < until:  # it may be that of one which was killed a moment ago
        await asyncio.sleep(_LOOK_EVERY_S)
        if (beat := await last_beat()) is not None and beat.at != first.at:
            raise InstanceError(
                f"a node {node_id!r} runs already ({beat.host}, process {beat.pid}): choose another --node-id, or end that one"
            )


class Node:
    """Owns its children: none survives it."""

    def __init__(self, options: NodeOptions, store: Store, keys: StoreKeys, launcher: Launcher, signer: Signer) -> None:
        self._options = options
        self._signer = signer
        self._store = store
        self._keys = keys
        self._launcher = launcher
        self._replicas: dict[str, _Running] = {}
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._proxies: dict[str, _Running] = {}  # one, and those that drain
        self._dead_proxies: set[str] = set()  # whose last beats are to go
        self._told_of: set[str] = set()  # of these, what the replicas know
        self._proxy_wanted = False
        self._proxy_restarts = Restarts()
        self._desired = Desired()
        self._ended: dict[str, str] = {}
        self._stoppers: set[asyncio.Task[None]] = set()
        self._giving_back: asyncio.Task[None] | None = None  # files that the store lost
        self._is_draining = False
        self._tasks = asyncio.TaskGroup()  # entered by `run`: it owns whoever watches a child
        field = f"node:{options.node_id}"
        self._presence = Presence(store, keys.beats, field, lambda: self._beat().to_bytes(), BEAT_EVERY_S)

    def __repr__(self) -> str:
        return f"<Node {self._options.node_id}, {len(self._replicas)} replicas, {len(self._proxies)} proxies>"

    async def run(self, stop: Stop) -> None:
        """Until `stop` is set; then every child is drained, and killed if it does not end."""
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
            if desired is None and self._desired.closing:  # the instance was cleared, by whomever: nothing of it is to run on
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
            self._reconcile_proxy(wanted=self._options.node_id in observed.proxies)

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
        """Its interpreter first, which may have to be built."""
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
        except Exception as error:  # whatever is wrong with one assignment, the other replicas are not to go with it
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

    def _reconcile_proxy(self, *, wanted: bool) -> None:
        self._proxy_wanted = wanted
        if not wanted:
            self._launcher.stop_listening()
            for running in self._proxies.values():
                self._stop(running)
        elif all(running.stopping for running in self._proxies.values()) and time.monotonic() >= self._proxy_restarts.not_before:
            http, options = self._desired.http, self._options
            host = options.http_host or http.host
            port = http.port if options.http_port is None else options.http_port
            proxy_id = f"proxy-{options.node_id}#{secrets.token_hex(3)}"  # its own: what is on its way to a dead one is not for the next
            try:
                child = self._launcher.proxy(proxy_id, host, port, options.node_id)
            except Exception as error:  # no file descriptors, no processes, a host that is none: the replicas are not to go with it
                logger.error("cannot start the proxy of node %s: %s", options.node_id, words_of(error))
                return self._proxy_restarts.died_early(time.monotonic(), words_of(error))
            watching = self._tasks.create_task(self._watch_proxy(proxy_id, child))
            self._proxies[proxy_id] = _Running(child, watching, STOP_MARGIN_S + PROXY_DRAIN_S, self._store.now_ms())

    async def _watch_proxy(self, proxy_id: str, child: Child) -> None:
        started = time.monotonic()
        how = await child.wait()
        running = self._proxies.pop(proxy_id)
        if not running.stopping:
            logger.warning("the proxy of node %s ended (%s)", self._options.node_id, how or "by itself")
            self._proxy_restarts.died(time.monotonic(), how, lived_s=time.monotonic() - started)
            self._reconcile_proxy(wanted=self._proxy_wanted)  # later, from `_check_children`, if it has to wait
        self._dead_proxies.add(proxy_id)
        if not how:  # it has drained: nobody's request is left
            self._told_of.add(proxy_id)
        await self._forget_dead_proxies()

    async def _forget_dead_proxies(self) -> None:
        """Their requests, whose clients are gone. And their beats, which say that they live; the words of one that failed stay until the
        next is started."""
        if untold := self._dead_proxies - self._told_of:
            with suppress(StoreUnavailable):
                await self._store.append_log(self._keys.cancelled, *(notice_of_proxy(self._keys.inbox(name)) for name in untold))
                self._told_of |= untold
        if self._proxies or not self._proxy_wanted:
            dead = self._dead_proxies & self._told_of
            with suppress(StoreUnavailable):
                await self._store.drop_fields(self._keys.beats, *(f"proxy:{proxy_id}" for proxy_id in dead))
                self._dead_proxies -= dead
                self._told_of -= dead

    def _stop(self, running: _Running, *, at_once: bool = False) -> None:
        if running.stopping:
            return
        running.stopping = True
        if at_once:
            running.child.kill()
        else:
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
        """Starts a proxy whose pause is over, or beside one that drains; kills children whose I/O loop is silent while the store takes
        our own beats."""
        changed = self._store.watch()
        try:
            while True:
                changed.clear()
                self._reconcile_proxy(wanted=self._proxy_wanted)
                with suppress(StoreUnavailable):
                    await self._forget_dead_proxies()
                    beats = read_beats(await self._store.fields(self._keys.beats))
                    self._follow_draining_proxies(beats)
                    self._kill_silent(beats)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CHECK_EVERY_S):
                        await changed.wait()
        finally:
            self._store.unwatch(changed)

    def _follow_draining_proxies(self, beats: Mapping[str, Beat]) -> None:
        """One that somebody told to end says so in its beat: the next one takes over the socket now, not after it."""
        for proxy_id, running in self._proxies.items():
            if not running.stopping and (beat := beats.get(f"proxy:{proxy_id}")) and beat.state == "draining":
                self._stop(running)
        self._reconcile_proxy(wanted=self._proxy_wanted)

    def _kill_silent(self, beats: Mapping[str, Beat]) -> None:
        mine = beats.get(f"node:{self._options.node_id}")
        if mine is None or self._presence.steady_s < SILENT_CHILD_AFTER_S:
            return  # the store was away: their beats could not land either
        for kind, children in (("replica", self._replicas), ("proxy", self._proxies)):
            for name, running in children.items():
                if beat := beats.get(f"{kind}:{name}"):  # the controller drops one that is old
                    running.heard_at = beat.at
                if mine.at - running.heard_at > SILENT_CHILD_AFTER_S * 1000:
                    logger.error("%s has been silent for %d s: killing it", name, (mine.at - running.heard_at) // 1000)
                    running.child.kill()

    def _beat(self) -> Beat:
        options = self._options
        return Beat(
            kind="node", id=options.node_id, at=self._store.now_ms(), pid=os.getpid(), host=socket.gethostname(), ended=self._ended,
            state="draining" if self._is_draining else "ready",
            takes_proxy=options.takes_proxy, capacity=options.capacity, running=len(self._replicas),
            url=options.metrics.url if options.metrics else "", error=options.trouble(), noted=self._store.noted,
        )  # fmt: skip


async def _kill_late(running: _Running) -> None:
    done, _ = await asyncio.wait([running.watching], timeout=running.grace_s)
    if not done:
        running.child.kill()
        await asyncio.wait([running.watching], timeout=STOP_MARGIN_S)
