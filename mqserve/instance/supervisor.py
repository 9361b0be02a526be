"""A detached instance keeps itself: its supervisor starts the controller and the node again, and these two start the supervisor.

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

LONGEST_PAUSE_S = 8.0  # all is to be back within 15 s
_ASK_AGAIN_S = 0.5  # the store, whether the instance is there
_TAKE_BUDGET_S = 2.0  # somebody may look whether the lock is free at the same moment
_END_BUDGET_S = 60.0  # a node ends what drains for too long by itself
TOLD_TO_END = b"told to end"  # in the supervisor's lock file: for the other two


@dataclass(frozen=True, slots=True)
class Kept:
    """For which instance a process was started, and by whom it is kept.

    `token`: what the leads of this keeper's controllers have in their names. `node_id`: of the node that is kept too, if one is. `lock`:
    the open file of its own lock, for one of the three that keep each other; others are kept by their parent.
    """

    instance: str
    token: str
    node_id: str = ""
    lock: int | None = None

    def arguments(self) -> list[str]:
        """For the command line; the starter adds the number of the lock that it passes on."""
        node = ["--kept-node", self.node_id] if self.node_id else []
        return ["--instance", self.instance, "--kept-by", self.token, *node]


class Part:
    """One of the three, as seen by a process that keeps it."""

    def __init__(self, role: Role, kept: Kept, settings: Settings, store: Store) -> None:
        self._role = role
        self._kept = kept
        self._settings = settings
        self._store = store
        self._keys = StoreKeys(settings.namespace)
        self._restarts = Restarts(longest_pause_s=LONGEST_PAUSE_S)
        self._child: Process | None = None  # started here
        self._started_at = -math.inf
        self._is_missing = False  # its lock is ours
        self._last_end = ""  # in words; empty before the first one
        self._why_not = ""  # nothing can be started

    def __repr__(self) -> str:
        return f"<the {self._role.value}, {self._child!r}>"

    @property
    def trouble(self) -> str:
        """For operators: why it does not run, or did not for long."""
        if self._why_not:
            return f"the {self._role.value} is not started: {self._why_not}"
        if not self._restarts.reason or not (self._is_missing or time.monotonic() - self._started_at < READY_AFTER_S):
            return ""
        return (
            f"the {self._role.value} ended soon after its start, {self._restarts.early_deaths} times ({self._restarts.reason}), and is "
            f"tried again after pauses of up to {LONGEST_PAUSE_S:g} s: see {detached_log(self._settings.namespace)}"
        )

    async def keep(self) -> None:
        """Starts it whenever it does not run. Returns when nothing is to be started any more: the instance has ended, or this process is
        told to. A lock that cannot be had (no file descriptors, no folder) is tried again: the process that keeps another has work of its
        own, which must not end with that."""
        while True:
            try:
                return await self._keep()
            except (InstanceError, OSError) as error:
                logger.error("the %s is not kept now: %s", self._role.value, words_of(error))
                self._why_not = words_of(error)
            await asyncio.sleep(_ASK_AGAIN_S)
            self._why_not = ""

    async def _keep(self) -> None:
        lock = self._open_lock()
        try:
            while True:
                await self._end(lock)
                self._is_missing = True
                if lock.read() == TOLD_TO_END:  # which stays, for one that is only starting now
                    return
                if not await self._start(lock):
                    return lock.remove()
                self._is_missing = False
                lock.close()  # the process has it now
                lock = self._open_lock()
        finally:
            lock.close()

    async def gone(self) -> None:
        """Returns once nobody plays the role, which is over."""
        lock = self._open_lock()
        try:
            await lock.taken()
            lock.remove()
        finally:
            lock.close()

    def _open_lock(self) -> RoleLock:
        return RoleLock.open(self._settings.namespace, self._kept.instance, self._role)

    async def _end(self, lock: RoleLock) -> None:
        """Returns once nobody plays the role, and the lock is ours. One that another process started is known by its lock alone."""
        child, self._child = self._child, None
        if child is not None:
            how = await child.wait() or "by itself"
            self._restarts.died(time.monotonic(), how, lived_s=time.monotonic() - self._started_at)
            self._last_end = f"ended ({how})"
        elif not lock.take():
            self._last_end = "does not run any more"
        await lock.taken()

    async def _start(self, lock: RoleLock) -> bool:
        """As soon as that may be. False where the instance has ended."""
        while True:
            standing = await self._ask()
            if standing is lease.Standing.ENDED:
                return False
            pause_s = self._restarts.not_before - time.monotonic()
            if not self._why_not and pause_s <= 0 and self._launch(lock):
                return True
            await asyncio.sleep(_ASK_AGAIN_S if self._why_not else min(_ASK_AGAIN_S, max(0.0, pause_s)))

    async def _ask(self) -> lease.Standing | None:
        """What is left of the instance; None where the store does not say. First the lead of a controller that ended is released."""
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
        except OSError as error:  # no file descriptors, no processes: there may be some later
            logger.error("cannot start the %s: %s", self._role.value, words_of(error))
            self._restarts.died_early(time.monotonic(), words_of(error))
            return False
        self._started_at = time.monotonic()
        return True


class Supervisor:
    """Keeps the controller, and the node if there is one."""

    def __init__(self, settings: Settings, kept: Kept, store: Store) -> None:
        self._id = f"supervisor-{socket.gethostname()}-{kept.token}"  # the next one's too: its beat takes the place of this one's
        roles = [Role.CONTROLLER, Role.NODE] if kept.node_id else [Role.CONTROLLER]
        self._parts = [Part(role, kept, settings, store) for role in roles]
        self._store = store
        beats = StoreKeys(settings.namespace).beats
        self._presence = Presence(store, beats, f"supervisor:{self._id}", lambda: self._beat().to_bytes(), BEAT_EVERY_S)

    def __repr__(self) -> str:
        return f"<Supervisor of {self._parts}>"

    async def run(self, lock: RoleLock, stop: Stop) -> None:
        """Until the instance has ended, or `stop` is set: then the others end, too."""
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._presence.beat_forever())
            keeping = [tasks.create_task(part.keep()) for part in self._parts]
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
        try:
            async with asyncio.timeout(_END_BUDGET_S):
                for part in self._parts:
                    await part.gone()
            lock.remove()
        except TimeoutError:
            logger.error("of %s one has not ended within %d s, and is left to itself", self._parts, _END_BUDGET_S)

    def _beat(self) -> SupervisorBeat:
        error = "; ".join(part.trouble for part in self._parts if part.trouble)
        return SupervisorBeat(self._id, self._store.now_ms(), pid=os.getpid(), host=socket.gethostname(), error=error)


async def run_supervisor(settings: Settings, kept: Kept) -> int:
    """Until the instance has ended or somebody ends it; the exit code. Raises InstanceError where another one has the part."""
    stop = stop_event()
    lock = await _take_own_lock(settings, kept)
    async with open_redis(settings.store_url, settings.namespace) as store:
        await Supervisor(settings, kept, store).run(lock, stop)
    return 0


async def _take_own_lock(settings: Settings, kept: Kept) -> RoleLock:
    """The first supervisor takes it itself; a later one was given it by its starter."""
    which = settings.namespace, kept.instance, Role.SUPERVISOR
    lock = RoleLock.open(*which) if kept.lock is None else RoleLock.handed_on(kept.lock, *which)
    try:
        async with asyncio.timeout(_TAKE_BUDGET_S):
            await lock.taken()
    except TimeoutError:
        raise InstanceError("a supervisor of this instance runs on this machine already") from None
    lock.write(b"")  # the last one may have been told to end
    return lock


@asynccontextmanager
async def keeping_supervisor(kept: Kept | None, settings: Settings, store: Store, stop: Stop) -> AsyncIterator[Callable[[], str]]:
    """Beside a controller or a node that a supervisor started: starts that again, and sets `stop` with the end of the instance. Gives what
    is in the way of that, for operators. Beside others it does nothing."""
    if kept is None or kept.lock is None:
        yield lambda: ""
        return
    os.set_inheritable(kept.lock, False)  # no child is to have it: it would play the role when this process has ended
    part = Part(Role.SUPERVISOR, kept, settings, store)

    async def keep() -> None:
        await part.keep()
        stop.set()

    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(keep())
        try:
            yield lambda: part.trouble
        finally:
            keeping.cancel()
