"""Removes large results of jobs that have expired. The leader does it, in a task beside its comparisons; several may do it at once."""

from __future__ import annotations

import asyncio
import logging

from ..broker.backoff import keep_running
from ..broker.process.rate_limited_log import RateLimitedLog
from ..broker.result_files import ResultFiles
from ..broker.store import Store

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0
_PROBLEM = "the result store"


class Sweeps:
    """The sweeps of one controller."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._task: asyncio.Task[None] | None = None
        self._unswept = RateLimitedLog(logger)
        self.problems: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Sweeps of {self._files!r}{', stopped' if self._task is None else ''}>"

    @property
    def _files(self) -> ResultFiles:
        return self._store.files

    def go_on(self) -> None:
        """Sweeps from now on."""
        if self._task is None and self._files:
            self._task = asyncio.create_task(keep_running("the removal of expired results", self._sweep_forever), name="sweep results")

    async def stop(self) -> None:
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])
        self.problems = {}

    async def _sweep_forever(self) -> None:
        while True:
            try:
                count = await self._files.sweep(self._store.now_ms())
            except OSError as error:
                why = error.strerror or "it does not answer"
                self.problems = {_PROBLEM: f"its folder cannot be read and tidied here ({why}): see MQSERVE_RESULT_STORE"}
                self._unswept.say(f"expired results stay in {self._files!r}: {error}")
            else:
                self.problems = {}
                self._unswept.over()
                if count:
                    logger.info("%d results that had expired were removed from the result store", count)
            await asyncio.sleep(SWEEP_EVERY_S)
