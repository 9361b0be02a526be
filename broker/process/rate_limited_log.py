"""Rate-limited log lines: a failure that repeats is logged at once, and then once in a while, with the number of times in between."""

from __future__ import annotations

import logging
import math
import time

AGAIN_AFTER_S = 60.0


class RateLimitedLog:
    """The log lines about one operation that fails again and again, with the same words each time: no ids in them. Call `over` after a
    success: the next failure is then logged at once."""

    def __init__(self, logger: logging.Logger, level: int = logging.WARNING) -> None:
        self._logger = logger
        self._level = level
        self._last, self._said_at = "", -math.inf
        self._unsaid = 0

    def __repr__(self) -> str:
        return f"<RateLimitedLog {self._last!r}>"

    def say(self, words: str) -> None:
        """Logs `words`, unless the same words were logged within the last AGAIN_AFTER_S."""
        if words == self._last and time.monotonic() - self._said_at < AGAIN_AFTER_S:
            self._unsaid += 1
            return
        times = f" ({self._unsaid} times more in the last minute)" if self._unsaid and words == self._last else ""
        self._logger.log(self._level, "%s%s", words, times)
        self._last, self._said_at, self._unsaid = words, time.monotonic(), 0

    def over(self) -> None:
        self._last, self._unsaid = "", 0
