"""Controller and node as processes of their own."""

from __future__ import annotations

from dataclasses import replace

from .broker.errors import InstanceError
from .broker.lifeline import Stop, stop_event
from .broker.redis_store import open_redis
from .broker.settings import Settings
from .broker.store_keys import StoreKeys
from .controller import lease
from .controller.loop import Controller
from .controller.node import Node, NodeOptions
from .controller.node_metrics import serve_metrics
from .controller.processes import ProcessLauncher
from .controller.state import HttpOptions
from .links import Links, open_links


async def run_controller(settings: Settings, controller_id: str) -> int:
    """Until it is stopped or the instance is shut down; the exit code."""
    stop = stop_event()
    async with open_links(settings, "controller") as links:
        held = await _join_or_start(links)
        await Controller(links.store, links.keys, links.queue, controller_id).run(stop)
        if stop.orphaned:  # the starter was killed: the namespace is free at once, and the queues keep what was accepted
            await lease.forget(links.store, links.keys, held.id)
    return 0


async def run_node(settings: Settings, options: NodeOptions, metrics_host: str, metrics_port: int) -> int:
    """Until it is stopped; the exit code. It needs the store only: a node takes and sends no messages."""
    stop: Stop = stop_event()
    async with open_redis(settings.store_url, settings.namespace) as store:
        with serve_metrics(metrics_host, metrics_port) as metrics:
            options = replace(options, metrics=metrics)
            await Node(options, store, StoreKeys(settings.namespace), ProcessLauncher(settings)).run(stop)
    return 0


async def _join_or_start(links: Links) -> lease.InstanceLease:
    try:
        return await lease.read_instance(links.store, links.keys)
    except InstanceError:
        return await lease.claim_instance(links.store, links.keys, "", HttpOptions(location="NoServer"), detached=True)
