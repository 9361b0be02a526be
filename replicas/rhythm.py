"""The rhythm of a loop that times requests: quick turns while there are any, and slow ones while a replica is idle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from ..broker.process.ticks import next_tick_s

QUICK_S = 0.05
SLOW_S = 1.0
_RESTS_AFTER_TURNS = 20  # a second of quick turns, so that steady traffic of a few requests a second wakes nobody


class Rhythm:
    """`next()` returns after QUICK_S; when `is_idle()` has been true for a second, after SLOW_S, or at once after `wake()`. Whatever gives
    the loop something to time calls `wake()` if `rests`."""

    __slots__ = ("_idle_turns", "_is_idle", "_woken", "rests")

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._idle_turns = 0
        self._woken = asyncio.Event()
        self.rests = False

    def __repr__(self) -> str:
        return f"<Rhythm, {'slow' if self.rests else 'quick'}>"

    def wake(self) -> None:
        self._woken.set()

    async def next(self) -> None:
        self._idle_turns = self._idle_turns + 1 if self._is_idle() else 0
        if self._idle_turns <= _RESTS_AFTER_TURNS:
            return await asyncio.sleep(QUICK_S)
        self._woken.clear()
        self.rests = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(next_tick_s(SLOW_S)):
                    await self._woken.wait()
                    self._idle_turns = 0
        finally:
            self.rests = False
