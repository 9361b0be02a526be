"""A distributed instance as processes, as compose would run it: each is started again when it ends."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis.asyncio as redis
from redis.exceptions import RedisError

from mqserve.broker.store_keys import StoreKeys
from mqserve.controller.state.beats import Beat, read_beats
from tests.faults.soak.backends import BACKENDS, PROBE, REPLICAS, body_of
from tests.instances import ROOT, SECRET_KEY, CommandLine, Program
from tests.ports import free_port
from tests.servers import PrivateRabbitMQ, PrivateRedis

FRESH_S = 3.0  # a beat that is older says nothing of now
YOUNG_S = 20.0  # a process that found no server when it started may end: it is started again
START_S = 60.0
END_S = 45.0


@dataclass(eq=False, slots=True)
class Member:
    """One long-running command and its runs, the current one last."""

    name: str
    arguments: tuple[str, ...]
    runs: list[Program] = field(default_factory=list)
    started: float = 0.0
    is_meant_to_end: bool = False  # somebody is ending it, and starts it again

    @property
    def program(self) -> Program:
        return self.runs[-1]


class Cluster:
    """Two controllers, two nodes, two external proxies, on servers of their own."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self.namespace = namespace
        self.broker = PrivateRabbitMQ()
        self.store = PrivateRedis(keeps_data=True)
        self.keys = StoreKeys(namespace)
        self.redis = redis.Redis.from_url(self.store.url, socket_timeout=2, socket_connect_timeout=2)
        self.shell = CommandLine(
            folder,
            MQSERVE_BROKER_URL=self.broker.url,
            MQSERVE_STORE_URL=self.store.url,
            MQSERVE_SECRET_KEY=SECRET_KEY,
            MQSERVE_NAMESPACE=namespace,
            PYTHONPATH=str(ROOT),  # the handlers import the tests
            PYTHONUNBUFFERED="1",
        )
        ports = {name: free_port() for name in ("proxy-1", "proxy-2")}
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        self.controllers = [Member(f"controller-{number}", ("controller",)) for number in (1, 2)]
        self.nodes = [Member(f"node-{number}", ("node", "--node-id", f"node-{number}", "--no-proxy")) for number in (1, 2)]
        self.proxies = [Member(name, ("proxy", "--port", str(port))) for name, port in ports.items()]
        self.findings: list[str] = []

    @property
    def members(self) -> list[Member]:
        return [*self.controllers, *self.nodes, *self.proxies]

    def start_member(self, member: Member) -> None:
        member.runs.append(self.shell.start(*member.arguments))
        member.started = time.monotonic()

    async def start(self) -> None:
        await asyncio.gather(asyncio.to_thread(self.broker.start), asyncio.to_thread(self.store.start))
        self.start_member(self.controllers[0])  # the first one makes the instance, the others join it
        await self._until(lambda: self.redis.exists(self.keys.instance), "there is an instance")
        for member in self.members[1:]:
            self.start_member(member)
        await self._until(self._has_members, "nodes and proxies are there")

    async def _has_members(self) -> bool:
        beats = (await self.beats()).values()
        return sum(beat.kind in ("node", "proxy") and beat.state == "ready" for beat in beats) == len(self.nodes) + len(self.proxies)

    async def _until(self, condition: Callable[[], Awaitable[object]], what: str) -> None:
        until = time.monotonic() + START_S
        while not await condition():
            if time.monotonic() > until:
                raise TimeoutError(f"not within {START_S:g} s: {what}\n{self.controllers[0].program.output}")
            await asyncio.sleep(0.1)

    async def supervise(self) -> None:
        """Starts again what ended. One that ended by itself is a finding, unless it had only just been started."""
        while True:
            await asyncio.sleep(0.25)
            for member in self.members:
                if member.runs and member.program.ended and not member.is_meant_to_end:
                    if time.monotonic() - member.started > YOUNG_S:
                        self.findings.append(f"{member.name} ended by itself: {member.program!r}\n{member.program.output[-2000:]}")
                    await asyncio.sleep(1)
                    self.start_member(member)

    async def wait_ended(self, member: Member) -> None:
        until = time.monotonic() + END_S
        while not member.program.ended:
            if time.monotonic() > until:
                self.findings.append(f"{member.name} had not ended {END_S:g} s after it was told to: {member.program!r}")
                member.program.signal(signal.SIGKILL)
            await asyncio.sleep(0.05)

    # What is there.

    async def beats(self) -> dict[str, Beat]:
        """Those of now, by field."""
        found: dict[Any, Any] = await self.redis.hgetall(self.keys.beats)
        seconds, microseconds = await self.redis.time()
        oldest = seconds * 1000 + microseconds / 1000 - FRESH_S * 1000
        beats = read_beats({name.decode(): raw for name, raw in found.items()})
        return {name: beat for name, beat in beats.items() if beat.at >= oldest and psutil.pid_exists(beat.pid)}

    async def replica_pids(self) -> dict[int, str]:
        """Of those that are ready, with their ids."""
        return {beat.pid: beat.id for beat in (await self.beats()).values() if beat.kind == "replica" and beat.state == "ready"}

    async def leader(self) -> str:
        """The name of the controller that leads, as far as anybody says so."""
        raw = await self.redis.get(self.keys.leader)
        led_by = json.loads(raw)["controller"] if raw else ""
        host = socket.gethostname()
        return next((member.name for member in self.controllers if led_by == f"controller-{host}-{member.program.pid}"), "")

    async def job_ids(self) -> list[str]:
        """Of all jobs that the store knows."""
        raws: list[Any] = await self.redis.zrange(self.keys.jobs, 0, -1)
        return [raw.decode() for raw in raws]

    async def ailment(self, http: httpx.AsyncClient) -> str:
        """What keeps the cluster from being whole; empty when nothing does."""
        if not all((self.broker.running, self.store.running)):
            return "a server is down"
        if ended := [member.name for member in self.members if member.program.ended]:
            return f"{', '.join(ended)} is not there"
        try:
            beats = (await self.beats()).values()
            counts = {kind: sum(beat.kind == kind and beat.state == "ready" for beat in beats) for kind in ("replica", "node", "proxy")}
            if counts != (wanted := {"replica": REPLICAS, "node": len(self.nodes), "proxy": len(self.proxies)}):
                return f"there are {counts} ready, not {wanted}"
            for name, backend in BACKENDS.items():
                for url in self.urls.values():
                    path = backend.route.partition("{")[0].rstrip("/")
                    if "{" in backend.route:
                        answer = await http.get(f"{url}{path}/{PROBE}", timeout=5)
                    else:
                        answer = await http.post(f"{url}{path}", json=body_of(name, PROBE), timeout=5)
                    if answer.status_code != (500 if name == "raising" else 200):
                        return f"{name} answers {answer.status_code} by {url}"
        except (RedisError, OSError, TimeoutError, httpx.HTTPError) as error:
            return repr(error)
        return ""

    def processes(self) -> dict[int, str]:
        """All of this instance on this machine, by pid: also those that lost their parent."""
        return {process.pid: role for process in psutil.process_iter() if (role := self._role(process))}

    def _role(self, process: psutil.Process) -> str:
        try:
            command = process.cmdline()
            if "mqserve" not in command or process.status() == psutil.STATUS_ZOMBIE:
                return ""
            return command[command.index("mqserve") + 1] if process.environ().get("MQSERVE_NAMESPACE") == self.namespace else ""
        except (psutil.Error, OSError, IndexError):
            return ""

    def logs(self) -> Iterator[tuple[str, str]]:
        """(name, text) of everything that was run."""
        for member in self.members:
            for number, program in enumerate(member.runs, 1):
                yield f"{member.name}, run {number}", program.output

    async def close(self) -> None:
        await self.redis.aclose()
        for member in self.members:
            if member.runs and not member.program.ended:
                member.program.signal(signal.SIGTERM)
        await asyncio.to_thread(self.shell.close)
        for server in (self.broker, self.store):
            await asyncio.to_thread(server.close)


class Client:
    """The handle client: its lines go to whoever listens, its errors to a file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self.log = log

    @classmethod
    async def start(cls, cluster: Cluster) -> "Client":
        log = cluster.shell.folder / "client.txt"
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.faults.soak.handle_client", str(cluster.shell.folder),
                cwd=ROOT, env=cluster.shell.env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
                start_new_session=True, limit=1 << 20,
            )  # fmt: skip
        return cls(process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())

    async def until(self, event: str, within_s: float) -> dict[str, object]:
        """The next line of that event, the others skipped."""
        async with asyncio.timeout(within_s):
            async for said in self.lines():
                if said["event"] == event:
                    return said
        raise RuntimeError(f"the client ended and never said {event!r}:\n{self.log.read_text()}")

    async def lines(self) -> AsyncIterator[dict[str, object]]:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            yield json.loads(line)

    async def close(self) -> None:
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()


@asynccontextmanager
async def running_cluster(folder: Path, namespace: str) -> AsyncIterator[Cluster]:
    cluster = Cluster(folder, namespace)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.close()
