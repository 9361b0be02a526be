"""Clients that wait for something to be there: each for its own time, all of them until this proxy ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from .departures import Departures, Receive

T = TypeVar("T")


class Polls:
    """The waits of a proxy. A wait ends early when its client goes away, and when the proxy ends: then its client asks another one."""

    def __init__(self, departures: Departures) -> None:
        self._departures = departures
        self._waits: dict[str, asyncio.Task[Any]] = {}  # by an id of the HTTP request that waits, which is not that of what it waits for
        self.are_ending = False

    def __repr__(self) -> str:
        return f"<Polls, {len(self)} wait>"

    def __len__(self) -> int:
        return len(self._waits)

    async def until(self, call_id: str, receive: Receive, wanted: Coroutine[Any, Any, T]) -> T | None:
        """Returns what was waited for; None if its time is up (TimeoutError) or the wait ends early. Raises what it raises."""
        task = asyncio.ensure_future(wanted)
        if self.are_ending:
            task.cancel()
        self._waits[call_id] = task
        self._departures.expect(call_id, receive)
        try:
            return await task
        except TimeoutError:
            return None
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            return None
        finally:
            self._departures.forget(call_id)
            del self._waits[call_id]

    def leave(self, call_id: str) -> bool:
        """The client has gone. Returns False if it was none of these."""
        if (task := self._waits.get(call_id)) is None:
            return False
        task.cancel()
        return True

    def end(self) -> None:
        """Ends all waits, and those that come."""
        self.are_ending = True
        for task in self._waits.values():
            task.cancel()
