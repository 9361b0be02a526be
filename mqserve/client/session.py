"""Opens a client: the runtime thread, the connections on it, the instance if this process runs it, and the client itself."""

from __future__ import annotations

import asyncio
import atexit
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial

from ..broker.errors import InstanceEnded, InstanceError
from ..broker.process import forks
from ..broker.settings import Settings
from ..connections import Connections, open_connections
from ..controller import lease
from ..instance.starting import StartOptions, running_instance, shut_down
from ..replicas.context import in_replica_process
from .client import Client
from .membership import Membership
from .runtime import Runtime

logger = logging.getLogger(__name__)


def open_client(settings: Settings, options: StartOptions | None, on_end: Callable[[Client], None] = lambda client: None) -> Client:
    """Starts an instance by `options`, or joins the running one. The client's end undoes all of this, as does the end of the program for
    an instance that is not detached. `on_end` is called when that begins."""
    runtime = Runtime()
    runtime.start()
    session = Session(runtime, settings, options)
    try:
        client = runtime.call(session.enter())
    except BaseException:
        runtime.stop()
        raise
    client.on_end = lambda: on_end(client)
    if session.owns:
        atexit.register(session.at_exit)
    return client


def _open_in_child(settings: Settings) -> Client:
    """Opens in a forked child what the client has in the parent. Raises InstanceError in the embedded form."""
    if settings.embedded:
        raise InstanceError(forks.NOT_HERE)
    return open_client(settings, None)


class Session:
    """The objects that live on the runtime thread from a client's opening to its end."""

    def __init__(self, runtime: Runtime, settings: Settings, options: StartOptions | None) -> None:
        self._runtime = runtime
        self._settings = settings
        self._options = options
        self._stack = AsyncExitStack()
        self._connections: Connections | None = None
        self._membership: Membership | None = None
        self._client: Client | None = None
        self._reading: asyncio.Task[None] | None = None
        self._why = ""  # why it ends

    @property
    def owns(self) -> bool:
        """Whether the instance ends with this process."""
        return self._options is not None and not self._options.detached

    async def enter(self) -> Client:
        try:
            connections = await self._stack.enter_async_context(
                open_connections(self._settings, "replica" if in_replica_process() else "client")
            )
            self._stack.push_async_callback(self._stop_serving)  # runs after the instance has drained, so that its last answers are read
            if self._options is None:
                instance = (await lease.read_instance(connections.store, connections.keys)).id
            else:
                instance = await self._stack.enter_async_context(running_instance(connections, self._options))
            self._membership = Membership(connections, instance, owns=self.owns)
            again = partial(_open_in_child, self._settings)
            client = self._client = Client(self._runtime, connections, self._membership, self, again)
            self._connections = connections
            self._reading = asyncio.create_task(client.run(), name="read results")
            self._reading.add_done_callback(_tell_failure)
            return client
        except BaseException:
            await self._stack.aclose()
            raise

    def at_exit(self) -> None:
        """Runs at the end of the program. It checks for a fork, since a forked child inherits its parent's atexit entries."""
        if self._client is not None and not self._client.is_inherited:
            self._client.shutdown()

    def end(self, why: str, *, shuts_down: bool) -> None:
        """Leaves the instance, or shuts it down first. Pending waits fail with `why`."""
        atexit.unregister(self.at_exit)
        self._why = why
        try:
            self._runtime.call(self._leave(shuts_down and not self.owns))
        finally:
            self._runtime.stop()

    async def _leave(self, shuts_down: bool) -> None:
        """Closes the stack, and so ends the parts of the instance that this process runs."""
        try:
            if shuts_down and self._connections is not None and self._membership is not None:
                with suppress(InstanceEnded):
                    await shut_down(self._connections, (await self._membership.read()).instance)
        finally:
            await self._stack.aclose()

    async def _stop_serving(self) -> None:
        self._runtime.is_over(self._why)
        if self._client is not None:
            await self._client.stop_sending(self._why)
        if self._reading is not None:  # first, since ending the requests' waits would cancel the requests
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        await self._runtime.end_submitted()


def _tell_failure(reading: asyncio.Task[None]) -> None:
    if not reading.cancelled() and (error := reading.exception()) is not None:
        logger.error("the client reads no results any more: that is a bug in mqserve, please report it", exc_info=error)
