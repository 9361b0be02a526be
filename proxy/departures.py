"""Clients that go away before their answer: noticed without a task for each request, since most are answered before it matters."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..broker.failures import LEAVING, message_of
from ..broker.process.printable import printable

logger = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

WATCHED_AFTER_S = 0.1
_LOOK_EVERY_S = 0.05


class Departures:
    """The open requests of a proxy; `on_departure(request_id)` is called for one whose client has gone."""

    def __init__(self, on_departure: Callable[[str], None]) -> None:
        self._on_departure = on_departure
        self._young: dict[str, tuple[Receive, float]] = {}  # in order of arrival
        self._watching: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<Departures, {len(self._young)} young, {len(self._watching)} watched>"

    def expect(self, request_id: str, receive: Receive) -> None:
        self._young[request_id] = (receive, time.monotonic())

    def forget(self, request_id: str) -> None:
        if self._young.pop(request_id, None) is None and (watching := self._watching.pop(request_id, None)) is not None:
            watching.cancel()

    async def watch_forever(self) -> None:
        """Until cancelled; owns the tasks that wait for a client's end, each for a request that has waited a while already."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(_LOOK_EVERY_S)
                grown_up = time.monotonic() - WATCHED_AFTER_S
                for request_id, (receive, since) in list(self._young.items()):
                    if since > grown_up:
                        break
                    del self._young[request_id]
                    self._watching[request_id] = tasks.create_task(self._watch(request_id, receive))

    async def _watch(self, request_id: str, receive: Receive) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                await asyncio.sleep(_LOOK_EVERY_S)  # a middleware may hand out the body again and again
        except (Exception, *LEAVING) as error:  # a middleware's own: the request goes on unwatched
            logger.warning("cannot tell whether the client of request %s goes away: %s", request_id, printable(message_of(error)))
            return
        self._watching.pop(request_id, None)
        self._on_departure(request_id)
