"""Opening a client: the runtime thread, the links on it, the instance if it is ours to run, and the client on top."""

from __future__ import annotations

import asyncio
import atexit
import logging
from contextlib import AsyncExitStack
from functools import partial

from .broker import forks
from .broker.errors import InstanceError
from .broker.settings import Settings
from .client import Client
from .controller import lease
from .instance import StartOptions, running_instance, shut_down
from .links import open_links
from .replicas.context import in_replica_process
from .runtime import Runtime

logger = logging.getLogger(__name__)


def open_client(settings: Settings, options: StartOptions | None, *, ends_instance: bool = True) -> Client:
    """Starts an instance by `options`, or joins the one that runs. Its `shutdown` undoes all of this, as does the end of the program
    for an instance that is not detached."""
    runtime = Runtime()
    runtime.start()
    session = _Session(runtime, settings, options, ends_instance=ends_instance)
    try:
        client = runtime.call(session.enter())
    except BaseException:
        runtime.stop()
        raise
    if options is not None and not options.detached:
        atexit.register(_shut_down, client)
    return client


def _shut_down(client: Client) -> None:
    if not client._is_inherited:  # a forked child has its parent's atexit entries
        client.shutdown()


def _open_in_child(settings: Settings) -> Client:
    """What a client that was open in the parent has in a forked child. Raises InstanceError in the embedded form."""
    if settings.embedded:
        raise InstanceError(forks.NOT_HERE)
    return open_client(settings, None, ends_instance=False)


class _Session:
    """What lives on the runtime between a client's opening and its shutdown."""

    def __init__(self, runtime: Runtime, settings: Settings, options: StartOptions | None, *, ends_instance: bool) -> None:
        self._runtime = runtime
        self._settings = settings
        self._options = options
        self._ends_instance = ends_instance
        self._stack = AsyncExitStack()
        self._reading: asyncio.Task[None] | None = None

    async def enter(self) -> Client:
        try:
            links = await self._stack.enter_async_context(open_links(self._settings, "replica" if in_replica_process() else "client"))
            self._stack.push_async_callback(self._stop_reading)  # after the instance has drained: its last answers are read
            if self._options is None:
                instance = (await lease.read_instance(links.store, links.keys)).id
            else:
                instance = await self._stack.enter_async_context(running_instance(links, self._options))
            if self._ends_instance and (self._options is None or self._options.detached):
                self._stack.push_async_callback(shut_down, links, instance)
            client = Client(self._runtime, links, instance, self._end, partial(_open_in_child, self._settings))
            self._reading = asyncio.create_task(client.run(), name="read results")
            self._reading.add_done_callback(_tell_failure)
            return client
        except BaseException:
            await self._stack.aclose()
            raise

    async def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def _end(self) -> None:
        try:
            self._runtime.call(self._stack.aclose())
        finally:
            self._runtime.stop()


def _tell_failure(reading: asyncio.Task[None]) -> None:
    if not reading.cancelled() and (error := reading.exception()) is not None:
        logger.error("the client reads no results any more: that is a bug in mqserve, please report it", exc_info=error)
