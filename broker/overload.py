"""What one process may hold of requests that the broker has not taken yet, and when the refused had better try again."""

from __future__ import annotations

import random
import time

from .errors import Overloaded
from .latencies import moving_average

MAX_HELD_BYTES = 128 * 1024 * 1024
MIN_RETRY_S = 1.0


class HeldBytes:
    """Bodies that are being read, or wait for the broker: bounded together, whoever brought them."""

    def __init__(self, limit: int = MAX_HELD_BYTES) -> None:
        self._limit = limit
        self.held = 0

    def __repr__(self) -> str:
        return f"<HeldBytes {self.held} of {self._limit}>"

    def take(self, size: int) -> None:
        """Raises Overloaded beyond the limit; a single body always fits."""
        if self.held and self.held + size > self._limit:
            raise Overloaded(
                f"{self.held} bytes of requests are on their way here, and {self._limit} is what this process holds: try again later, "
                "or run more proxies",
                retry_after_s=MIN_RETRY_S * (1 + random.random()),
            )
        self.held += size

    def take_back(self, size: int) -> None:
        """What was taken once is not refused."""
        self.held += size

    def give(self, size: int) -> None:
        self.held -= size


class Pace:
    """How quickly one backend answers this process's requests."""

    __slots__ = ("_latency_s", "_progress_at", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self._latency_s = 0.0  # a moving average
        self._progress_at = 0.0  # of the last answer, or of the first request since nothing waited

    def sent(self, now: float) -> None:
        if not self.waiting:
            self._progress_at = now
        self.waiting += 1

    def ended(self, sent_at: float, now: float, *, answered: bool) -> None:
        self.waiting -= 1
        if answered:
            self._progress_at = now
            latency_s = now - sent_at
            self._latency_s = moving_average(self._latency_s, latency_s)

    def retry_after_s(self, at_most_s: float) -> float:
        """What a request needs to pass through a queue as full as this one (Little's law), or, where nothing moves, as long again as
        nothing has moved; a quarter more or less, so that those refused together do not come back together."""
        stalled_s = time.monotonic() - self._progress_at if self.waiting else 0.0
        return max(MIN_RETRY_S, min(at_most_s, max(self._latency_s, stalled_s)) * random.uniform(0.75, 1.25))
