"""The embedded form: controller, node, proxies and replicas in one process, as tasks. A process that runs none of them does not import
this file."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import nullcontext
from functools import partial

from ..broker.backoff import keep_running
from ..broker.errors import MQServeError
from ..broker.process.lifeline import Stop
from ..connections import Connections
from ..controller.loop import Controller
from ..controller.machine_resources import measure_node
from ..controller.node import Node, NodeOptions, Share
from ..proxy.main import Proxy, ProxyOptions
from ..replicas.main import Replica, ReplicaOptions
from ..replicas.trust import SenderTrust

logger = logging.getLogger(__name__)


def start_embedded(connections: Connections, instance: str, node_id: str, stop: Stop) -> list[asyncio.Task[None]]:
    """Starts the controller and the node, and returns their tasks."""

    async def control() -> None:
        """Runs a new controller, which adopts what runs, as one in another process does."""
        senders = SenderTrust(connections.settings)
        controller = Controller(
            connections.store, connections.keys, connections.queue, connections.process_id, instance,
            senders=senders, settings=connections.settings,
        )  # fmt: skip
        await controller.run(stop)

    options = NodeOptions(node_id, capacity=measure_node(None, None, {}))
    node = Node(options, connections.store, connections.keys, EmbeddedLauncher(connections), connections.settings.signer)
    controlling = asyncio.create_task(keep_running("the controller", control, raises=(MQServeError,)))
    tasks = [controlling, asyncio.create_task(node.run(stop))]
    for task, role in zip(tasks, ("controller", "node"), strict=True):
        task.add_done_callback(partial(_tell_end, role))
    return tasks


def _tell_end(role: str, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the %s of this program ended: it replaces and scales nothing more, so start the program again", role, exc_info=error)


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

    def proxy(self, proxy_id: str, host: str, port: int, node: str, *, shares_port: bool) -> TaskChild:
        proxy = Proxy(self._connections.settings, ProxyOptions(proxy_id, host, port, node), self._connections.store)
        stop = Stop()
        return TaskChild(asyncio.create_task(proxy.run(self._connections.queue, stop), name=proxy_id), stop)

    def stop_listening(self) -> None:
        """Does nothing: a proxy in this process binds its own socket."""
