"""The time of the Redis server, as this process knows it."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress

from .client import FAILURES, Client, heeding_cancellation

CLOCK_EVERY_S = 30.0
_TRIES = 3  # at the beginning, for a sample that is as good as _GOOD_S
_GOOD_S = 0.05
_DRIFT = 0.001  # what two clocks may differ in a second; they differ by less


class StoreClock:
    """Keeps the offset of the server's clock to the monotonic one of this process. It goes on while the server is away."""

    def __init__(self, client: Client, budget_s: float) -> None:
        self._client = client
        self._budget_s = budget_s
        self._offset_ms = 0.0
        self._error_s = math.inf  # of the offset at most, when it was measured
        self._measured_at = 0.0  # monotonic

    def __repr__(self) -> str:
        return f"<StoreClock {self._offset_ms:.0f} ms ahead of the monotonic one, give or take {self._error_s * 1000:.1f}>"

    def now_ms(self) -> int:
        return int(time.monotonic() * 1000 + self._offset_ms)

    async def set(self) -> None:
        """Measures until one sample is good, a few times at most. Raises what redis-py raises."""
        for _ in range(_TRIES):
            if self._error_s > _GOOD_S:
                await self._measure()

    async def keep(self) -> None:
        """Measures now and then, since clocks drift. Runs until cancelled."""
        while True:
            await asyncio.sleep(CLOCK_EVERY_S)
            with suppress(*FAILURES):
                async with asyncio.timeout(self._budget_s):
                    await self._measure()

    async def _measure(self) -> None:
        """A sample is off by at most half of its round trip: one that says less than what we have already is not taken."""
        before = time.monotonic()
        seconds, microseconds = await heeding_cancellation(self._client.time)
        after = time.monotonic()
        error_s = (after - before) / 2
        if error_s <= self._error_s + (after - self._measured_at) * _DRIFT:
            self._offset_ms = (seconds + microseconds / 1e6 - (before + after) / 2) * 1000
            self._error_s, self._measured_at = error_s, after
