"""Limits for what one process holds of requests that the broker has not taken yet, and the retry advice for refused callers."""

from __future__ import annotations

import random
import time

from .errors import Overloaded
from .latencies import moving_average

MAX_HELD_BYTES = 128 * 1024 * 1024
MIN_RETRY_S = 1.0


class HeldBytes:
    """Counts the bytes of all bodies that are being read or wait for the broker, against one limit for the process."""

    def __init__(self, limit: int = MAX_HELD_BYTES) -> None:
        self._limit = limit
        self.held = 0

    def __repr__(self) -> str:
        return f"<HeldBytes {self.held} of {self._limit}>"

    def take(self, size: int) -> None:
        """Counts `size` bytes. Raises Overloaded over the limit, except for a body that is alone."""
        if self.held and self.held + size > self._limit:
            raise Overloaded(
                f"this process holds {self.held} bytes of requests already, and its limit is {self._limit}: try again later, "
                "or run more proxies",
                retry_after_s=MIN_RETRY_S * (1 + random.random()),
            )
        self.held += size

    def take_back(self, size: int) -> None:
        """Counts `size` bytes of a redelivered body, which was admitted before and is never refused."""
        self.held += size

    def give(self, size: int) -> None:
        self.held -= size


class Pace:
    """Measures how quickly one backend answers this process's requests."""

    __slots__ = ("_latency_s", "_progress_at", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self._latency_s = 0.0  # a moving average
        self._progress_at = 0.0  # time of the last answer, or of the first request after the queue was empty

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
        """The time a request needs to pass through a queue as full as this one (Little's law); if nothing moves, as long again as nothing
        has moved. It varies by a quarter, so that callers refused together do not return together."""
        stalled_s = time.monotonic() - self._progress_at if self.waiting else 0.0
        return max(MIN_RETRY_S, min(at_most_s, max(self._latency_s, stalled_s)) * random.uniform(0.75, 1.25))
