"""Controller and node as processes of their own (the supervisor is in supervisor.py)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial

from ..broker.documents import until
from ..broker.errors import BackendFailed, InstanceError
from ..broker.process.lifeline import Stop, stop_event
from ..broker.rabbitmq.queue import PROBE_SELDOM_EVERY_S
from ..broker.redis.store import open_redis
from ..broker.settings import Settings
from ..broker.store_keys import StoreKeys
from ..connections import Connections, open_connections
from ..controller import lease
from ..controller.loop import Controller
from ..controller.node import Node, NodeOptions, check_name_is_free
from ..controller.node_metrics import serve_metrics
from ..controller.processes import ProcessLauncher
from ..replicas.trust import SenderTrust
from .supervisor import Kept, keeping_supervisor

JOIN_TRIES = 3


async def run_controller(settings: Settings, controller_id: str, kept: Kept | None = None) -> int:
    """Runs a controller until it is stopped or the instance is shut down; returns the exit code.

    A controller that a keeper started belongs to the keeper's instance, and never makes a new one. It also leads while RabbitMQ is away.
    """
    stop = stop_event()
    opening = open_connections(settings, "controller", broker_may_be_away=kept is not None, probe_every_s=PROBE_SELDOM_EVERY_S)
    async with opening as connections:
        async with keeping_supervisor(kept, settings, connections.store, stop) as trouble:
            instance = kept.instance if kept is not None else await join_or_start(connections)
            controller = Controller(
                connections.store,
                connections.keys,
                connections.queue,
                controller_id,
                instance,
                kept_by=kept.token if kept is not None else "",
                trouble=trouble,
                senders=_senders(settings),
                settings=settings,
            )
            await controller.run(stop)
        if stop.orphaned:  # the starter was killed: free the namespace at once; the queues keep the accepted requests
            await lease.forget(connections.store, connections.keys, instance)
    return 0


def _senders(settings: Settings) -> SenderTrust | None:
    """Returns None where no replica can tell senders apart either: each says so, and none starts."""
    try:
        return SenderTrust(settings)
    except BackendFailed:
        return None


async def run_node(settings: Settings, options: NodeOptions, metrics_host: str, metrics_port: int, kept: Kept | None = None) -> int:
    """Runs a node until it is stopped; returns the exit code. It connects to the store only, since a node handles no messages."""
    stop: Stop = stop_event()
    async with open_redis(settings.store_url, settings.namespace) as store:
        with serve_metrics(metrics_host, metrics_port) as metrics:
            keys = StoreKeys(settings.namespace)
            await check_name_is_free(store, keys, options.node_id)
            async with keeping_supervisor(kept, settings, store, stop) as trouble:
                options = replace(options, metrics=metrics, trouble=trouble)
                launcher = ProcessLauncher(settings, held_by_replicas=(metrics.lock,))
                await Node(options, store, keys, launcher, settings.signer).run(stop)
    return 0


async def join_or_start(connections: Connections) -> str:
    """Returns the id of the running instance, or starts a detached one if there is none.

    It watches an empty namespace first: its store may have lost the data, which a controller is about to write back, or somebody may be
    starting an instance right now. Raises InstanceError if neither happens and none can be started.
    """
    tries_left = JOIN_TRIES
    while True:
        with suppress(TimeoutError):
            return await until(connections.store, partial(_find_instance, connections), lease.JOIN_WATCH_S)
        try:
            return (await lease.claim_instance(connections.store, connections.keys, "", None, detached=True)).id
        except InstanceError:
            tries_left -= 1
            if not tries_left:
                raise  # otherwise another starter was faster, and its documents will come


async def _find_instance(connections: Connections) -> str | None:
    with suppress(InstanceError):
        return (await lease.read_instance(connections.store, connections.keys)).id
    return None
