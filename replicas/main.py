"""The life of a replica: load the code, construct, open the broker, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from starlette.convertors import register_url_convertor

from ..broker import code
from ..broker.documents import follow
from ..broker.errors import BackendFailed, BadValue, MQServeError
from ..broker.lifeline import Stop, stop_event
from ..broker.presence import Presence
from ..broker.queue import Queue
from ..broker.rabbitmq import open_rabbitmq
from ..broker.redis_store import open_redis
from ..broker.results import Result
from ..broker.settings import Settings
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from ..controller.state import BEAT_EVERY_S, Backend, Beat, Desired, Observed
from .execute import Execution
from .handler import Handler, make_handler
from .serve import Server
from .worker import Job, Worker

logger = logging.getLogger(__name__)

ORPHAN_DRAIN_S = 4.0  # of a replica whose parent was killed
FAILED_EXIT = 3  # the user's code could not be loaded or constructed


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """Which replica this is. External: started by hand, and so neither counted nor stopped by the controller."""

    backend: str
    replica_id: str
    node: str = ""
    external: bool = False


async def main(settings: Settings, options: ReplicaOptions) -> int:
    """A replica as a process; the exit code."""
    stop = stop_event()
    async with open_redis(settings.store_url, settings.namespace) as store:
        replica = Replica(settings, options, store)
        try:
            await replica.run(lambda: open_rabbitmq(settings.broker_url, settings.namespace, options.replica_id), stop)
        except MQServeError as error:
            logger.error("%s: %s", options.replica_id, error)
            return FAILED_EXIT
    return 0


class Replica:
    """One copy of a backend, in a process of its own or beside others in one."""

    def __init__(self, settings: Settings, options: ReplicaOptions, store: Store) -> None:
        self._settings = settings
        self._options = options
        self._store = store
        self._keys = StoreKeys(settings.namespace)
        self._state = "starting"
        self._error = ""
        self._backend: Backend | None = None
        self._server: Server | None = None
        field = f"replica:{options.replica_id}"
        self._presence = Presence(store, self._keys.beats, field, lambda: self._beat().to_bytes(), BEAT_EVERY_S)

    def __repr__(self) -> str:
        return f"<Replica {self._options.replica_id} {self._state}>"

    async def run(self, open_queue: Callable[[], AbstractAsyncContextManager[Queue]], stop: Stop) -> None:
        """Until `stop` is set or the replica is no longer assigned, and then until it is drained.

        Raises BackendFailed with the reason when the code cannot be loaded or constructed; the reason stands in the store too.
        """
        self._backend = backend = await self._read_backend()
        worker = Worker(self._options.replica_id, backend.config.sync_threads, self._on_done)
        failure: MQServeError | None = None  # raised outside the group, which would wrap it
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._presence.beat_forever())
            try:
                handler = await self._construct(
                    worker, backend
                )  # before the broker: a constructor that holds the GIL must not cost us the connection
                async with open_queue() as queue:
                    await self._serve(queue, worker, handler, stop)
            except BackendFailed as error:
                self._state, self._error = "failed", str(error)
                failure = error
            except MQServeError as error:
                failure = error
            finally:
                worker.stop()
                await self._presence.leave(with_last_words=self._state == "failed")
                beating.cancel()
        if failure is not None:
            raise failure

    async def _serve(self, queue: Queue, worker: Worker, handler: Handler, stop: Stop) -> None:
        assert self._backend is not None
        execution = Execution(self._backend.name, handler, self._settings.signer)
        worker.serve(execution)
        self._server = server = Server(
            self._settings.namespace, self._backend.name, queue, self._store, worker, self._backend.config, is_async=handler.is_async
        )
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(self._follow(server, stop))
            tuning = tasks.create_task(server.tune_forever())
            await stop.wait()
            self._say("draining")
            following.cancel()
            await server.drain(ORPHAN_DRAIN_S if stop.orphaned else math.inf)
            tuning.cancel()

    async def _read_backend(self) -> Backend:
        desired = Desired.from_bytes(await self._store.get(self._keys.desired))
        backend = desired.backends.get(self._options.backend)
        if backend is None:
            known = ", ".join(sorted(desired.backends)) or "none"
            raise BadValue(
                f"there is no backend {self._options.backend!r} in {self._settings.namespace!r} (known: {known}): create it first"
            )
        for name, sha256 in desired.convertors.items():
            convertor, _ = await code.load(self._store, self._keys, sha256, self._settings.signer)
            register_url_convertor(name, convertor())
        return backend

    async def _construct(self, worker: Worker, backend: Backend) -> Handler:
        raw = await self._store.get(self._keys.code(backend.code))

        def construct() -> Handler:
            if raw is None:
                raise BadValue(f"the code of {backend.name} is not in the store: deploy it again")
            target, args = code.unpack(raw, backend.code, self._settings.signer)
            return make_handler(target, args)

        try:
            async with asyncio.timeout(backend.config.start_timeout_s):
                return await worker.call(construct)
        except TimeoutError:
            raise BackendFailed(
                f"backend {backend.name!r} ({backend.code_name}) was not constructed within its start_timeout_s of "
                f"{backend.config.start_timeout_s:g} s: raise it, or do less in the constructor"
            ) from None
        except Exception as error:
            raise BackendFailed(_construction_failed(backend, error)) from error

    async def _follow(self, server: Server, stop: Stop) -> None:
        """Takes new configuration and new generations of the queue as they come; ends when the replica is not wanted any more."""
        async for raw_desired, raw_observed in follow(self._store, self._keys.desired, self._keys.observed):
            desired, observed = Desired.from_bytes(raw_desired), Observed.from_bytes(raw_observed)
            name = self._options.backend
            if observed.epoch and not self._is_wanted(observed):
                logger.info("%s is not wanted any more", self._options.replica_id)
                stop.set()
                return
            if name in desired.backends:
                server.config = desired.backends[name].config
            if generations := observed.queues.get(name, ()):
                try:
                    await server.take_from(generations)
                except MQServeError as error:
                    logger.warning("%s cannot take from its queue yet: %s", self._options.replica_id, error)
                else:
                    self._say("ready")

    def _is_wanted(self, observed: Observed) -> bool:
        if self._options.external:
            return self._options.backend in observed.queues
        return self._options.replica_id in observed.replicas

    def _on_done(self, job: Job, result: Result) -> None:
        assert self._server is not None
        self._server.on_done(job, result)

    def _say(self, state: str) -> None:
        self._state = state
        self._presence.tell()

    def _beat(self) -> Beat:
        options, server = self._options, self._server
        return Beat(
            kind="replica", id=options.replica_id, at=self._store.now_ms(), pid=os.getpid(), host=socket.gethostname(), state=self._state,
            error=self._error, node=options.node, external=options.external, backend=options.backend,
            version=self._backend.version if self._backend else 0, generations=server.generations if server else (),
            running=server.running if server else 0, served=server.served if server else 0,
        )  # fmt: skip


def _construction_failed(backend: Backend, error: Exception) -> str:
    told = "".join(traceback.format_exception(error)).strip()
    return f"backend {backend.name!r} ({backend.code_name}) cannot be constructed: {type(error).__name__}: {error}\n{told}"
