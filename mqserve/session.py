"""Opening a client: the runtime thread, the links on it, the instance if it is ours to run, and the client on top."""

from __future__ import annotations

import asyncio
import atexit
from contextlib import AsyncExitStack, suppress

from .broker.settings import Settings
from .client import Client
from .controller import lease
from .instance import StartOptions, running_instance, shut_down
from .links import open_links
from .runtime import Runtime


def open_client(settings: Settings, options: StartOptions | None) -> Client:
    """Starts an instance by `options`, or joins the one that runs. Its `shutdown` undoes all of this, as does the end of the program
    for an instance that is not detached."""
    runtime = Runtime()
    runtime.start()
    session = _Session(runtime, settings, options)
    try:
        client = runtime.call(session.enter())
    except BaseException:
        runtime.stop()
        raise
    if options is not None and not options.detached:
        atexit.register(client.shutdown)
    return client


class _Session:
    """What lives on the runtime between a client's opening and its shutdown."""

    def __init__(self, runtime: Runtime, settings: Settings, options: StartOptions | None) -> None:
        self._runtime = runtime
        self._settings = settings
        self._options = options
        self._stack = AsyncExitStack()

    async def enter(self) -> Client:
        try:
            links = await self._stack.enter_async_context(open_links(self._settings, "client"))
            if self._options is None:
                instance = (await lease.read_instance(links.store, links.keys)).id
            else:
                instance = await self._stack.enter_async_context(running_instance(links, self._options))
            if self._options is None or self._options.detached:
                self._stack.push_async_callback(shut_down, links, instance)
            client = Client(self._runtime, links, instance, self._end)
            reading = asyncio.create_task(client.run(), name="read results")
            self._stack.push_async_callback(_cancel, reading)
            return client
        except BaseException:
            await self._stack.aclose()
            raise

    def _end(self) -> None:
        try:
            self._runtime.call(self._stack.aclose())
        finally:
            self._runtime.stop()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(task, return_exceptions=True)
