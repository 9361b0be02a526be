"""A detached instance keeps itself running: its supervisor restarts the controller and the node, and these two restart the supervisor.

The rules are in docs/design.md, "A detached instance keeps itself".
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..broker.errors import InstanceError, MQServeError, words_of
from ..broker.process.lifeline import Stop, stop_event
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.redis.store import open_redis
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..controller import lease
from ..controller.detached_log import detached_log
from ..controller.processes import Process
from ..controller.restarts import READY_AFTER_S, Restarts
from ..controller.state.beats import BEAT_EVERY_S, SupervisorBeat
from ..controller.state.presence import Presence
from .role_lock import Role, RoleLock

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 8.0  # all three must be back within 15 s
_ASK_AGAIN_S = 0.5  # how often the store is asked whether the instance exists
_TAKE_BUDGET_S = 2.0  # another process may test at the same moment whether the lock is free
_END_BUDGET_S = 60.0  # a node itself ends children that drain for too long
TOLD_TO_END = b"told to end"  # written to the supervisor's lock file, for the other two processes to read


@dataclass(frozen=True, slots=True)
class Kept:
    """The instance that a process was started for, and its keeper.

    `token` is part of the names under which this keeper's controllers lead. `node_id` names the kept node, if there is one. `lock` is the
    descriptor of the process's own role lock, if it is one of the three that keep each other; other processes are kept by their parent.
    """

    instance: str
    token: str
    node_id: str = ""
    lock: int | None = None

    def arguments(self) -> list[str]:
        """Returns the arguments for the command line; the starter adds the number of the lock that it passes on."""
        node = ["--kept-node", self.node_id] if self.node_id else []
        return ["--instance", self.instance, "--kept-by", self.token, *node]


class KeptProcess:
    """One of the three processes, as seen by another one that keeps it running."""

    def __init__(self, role: Role, kept: Kept, settings: Settings, store: Store) -> None:
        self._role = role
        self._kept = kept
        self._settings = settings
        self._store = store
        self._keys = StoreKeys(settings.namespace)
        self._restarts = Restarts(longest_pause_s=LONGEST_PAUSE_S)
        self._child: Process | None = None  # the child, if this process started it
        self._started_at = -math.inf
        self._is_missing = False  # we hold its lock, so it does not run
        self._last_end = ""  # how it ended last; empty before the first end
        self._unkept = RateLimitedLog(logger, logging.ERROR)
        self._why_not = ""  # why it cannot be started now

    def __repr__(self) -> str:
        return f"<KeptProcess {self._role.value}, {self._child!r}>"

    @property
    def trouble(self) -> str:
        """Why it does not run, or keeps ending soon, for operators; empty if all is well."""
        if self._why_not:
            return f"the {self._role.value} is not started: {self._why_not}"
        if not self._restarts.reason or not (self._is_missing or time.monotonic() - self._started_at < READY_AFTER_S):
            return ""
        return (
            f"the {self._role.value} ended soon after its start, {self._restarts.early_deaths} times ({self._restarts.reason}), and is "
            f"tried again after pauses of up to {LONGEST_PAUSE_S:g} s: see {detached_log(self._settings.namespace)}"
        )

    async def keep(self) -> None:
        """Restarts the process whenever it does not run. Returns once it is not to run any more: the instance has ended, or the
        supervisor was told to end. Retries if the lock cannot be opened (no descriptors, no folder), since the calling process has other
        work, which must go on."""
        while True:
            try:
                return await self._keep()
            except (InstanceError, OSError) as error:
                self._unkept.say(
                    f"cannot keep the {self._role.value} running until its lock can be opened ({words_of(error)}): free descriptors or "
                    f"mend the folder of {detached_log(self._settings.namespace)}"
                )
                self._why_not = words_of(error)
            await asyncio.sleep(_ASK_AGAIN_S)
            self._why_not = ""

    async def _keep(self) -> None:
        lock = self._open_lock()
        try:
            while True:
                await self._end(lock)
                self._is_missing = True
                if lock.read() == TOLD_TO_END:  # it stays in the file, for a process that is only starting now
                    return
                if not await self._start(lock):
                    return lock.remove()
                self._is_missing = False
                lock.close()  # the started process holds it now
                lock = self._open_lock()
        finally:
            lock.close()

    async def gone(self) -> None:
        """Returns once no process has the role, which is over, and removes the lock file."""
        lock = self._open_lock()
        try:
            await lock.taken()
            lock.remove()
        finally:
            lock.close()

    def _open_lock(self) -> RoleLock:
        return RoleLock.open(self._settings.namespace, self._kept.instance, self._role)

    async def _end(self, lock: RoleLock) -> None:
        """Returns once the process has ended and its lock is ours. If another process started it, only the lock tells that."""
        child, self._child = self._child, None
        if child is not None:
            how = await child.wait() or "by itself"
            self._restarts.died(time.monotonic(), how, lived_s=time.monotonic() - self._started_at)
            self._last_end = f"ended ({how})"
        elif not lock.take():
            self._last_end = "does not run any more"
        await lock.taken()

    async def _start(self, lock: RoleLock) -> bool:
        """Starts the process as soon as the rules allow. Returns False if the instance has ended."""
        while True:
            standing = await self._ask()
            if standing is lease.Standing.ENDED:
                return False
            pause_s = self._restarts.not_before - time.monotonic()
            if not self._why_not and pause_s <= 0 and self._launch(lock):
                return True
            await asyncio.sleep(_ASK_AGAIN_S if self._why_not else min(_ASK_AGAIN_S, max(0.0, pause_s)))

    async def _ask(self) -> lease.Standing | None:
        """Returns what is left of the instance, None if the store does not say. Releases the lead of an ended controller first."""
        standing = None
        why_not = ""
        try:
            if self._role is Role.CONTROLLER:
                await lease.release_of(self._store, self._keys, self._kept.token)
            standing = await lease.read_standing(self._store, self._keys, self._kept.instance)
        except MQServeError as error:
            why_not = words_of(error)
        if standing is lease.Standing.LOST:
            why_not = "the store has lost the instance, which a controller that lives writes back"
        if standing is lease.Standing.DRAINS and self._role is Role.NODE:
            why_not = "the instance is being shut down"
        if why_not not in ("", self._why_not):
            logger.warning("the %s is not started yet: %s", self._role.value, why_not)
        self._why_not = why_not
        return standing

    def _launch(self, lock: RoleLock) -> bool:
        if self._last_end:
            logger.warning("the %s %s: starting another", self._role.value, self._last_end)
        own = ["--node-id", self._kept.node_id] if self._role is Role.NODE else []
        command = [self._role.value, *own, *self._kept.arguments(), "--lock", str(lock.fd)]
        try:
            self._child = Process.start(command, self._settings, detached=True, hands_on=(lock.fd,))
        except OSError as error:  # out of descriptors or processes; there may be some later
            logger.error("cannot start the %s: %s", self._role.value, words_of(error))
            self._restarts.died_early(time.monotonic(), words_of(error))
            return False
        self._started_at = time.monotonic()
        return True


class Supervisor:
    """Keeps the controller running, and the node if there is one."""

    def __init__(self, settings: Settings, kept: Kept, store: Store) -> None:
        # also the id of the next supervisor, so that its beat replaces this one's
        self._id = f"supervisor-{socket.gethostname()}-{kept.token}"
        roles = [Role.CONTROLLER, Role.NODE] if kept.node_id else [Role.CONTROLLER]
        self._kept_processes = [KeptProcess(role, kept, settings, store) for role in roles]
        self._store = store
        beats = StoreKeys(settings.namespace).beats
        self._presence = Presence(store, beats, f"supervisor:{self._id}", lambda: self._beat().to_bytes(), BEAT_EVERY_S)

    def __repr__(self) -> str:
        return f"<Supervisor of {self._kept_processes}>"

    async def run(self, lock: RoleLock, stop: Stop) -> None:
        """Runs until the instance has ended, or `stop` is set: then it ends the others, too."""
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._presence.beat_forever())
            keeping = [tasks.create_task(process.keep()) for process in self._kept_processes]
            stopping = tasks.create_task(stop.wait())
            await asyncio.wait([*keeping, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in (*keeping, stopping):
                task.cancel()
            await asyncio.wait(keeping)
            await self._end_others(lock)
            await self._presence.leave(with_last_words=False)
            beating.cancel()

    async def _end_others(self, lock: RoleLock) -> None:
        lock.write(TOLD_TO_END)
        lock.close()
        waiting = list(self._kept_processes)
        try:
            async with asyncio.timeout(_END_BUDGET_S):
                while waiting:
                    await waiting[0].gone()
                    waiting.pop(0)
            lock.remove()
        except TimeoutError:
            logger.error(
                "%s did not end within %d s, and this supervisor ends without it: look for its process, and kill it if it hangs",
                waiting[0], _END_BUDGET_S,
            )  # fmt: skip

    def _beat(self) -> SupervisorBeat:
        error = "; ".join(process.trouble for process in self._kept_processes if process.trouble)
        return SupervisorBeat(self._id, self._store.now_ms(), pid=os.getpid(), host=socket.gethostname(), error=error)


async def run_supervisor(settings: Settings, kept: Kept) -> int:
    """Runs the supervisor until the instance has ended or somebody ends it; returns the exit code. Raises InstanceError if another
    process has the role."""
    stop = stop_event()
    lock = await _take_own_lock(settings, kept)
    async with open_redis(settings.store_url, settings.namespace) as store:
        await Supervisor(settings, kept, store).run(lock, stop)
    return 0


async def _take_own_lock(settings: Settings, kept: Kept) -> RoleLock:
    """Takes the lock: the first supervisor takes it itself, a later one inherits it from its starter."""
    which = settings.namespace, kept.instance, Role.SUPERVISOR
    lock = RoleLock.open(*which) if kept.lock is None else RoleLock.handed_on(kept.lock, *which)
    try:
        async with asyncio.timeout(_TAKE_BUDGET_S):
            await lock.taken()
    except TimeoutError:
        raise InstanceError(
            "a supervisor of this instance runs on this machine already, and keeps it: there is nothing to start. `mqserve status` shows it"
        ) from None
    lock.write(b"")  # the last supervisor may have left TOLD_TO_END
    return lock


@asynccontextmanager
async def keeping_supervisor(kept: Kept | None, settings: Settings, store: Store, stop: Stop) -> AsyncIterator[Callable[[], str]]:
    """Inside the block, restarts the supervisor of this controller or node, and sets `stop` when the instance ends. Yields a function
    that returns what prevents a restart, for operators. Does nothing if no supervisor started this process."""
    if kept is None or kept.lock is None:
        yield lambda: ""
        return
    os.set_inheritable(kept.lock, False)  # no child may inherit it: a child that lives longer would hold the role
    process = KeptProcess(Role.SUPERVISOR, kept, settings, store)

    async def keep() -> None:
        await process.keep()
        stop.set()

    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(keep())
        try:
            yield lambda: process.trouble
        finally:
            keeping.cancel()
