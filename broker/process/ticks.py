"""Ticks: what a process does again and again falls on the same moments, so that an idle process wakes once a second and not once for each
of its timers."""

from __future__ import annotations

import random
import time

_PHASE_MS = random.randrange(10_000)  # of this process, so that those of a machine do not all wake at the same moment


def next_tick_s(period_s: float) -> float:
    """Returns the time until this process's next multiple of `period_s`, or until the one after it where less than a tenth of the period
    is left: what waits from tick to tick begins at a tick, or a little before, since libuv counts from the time at which its turn began.
    It is a whole number of milliseconds, as libuv's timers are: two that are due at one tick are due in the same turn of the loop."""
    period_ms = round(period_s * 1000)
    left_ms = period_ms - (int(time.monotonic() * 1000) + _PHASE_MS) % period_ms
    return (left_ms if left_ms * 10 >= period_ms else left_ms + period_ms) / 1000
