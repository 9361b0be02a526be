"""Opens queue and store. This is the only module that chooses between the embedded and the distributed form."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .broker.errors import MQServeError
from .broker.memory.queue import EmbeddedQueue
from .broker.memory.store import EmbeddedStore
from .broker.queue import Queue
from .broker.rabbitmq.queue import PROBE_EVERY_S, open_rabbitmq
from .broker.redis.store import open_redis
from .broker.settings import Settings
from .broker.store import Store
from .broker.store_keys import StoreKeys
from .controller import lease


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
        yield Connections(settings, EmbeddedQueue(), EmbeddedStore(settings.namespace, settings.result_files), keys, process_id)
        return
    async with (
        open_redis(settings.store_url, settings.namespace, settings.result_files) as store,
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
