"""When a dead replica may be replaced: at once if it had been ready, else after growing pauses."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

ENDED_WELL = "ended by itself"  # a replica that drained because somebody sent it SIGTERM: no failure of its code
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
READY_AFTER_S = 5.0
AT_ONCE_LIMIT = 20  # immediate replacements within AT_ONCE_WINDOW_S; beyond that a ready one waits, too
AT_ONCE_WINDOW_S = 30.0


@dataclass
class Restarts:
    """The record of one version's deaths; times are monotonic seconds."""

    longest_pause_s: float = LONGEST_PAUSE_S
    early_deaths: int = 0
    not_before: float = 0.0
    reason: str = ""  # why it does not get ready or well: whoever waits for a change of it fails with that
    deaths: str = ""  # set when too many ready replicas died: perhaps of requests, so whoever waits for a change goes on waiting
    _at_once: deque[float] = field(default_factory=deque)

    def died_early(self, now: float, reason: str) -> None:
        self.not_before = now + min(self.longest_pause_s, FIRST_PAUSE_S * 2 ** min(self.early_deaths, 10))
        self.early_deaths += 1
        self.reason = reason

    def died(self, now: float, reason: str, *, lived_s: float) -> None:
        """Notes the death of a process that does not report when it is ready: one that lived for READY_AFTER_S counts as ready."""
        if lived_s > READY_AFTER_S:
            self.got_ready()
            self.died_ready(now)
        else:
            self.died_early(now, reason)

    def died_ready(self, now: float) -> None:
        while self._at_once and self._at_once[0] < now - AT_ONCE_WINDOW_S:
            self._at_once.popleft()
        self._at_once.append(now)
        if len(self._at_once) > AT_ONCE_LIMIT:
            self.not_before = now + FIRST_PAUSE_S
            died = f"{len(self._at_once)} ready replicas died within {AT_ONCE_WINDOW_S:g} s"
            self.deaths = f"{died}, so replacements wait: see their logs, and the dead letters for what killed them"

    def got_ready(self) -> None:
        self.early_deaths = 0
        self.reason = self.deaths = ""
