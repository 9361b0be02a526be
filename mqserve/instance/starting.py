"""Starts and ends an instance: its lease, its controller, its first node; as tasks or as processes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ..broker.documents import until
from ..broker.errors import BadEnvelope, BadType, BadValue, InstanceError, MQServeError
from ..broker.process.lifeline import Stop
from ..broker.process.listener import bind
from ..broker.settings import Settings
from ..broker.values import code
from ..broker.values.whole_numbers import whole_number
from ..connections import Connections, instance_has_ended, open_connections
from ..controller import lease
from ..controller.desired_writes import write_next
from ..controller.detached_log import detached_log
from ..controller.processes import Process
from ..controller.restarts import Restarts
from ..controller.state.beats import MemberState, ProxyBeat, SupervisorBeat, beats_of, read_beats
from ..controller.state.documents import HttpOptions
from ..controller.state.reading import read_desired, read_observed
from .drain_report import Tell, reporting
from .role_lock import Role, check_folder, is_played
from .supervisor import Kept

if TYPE_CHECKING:
    from ..controller.node import Child

logger = logging.getLogger(__name__)

START_BUDGET_S = 30.0
SHUTDOWN_BUDGET_S = 45.0
UNLED_AFTER_S = lease.LAPSED_AFTER_S + 5.0  # an instance without a leader for this long will not get one: a standby would have taken over
LOCATIONS = ("HeadOnly", "EveryNode", "NoServer")
_FUTURES_PATH = re.compile(r"(?:/[\w.~-]+)+", re.ASCII)
MAX_WORKERS = 64  # each is a process with connections of its own to RabbitMQ and Redis


@dataclass(frozen=True, slots=True)
class StartOptions:
    """The arguments of `serve.start`."""

    http: HttpOptions
    middlewares: tuple[object, ...] = ()
    detached: bool = False
    with_node: bool = True
    node_id: str = ""
    incomplete: bool = False  # proxies do not report ready before `Client.tell_complete`
    tell: Tell | None = None  # receives lines about what still drains at the end
    keeps_queues: bool = False  # messages that wait at its end are left for the next instance of the namespace


def parse_http_options(options: object) -> tuple[HttpOptions, tuple[object, ...]]:
    """Returns (options, middlewares). Raises BadType or BadValue with what is wrong."""
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise BadType(f"http_options must be a dict such as {{'port': 8000}}, not {type(options).__name__}")
    known = {"host", "port", "location", "middlewares", "debug", "workers", "futures_path"}
    if unknown := set(options) - known:
        raise BadValue(f"http_options has no {', '.join(sorted(map(str, unknown)))}: there are {', '.join(sorted(known))}")
    host, port = options.get("host", "127.0.0.1"), whole_number(options.get("port", 8000))
    location = options.get("location", "HeadOnly")
    if host is None or location is None:
        host, location = host or "127.0.0.1", "NoServer"
    if not isinstance(host, str) or "\0" in host:
        raise BadType(f"http_options host must be a name or an address such as '127.0.0.1', not {host!r}")
    if location not in LOCATIONS:
        raise BadValue(f"http_options location {location!r} must be one of {', '.join(LOCATIONS)} or None")
    if port is None or not 0 <= port <= 65535:
        raise BadValue(f"http_options port {options['port']!r} must be a whole number from 0 (any free one) to 65535")
    workers = whole_number(options.get("workers", 1))
    if workers is None or not 1 <= workers <= MAX_WORKERS:
        raise BadValue(
            f"http_options workers {options['workers']!r} must be a whole number from 1 to {MAX_WORKERS}: one for each core, at most"
        )
    futures_path = _futures_path(options.get("futures_path", HttpOptions().futures_path))
    http = HttpOptions(host, port, location, debug=bool(options.get("debug", False)), workers=workers, futures_path=futures_path)
    return http, parse_middlewares(options.get("middlewares"))


def _futures_path(path: object) -> str:
    if not isinstance(path, str):
        raise BadType(f"http_options futures_path must be a path such as '/jobs', not {path!r}")
    if not _FUTURES_PATH.fullmatch(path) or (path.startswith("/-/") and path != HttpOptions().futures_path):
        raise BadValue(
            f"http_options futures_path {path!r} must be a path of letters, digits, '.', '_', '~' and '-', such as '/jobs', without a "
            f"slash at its end; of those under /-/ it can only be {HttpOptions().futures_path}"
        )
    return path


def parse_middlewares(middlewares: object) -> tuple[object, ...]:
    """Returns the middlewares. Raises BadType unless it is a list: a str would be iterated by letters."""
    if middlewares is None:
        return ()
    if not isinstance(middlewares, list | tuple):
        raise BadType(f"middlewares must be a list, the first one outermost, not {middlewares!r}")
    return tuple(middlewares)


@asynccontextmanager
async def running_instance(connections: Connections, options: StartOptions) -> AsyncIterator[str]:
    """Starts a live instance and yields its id; shuts it down on exit unless it is detached."""
    if connections.settings.embedded and options.detached:
        raise InstanceError(
            "a detached instance needs a broker and a store that outlive this process: set MQSERVE_BROKER_URL and MQSERVE_STORE_URL"
        )
    http = options.http
    if connections.settings.embedded and http.workers > 1:
        raise InstanceError(
            f"{http.workers} HTTP workers are {http.workers} processes, and the embedded form is a single one: set MQSERVE_BROKER_URL and "
            "MQSERVE_STORE_URL for the distributed form, or leave workers at 1"
        )
    if http.location != "NoServer" and options.with_node:
        try:
            bind(http.host, http.port).close()  # so that a bad address is reported here, in one sentence, and not by a child
        except BadValue:
            # a running instance is the likelier reason, since its proxy has the port
            await lease.check_free(connections.store, connections.keys)
            raise
    if options.detached:
        check_folder(connections.settings.namespace)
    if trouble := await connections.store.files.trouble():
        raise InstanceError(trouble)
    if not connections.settings.embedded:
        await _check_not_kept(connections)
    if options.middlewares:
        packed = code.pack_for_all(list(options.middlewares), connections.settings.signer, embedded=connections.settings.embedded)
        http = msgspec.structs.replace(http, middlewares=await code.save_for_all(connections.store, connections.keys, packed))
    node_id = options.node_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    head_node = node_id if options.with_node else ""
    claim = await lease.claim_instance(
        connections.store, connections.keys, head_node, http, detached=options.detached, incomplete=options.incomplete
    )
    processes = _OwnProcesses(connections, claim.id, node_id, options)
    is_up = False
    try:
        processes.start()
        await _until_up(connections, http, head_node, processes)
        is_up = True
        processes.watch()
        yield claim.id
    finally:
        if not (options.detached and is_up):
            try:
                if claim.found is None:
                    keeps_queues = options.keeps_queues and not connections.settings.embedded
                    await shut_down(connections, claim.id, options.tell, keeps_queues=keeps_queues)
                else:  # an instance that was taken over has others' deployments, so it is not cleared
                    await lease.give_back(connections.store, connections.keys, claim, head_node)
            except MQServeError as error:
                logger.error("cannot clear the instance; the next start under its namespace will: %s", error)
            finally:
                await processes.end()


async def _check_not_kept(connections: Connections) -> None:
    """Raises InstanceError if a supervisor on this machine keeps the instance, even if no controller leads it now."""
    raw = await connections.store.get(connections.keys.instance)
    if raw is not None and is_played(connections.settings.namespace, lease.decode_lease(raw).id, Role.SUPERVISOR):
        await lease.check_free(connections.store, connections.keys)
        raise InstanceError(
            "an instance runs under this namespace, and its supervisor on this machine is about to start its controller again: look with "
            f"`mqserve status` and in {detached_log(connections.settings.namespace)}, and join it with serve.connect() or end it with "
            "`mqserve shutdown`"
        )


class _OwnProcesses:
    """The processes (or tasks) that a starter runs: the controller and the first node; for a detached instance the supervisor, which
    starts those two."""

    def __init__(self, connections: Connections, instance: str, node_id: str, options: StartOptions) -> None:
        self._connections = connections
        self._instance = instance
        self._node_id = node_id
        self._options = options
        self._kept = Kept(instance, secrets.token_hex(4), node_id if options.with_node else "")
        self._processes: list[Process] = []
        self._watching: list[asyncio.Task[None]] = []
        self._stop = Stop()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        if self._connections.settings.embedded:
            from .embedded import start_embedded  # only here: replicas and clients import this file, too, and need no proxy or node

            self._tasks = start_embedded(self._connections, self._instance, self._node_id, self._stop)
            return
        self._processes = [
            Process.start(command, self._connections.settings, detached=self._options.detached) for command in self._commands()
        ]

    def _commands(self) -> list[list[str]]:
        arguments = self._kept.arguments()
        if self._options.detached:
            return [["supervisor", *arguments]]
        node = [["node", "--node-id", self._node_id]] if self._options.with_node else []
        return [["controller", *arguments], *node]

    def watch(self) -> None:
        """Restarts a process that dies, as long as the instance exists. The processes of a detached instance restart each other instead."""
        if self._options.detached:
            for process in self._processes:
                process.disown()
        else:
            self._watching = [asyncio.create_task(self._keep(place)) for place in range(len(self._processes))]

    async def _keep(self, place: int) -> None:
        command = self._commands()[place]

        def start() -> Child:
            self._processes[place] = Process.start(command, self._connections.settings)
            return self._processes[place]

        async def is_over() -> bool:
            if command[0] == "controller":
                with suppress(MQServeError):  # the lead then lapses by itself
                    await lease.release_of(self._connections.store, self._connections.keys, self._kept.token)
            return await instance_has_ended(self._connections, self._instance)

        await keep_child_running(command[0], self._processes[place], start, is_over)

    @property
    def log(self) -> str:
        """Where the processes' output is, for error messages."""
        return str(detached_log(self._connections.settings.namespace)) if self._options.detached else "the log above"

    @property
    def pids(self) -> set[int]:
        return {process.pid for process in self._processes}

    def check(self) -> None:
        """Raises InstanceError if one of the processes or tasks has ended."""
        for process in self._processes:
            if process.returncode is not None:
                raise InstanceError(f"{process!r} ended at once: see {self.log}")
        for task in self._tasks:
            if task.done():
                raise InstanceError("the controller or the node ended at once") from task.exception()

    async def end(self) -> None:
        self._stop.set()
        for watching in self._watching:
            watching.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for process in self._processes:
            process.stop()
        waits = [asyncio.create_task(_ended(process)) for process in self._processes] + self._tasks
        if waits:
            await asyncio.wait(waits, timeout=SHUTDOWN_BUDGET_S)
        for process in self._processes:
            process.kill()


async def keep_child_running(role: str, child: Child, start: Callable[[], Child], is_over: Callable[[], Awaitable[bool]]) -> None:
    """Restarts a child whenever it ends, until `is_over()`, which is asked after each end. A child that lived for a while is restarted at
    once, others after growing pauses."""
    restarts = Restarts()
    while True:
        started = time.monotonic()
        how = await child.wait()
        if await is_over():
            return
        logger.warning("the %s ended (%s): starting another", role, how or "by itself")
        restarts.died(time.monotonic(), how, lived_s=time.monotonic() - started)
        child = await _start_again(role, start, restarts)


async def _start_again(role: str, start: Callable[[], Child], restarts: Restarts) -> Child:
    while True:
        await asyncio.sleep(max(0.0, restarts.not_before - time.monotonic()))
        try:
            return start()
        except OSError as error:  # out of descriptors or processes; there may be some later
            logger.error("cannot start the %s again: %s", role, error)
            restarts.died_early(time.monotonic(), str(error))


async def _ended(child: Child) -> None:
    await child.wait()


async def end_instance(settings: Settings, tell: Tell) -> int:
    """Ends the running instance, whoever started it; returns the exit code. Raises InstanceError if there is none, and as `shut_down`
    does."""
    async with open_connections(settings, "client") as connections:
        instance = (await lease.read_instance(connections.store, connections.keys)).id
        tell(f"Draining {settings.namespace!r} …")
        await shut_down(connections, instance, tell)
    return 0


async def shut_down(connections: Connections, instance: str, tell: Tell | None = None, *, keeps_queues: bool = False) -> None:
    """Drains and clears the instance: marks the desired document as closing and waits until the controller has finished. Messages that
    still wait then are refused, or left for the next instance of the namespace with `keeps_queues`.

    If no controller leads, it clears the documents here, and what still runs drains by itself. Raises InstanceError if the instance still
    drains after all the time that its replicas may take, and StoreUnavailable.
    """

    async def read_budget_s() -> float:
        desired = read_desired(await connections.store.get(connections.keys.desired))
        drains_s = [backend.config.graceful_shutdown_timeout_s for backend in desired.backends.values()]
        return SHUTDOWN_BUDGET_S + 2 * max(drains_s, default=0.0)  # time for what waits, and then for what runs

    async def is_cleared() -> bool | None:
        raw, raw_lease = await connections.store.get_documents([connections.keys.desired, connections.keys.instance])
        desired = read_desired(raw)
        if raw is None or desired.instance != instance:
            return True
        if not desired.closing:
            closing = msgspec.structs.replace(desired, closing=True, keeps_queues=keeps_queues)
            await write_next(connections.store, connections.keys, raw, closing)
        with suppress(BadEnvelope):  # the leader rewrites a broken lease
            if raw_lease is not None and connections.store.now_ms() - lease.decode_lease(raw_lease).at > UNLED_AFTER_S * 1000:
                raise TimeoutError  # waiting longer would be in vain
        return None

    budget_s = await until(connections.store, read_budget_s, SHUTDOWN_BUDGET_S)
    try:
        async with reporting(connections, tell):
            await until(connections.store, is_cleared, budget_s)
    except TimeoutError:
        if await lease.has_leader(connections.store, connections.keys, instance):
            raise InstanceError(
                f"the instance still drains after {budget_s:g} s, and its controller goes on with that: see `mqserve status`, "
                "and drop the requests that it waits for with delete_backend(…, force=True)"
            ) from None
        await lease.forget(connections.store, connections.keys, instance)


async def _until_up(connections: Connections, http: HttpOptions, head_node: str, processes: _OwnProcesses) -> None:
    """Returns once the controller leads, the node is there and its proxies serve. Raises InstanceError with the reason if that does not
    happen."""
    wants_proxy = bool(head_node) and http.location != "NoServer"

    async def is_up() -> bool | None:
        processes.check()
        beats = read_beats(await connections.store.fields(connections.keys.beats))
        raw_desired, raw_observed = await connections.store.get_documents([connections.keys.desired, connections.keys.observed])
        desired, observed = read_desired(raw_desired), read_observed(raw_observed)
        # the new controller has seen it: an instance that was taken over still has the old one's observed state
        is_led = observed.seen >= (desired.epoch, desired.version)
        proxies = [beat for beat in beats_of(beats, ProxyBeat) if beat.node == head_node] if wants_proxy else []
        for proxy in proxies:
            if proxy.state is MemberState.FAILED:
                raise InstanceError(proxy.error)
        if trouble := next((beat.error for beat in beats_of(beats, SupervisorBeat) if beat.pid in processes.pids), ""):
            raise InstanceError(trouble)
        node_is_there = not head_node or f"node:{head_node}" in beats
        proxies_serve = not wants_proxy or sum(proxy.state is MemberState.READY for proxy in proxies) >= http.workers
        return True if is_led and node_is_there and proxies_serve else None

    budget_s = START_BUDGET_S + http.workers - 1  # each is a process, and may have to share a core
    try:
        await until(connections.store, is_up, budget_s)
    except TimeoutError:
        raise InstanceError(f"the instance was not up within {budget_s:g} s: see {processes.log}, and `mqserve status`") from None
