"""Notices clients that disconnect before their answer. A request gets a task for that only once it has waited a while, since most
requests are answered before."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..broker.failures import LEAVING, describe
from ..broker.process.printable import printable
from ..broker.process.rate_limited_log import RateLimitedLog

logger = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

WATCHED_AFTER_S = 0.1
_LOOK_EVERY_S = 0.05


class Departures:
    """The open requests of a proxy. Calls `on_departure(request_id)` when the client of a request has disconnected."""

    def __init__(self, on_departure: Callable[[str], None]) -> None:
        self._on_departure = on_departure
        # requests without a watching task yet: id -> (receive, time of arrival), oldest first
        self._unwatched: dict[str, tuple[Receive, float]] = {}
        self._some = asyncio.Event()  # set while some are unwatched
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._unseen = RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<Departures, {len(self._unwatched)} unwatched, {len(self._watching)} watched>"

    def expect(self, request_id: str, receive: Receive) -> None:
        self._unwatched[request_id] = (receive, time.monotonic())
        self._some.set()

    def forget(self, request_id: str) -> None:
        if self._unwatched.pop(request_id, None) is None and (watching := self._watching.pop(request_id, None)) is not None:
            watching.cancel()

    async def watch_forever(self) -> None:
        """Runs until cancelled. It starts and owns the tasks that wait for a disconnect, one for each request that has waited for
        WATCHED_AFTER_S."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                if not self._unwatched:
                    self._some.clear()
                    await self._some.wait()
                await asyncio.sleep(_LOOK_EVERY_S)
                due = time.monotonic() - WATCHED_AFTER_S
                for request_id, (receive, since) in list(self._unwatched.items()):
                    if since > due:
                        break
                    del self._unwatched[request_id]
                    self._watching[request_id] = tasks.create_task(self._watch(request_id, receive))

    async def _watch(self, request_id: str, receive: Receive) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                await asyncio.sleep(_LOOK_EVERY_S)  # a middleware may return the body again and again
        except (Exception, *LEAVING) as error:  # an error of a middleware: the request goes on unwatched
            self._unseen.say(
                f"a middleware's receive() raised {printable(describe(error).words)}, so a client that goes away is not noticed and its "
                "request runs to its end: mend the middleware"
            )
            return
        self._watching.pop(request_id, None)
        self._on_departure(request_id)
