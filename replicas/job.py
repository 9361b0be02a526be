"""One request in a replica, from its delivery to its settlement."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..broker.envelope import Envelope
from ..broker.results import Result, late_result


@dataclass(slots=True, eq=False)
class Job:
    """What the worker runs; `tag` is the owner's and not touched by it."""

    envelope: Envelope
    tag: Any
    deadline: float = math.inf  # monotonic
    redelivered: bool = False  # delivered before: the owner is told when it starts, and leaves a mark
    mark: bytes = b""  # the owner's: the start mark that stands in the store, or may
    started: float = 0.0  # monotonic; 0 until it runs
    run_s: float = 0.0
    batch: Sequence[Job] = ()  # all of its call, where that is of several
    given_up: Result | None = None  # what stands in its result's place: it was cancelled, or its time is spent
    task: asyncio.Task[None] | None = None  # of an async call
    request: object = None  # what the handler was given

    @property
    def unwanted(self) -> bool:
        return self.given_up is not None or time.monotonic() >= self.deadline

    @property
    def unwanted_result(self) -> Result:
        """What its sender is told instead of a result."""
        return self.given_up or late_result("run" if self.started else "queue")
