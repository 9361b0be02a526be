"""Opens queue, store and launcher. This is the only module that chooses between the embedded and the distributed form."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

from .broker.errors import MQServeError
from .broker.memory.queue import EmbeddedQueue
from .broker.memory.store import EmbeddedStore
from .broker.process.lifeline import Stop
from .broker.queue import Queue
from .broker.rabbitmq.queue import PROBE_EVERY_S, open_rabbitmq
from .broker.redis.store import open_redis
from .broker.settings import Settings
from .broker.store import Store
from .broker.store_keys import StoreKeys
from .controller import lease
from .controller.node import Share
from .proxy.main import Proxy, ProxyOptions
from .replicas.main import Replica, ReplicaOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connections:
    """One process's connections to the broker and the store."""

    settings: Settings
    queue: Queue
    store: Store
    keys: StoreKeys
    process_id: str


@asynccontextmanager
async def open_connections(
    settings: Settings, role: str, *, broker_may_be_away: bool = False, probe_every_s: float = PROBE_EVERY_S
) -> AsyncIterator[Connections]:
    """Yields open connections, or raises BrokerUnavailable or StoreUnavailable within ten seconds; closes them on exit."""
    process_id = f"{role}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    keys = StoreKeys(settings.namespace)
    if settings.embedded:
        yield Connections(settings, EmbeddedQueue(), EmbeddedStore(), keys, process_id)
        return
    async with (
        open_redis(settings.store_url, settings.namespace) as store,
        open_rabbitmq(
            settings.broker_url, settings.namespace, process_id,
            seals=settings.header_seals, may_be_away=broker_may_be_away, probe_every_s=probe_every_s,
        ) as queue,
    ):  # fmt: skip
        yield Connections(settings, queue, store, keys, process_id)


async def instance_has_ended(connections: Connections, instance: str) -> bool:
    """Whether the instance was shut down. A store that is away does not count as that."""
    try:
        return await lease.has_ended(connections.store, connections.keys, instance)
    except MQServeError:
        return False


class TaskChild:
    """A replica or proxy inside this process. Implements `Child`. It cannot be killed, so a stuck one is abandoned."""

    def __init__(self, run: asyncio.Task[None], stop: Stop) -> None:
        self._run = run
        self._stop = stop

    def __repr__(self) -> str:
        return f"<TaskChild {self._run.get_name()}>"

    @property
    def pid(self) -> int:
        return os.getpid()

    async def wait(self) -> str:
        await asyncio.wait([self._run])
        if self._run.cancelled():
            return "abandoned"
        error = self._run.exception()
        if error is not None and not isinstance(error, MQServeError):
            logger.error("%s ended by a bug in mqserve, please report it", self._run.get_name(), exc_info=error)
        return str(error) if error is not None else ""

    def stop(self) -> None:
        self._stop.set()

    def kill(self) -> None:
        self._run.cancel()


class EmbeddedLauncher:
    """Implements `Launcher`: children share this process's queue and store, and each replica has a thread of its own."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def replica(self, backend: str, replica_id: str, node: str, share: Share) -> TaskChild:
        replica = Replica(self._connections.settings, ReplicaOptions(backend, replica_id, node), self._connections.store)
        stop = Stop()
        run = replica.run(lambda: nullcontext(self._connections.queue), stop)
        return TaskChild(asyncio.create_task(run, name=replica_id), stop)

    def proxy(self, proxy_id: str, host: str, port: int, node: str) -> TaskChild:
        proxy = Proxy(self._connections.settings, ProxyOptions(proxy_id, host, port, node), self._connections.store)
        stop = Stop()
        return TaskChild(asyncio.create_task(proxy.run(self._connections.queue, stop), name=proxy_id), stop)

    def stop_listening(self) -> None:
        """Does nothing: a proxy in this process binds its own socket."""
