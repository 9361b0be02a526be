"""Has start marks of suspects stored before they run: requests that were delivered before, and may have killed their replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ..broker.errors import words_of
from ..broker.process.rate_limited_log import RateLimitedLog
from .stages import Job

logger = logging.getLogger(__name__)

_MARK_BUDGET_S = 5.0

BeforeSuspects = Callable[[Sequence[Job]], Coroutine[Any, Any, None]]


class Marking:
    """Awaits `before_suspects(jobs)` on the I/O loop, for the worker's thread, before each call of suspects and before the plain call that
    follows one: that one might kill the replica while the suspects' results are on their way to the store.

    The calls run even if the marks cannot be stored in time.
    """

    def __init__(self, replica_tag: str, before_suspects: BeforeSuspects) -> None:
        self._replica_tag = replica_tag
        self._before_suspects = before_suspects
        self._io = asyncio.get_running_loop()
        self._follows_suspect = False
        self._unmarked = RateLimitedLog(logger)

    def __repr__(self) -> str:
        return f"<Marking of {self._replica_tag}{', after a suspect' if self._follows_suspect else ''}>"

    def before_plain(self, jobs: Sequence[Job]) -> None:
        """Blocks until the jobs of a plain call may run."""
        is_suspect = jobs[0].suspect or (len(jobs) > 1 and any(job.suspect for job in jobs))
        if is_suspect or self._follows_suspect:
            try:
                asyncio.run_coroutine_threadsafe(self._before_suspects(jobs), self._io).result(_MARK_BUDGET_S)
            except Exception as error:
                self._tell(error)
        self._follows_suspect = is_suspect

    async def before_async(self, jobs: Sequence[Job]) -> None:
        """Returns when the jobs of an async call of suspects may run."""
        try:
            async with asyncio.timeout(_MARK_BUDGET_S):
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._before_suspects(jobs), self._io))
        except Exception as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        why = f"the store did not take it within {_MARK_BUDGET_S:g} s" if isinstance(error, TimeoutError) else words_of(error)
        self._unmarked.say(
            f"{self._replica_tag} runs redelivered requests without a start mark, so its death in one would not count as an attempt of "
            f"that request: {why}"
        )
