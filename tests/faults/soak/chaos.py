"""What is broken, when, and how long until all is whole again: at random, but the same for one seed."""

import asyncio
import math
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import httpx

from tests.faults.soak.cluster import Cluster, Member
from tests.faults.soak.ledger import Fault
from tests.servers import PrivateServer

FREEZE_S = (2.0, 6.0)
RECOVER_S = 60.0  # longer than that is a finding
FIRST_AFTER_S = 4.0
LAST_BEFORE_S = 12.0  # of the load's end

NOTHING: frozenset[str] = frozenset()
UNAVAILABLE = frozenset({"503", "504"})
NO_CONNECTION = frozenset({"refused", "reset", "cut", "replay cut"})
BROKE_OFF = frozenset({"cut", "failure"})  # what a stream says that is not replayed
RESTARTED = frozenset({"1012"})  # what a session ends with whose replica has gone, or of which something was lost


class Kind(NamedTuple):
    """One row of the fault table: what it does, what a request may say of it, and how a session may end."""

    act: Callable[["Chaos", Fault], Awaitable[None]]
    allows: frozenset[str] = NOTHING
    sessions: frozenset[str] = NOTHING
    is_server: bool = False
    drains: bool = False
    forgets: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """`at_s` after the load began."""

    at_s: float
    kind: str


def plan(chance: random.Random, count: int, seconds: float, among: Sequence[str]) -> list[Due]:
    """Each kind once before any comes twice; spread over the load, but for its beginning and its end."""
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += chance.sample(among, len(among))
    span = seconds - FIRST_AFTER_S - LAST_BEFORE_S
    return [Due(FIRST_AFTER_S + (turn + chance.random() * 0.5) * span / count, kind) for turn, kind in enumerate(kinds[:count])]


class Chaos:
    """Breaks one thing at a time; a server only when the last one that was broken has recovered."""

    def __init__(self, cluster: Cluster, chance: random.Random) -> None:
        self.cluster = cluster
        self.chance = chance
        self.faults: list[Fault] = []
        self.findings: list[str] = []

    async def run(self, dues: list[Due]) -> None:
        """Returns when the last one has recovered, or has not in time."""
        began = time.monotonic()
        async with httpx.AsyncClient() as http, asyncio.TaskGroup() as recoveries:
            server_whole = asyncio.Event()
            server_whole.set()
            for due in dues:
                await asyncio.sleep(max(0, began + due.at_s - time.monotonic()))
                kind = KINDS[due.kind]
                if kind.is_server:
                    await server_whole.wait()
                    server_whole.clear()
                fault = Fault(due.kind, allows=kind.allows, sessions=kind.sessions, drains=kind.drains, forgets=kind.forgets)
                fault.began = time.monotonic()
                self.faults.append(fault)
                await kind.act(self, fault)
                fault.mended = time.monotonic()
                recoveries.create_task(self._recover(fault, http, server_whole if kind.is_server else None))

    async def _recover(self, fault: Fault, http: httpx.AsyncClient, tell: asyncio.Event | None) -> None:
        try:
            while ailment := await self.cluster.ailment(http):
                if time.monotonic() > fault.mended + RECOVER_S:
                    self.findings.append(f"{fault.kind} {fault.target}: not recovered {RECOVER_S:g} s later: {ailment}")
                    return
                await asyncio.sleep(0.25)
            fault.recovered = time.monotonic()
        finally:
            if tell is not None:
                tell.set()

    # Processes.

    async def kill_replica(self, fault: Fault) -> None:
        if pid := await self._a_replica(fault):
            os.kill(pid, signal.SIGKILL)

    async def end_replica(self, fault: Fault) -> None:
        if pid := await self._a_replica(fault):
            os.kill(pid, signal.SIGTERM)

    async def freeze_replica(self, fault: Fault) -> None:
        if pid := await self._a_replica(fault):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(self.chance.uniform(*FREEZE_S))
            os.kill(pid, signal.SIGCONT)

    async def _a_replica(self, fault: Fault) -> int:
        """Its pid; one that lives, which the store may have to come back to say."""
        until = time.monotonic() + RECOVER_S
        while time.monotonic() < until:
            try:
                if pids := await self.cluster.replica_pids():
                    pid = self.chance.choice(sorted(pids))
                    fault.target, fault.began = pids[pid], time.monotonic()
                    return pid
            except Exception:  # the store is away
                pass
            await asyncio.sleep(0.2)
        self.findings.append(f"{fault.kind}: there was no replica to break")
        return 0

    async def kill_proxy(self, fault: Fault) -> None:
        await self._end(fault, self.cluster.proxies, signal.SIGKILL)

    async def end_proxy(self, fault: Fault) -> None:
        await self._end(fault, self.cluster.proxies, signal.SIGTERM)

    async def kill_controller(self, fault: Fault) -> None:
        await self._end(fault, self.cluster.controllers, signal.SIGKILL)

    async def end_controller(self, fault: Fault) -> None:
        await self._end(fault, self.cluster.controllers, signal.SIGTERM)

    async def kill_node(self, fault: Fault) -> None:
        await self._end(fault, self.cluster.nodes, signal.SIGKILL)

    async def end_node(self, fault: Fault) -> None:
        await self._end(fault, self.cluster.nodes, signal.SIGTERM)

    async def _end(self, fault: Fault, members: list[Member], number: signal.Signals) -> None:
        """Ends one of them and starts it again, as whoever runs it would."""
        member = self.chance.choice(members)
        try:
            leads = await self.cluster.leader() == member.name
        except Exception:  # the store is away
            leads = False
        fault.target = f"{member.name}{' (leading)' if leads else ''}"
        fault.proxy = member.name if member in self.cluster.proxies else ""
        while member.program.ended:  # the one before is only just being started again
            await asyncio.sleep(0.1)
        member.is_meant_to_end, fault.began = True, time.monotonic()
        young = fault.began - member.started < 3  # it may not have its signal handlers yet
        member.program.signal(number)
        await self.cluster.wait_ended(member)
        code = member.program.wait()
        if number == signal.SIGTERM and code != 0 and not young:
            self.findings.append(f"{member.name} ended with {code} after SIGTERM:\n{member.program.output[-2000:]}")
        self.cluster.start_member(member)
        member.is_meant_to_end = False

    # Servers.

    async def restart_broker(self, fault: Fault) -> None:
        await self._restart(self.cluster.broker, self.cluster.broker.stop)

    async def crash_broker(self, fault: Fault) -> None:
        await self._restart(self.cluster.broker, self.cluster.broker.kill)

    async def freeze_broker(self, fault: Fault) -> None:
        await self._freeze(self.cluster.broker)

    async def restart_store(self, fault: Fault) -> None:
        await self._restart(self.cluster.store, self.cluster.store.stop)

    async def crash_store(self, fault: Fault) -> None:
        await self._restart(self.cluster.store, self.cluster.store.kill)

    async def empty_store(self, fault: Fault) -> None:
        def end() -> None:
            self.cluster.store.kill()
            self.cluster.store.forget()

        await self._restart(self.cluster.store, end)

    async def freeze_store(self, fault: Fault) -> None:
        await self._freeze(self.cluster.store)

    async def _restart(self, server: PrivateServer, end: Callable[[], None]) -> None:
        await asyncio.to_thread(end)
        await asyncio.sleep(self.chance.uniform(0, 2))
        await asyncio.to_thread(server.start)

    async def _freeze(self, server: PrivateServer) -> None:
        server.freeze()
        await asyncio.sleep(self.chance.uniform(*FREEZE_S))
        server.thaw()


BROKER_LOST = UNAVAILABLE | BROKE_OFF | {"dropped"}  # what it redelivers may be taken over
STORE_LOST = UNAVAILABLE | RESTARTED  # of sessions: what was under way in it

KINDS = {
    "kill -9 a replica": Kind(Chaos.kill_replica, BROKE_OFF, RESTARTED),
    "SIGTERM a replica": Kind(Chaos.end_replica),
    "freeze a replica": Kind(Chaos.freeze_replica),
    "kill -9 a proxy": Kind(Chaos.kill_proxy, NO_CONNECTION, frozenset({"refused", "reset", "1006"})),
    "SIGTERM a proxy": Kind(Chaos.end_proxy, NO_CONNECTION, frozenset({"refused", "reset", "503", "1001"}), drains=True),
    "kill -9 a controller": Kind(Chaos.kill_controller),
    "SIGTERM a controller": Kind(Chaos.end_controller),
    "kill -9 a node": Kind(Chaos.kill_node, UNAVAILABLE | BROKE_OFF, UNAVAILABLE | RESTARTED),  # it may have had all replicas of a backend
    "SIGTERM a node": Kind(Chaos.end_node),
    "restart RabbitMQ": Kind(Chaos.restart_broker, BROKER_LOST, UNAVAILABLE, is_server=True),
    "kill -9 RabbitMQ": Kind(Chaos.crash_broker, BROKER_LOST, UNAVAILABLE, is_server=True),
    "freeze RabbitMQ": Kind(Chaos.freeze_broker, UNAVAILABLE, UNAVAILABLE, is_server=True),
    "restart Redis": Kind(Chaos.restart_store, UNAVAILABLE, STORE_LOST, is_server=True),
    "kill -9 Redis": Kind(Chaos.crash_store, UNAVAILABLE, STORE_LOST, is_server=True),
    "restart Redis without data": Kind(
        Chaos.empty_store,
        UNAVAILABLE | BROKE_OFF | {"forgotten", "gap", "404", "replay cut", "replay failed"},
        STORE_LOST,
        is_server=True,
        forgets=True,
    ),
    "freeze Redis": Kind(Chaos.freeze_store, UNAVAILABLE, STORE_LOST, is_server=True),
}


def recovery_s(fault: Fault) -> float:
    """From the mending until all was whole."""
    return fault.recovered - fault.mended if math.isfinite(fault.recovered) else math.inf
