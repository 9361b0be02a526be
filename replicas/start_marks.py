"""Which runs of a replica have a start mark in the store: those that take long, and those of requests that may have killed a replica."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..broker.errors import StoreUnavailable
from .admission import Admission
from .register import Register
from .settlement import Settlement
from .stages import Job, Stage

_LONG_RUN_S = 0.04


class StartMarks:
    """Marks the runs of one replica. A start mark makes a timeout say `run`, and a replica's death count as an attempt of the request."""

    def __init__(self, admission: Admission, settlement: Settlement, register: Register) -> None:
        self._admission = admission
        self._settlement = settlement
        self._register = register

    def __repr__(self) -> str:
        return f"<StartMarks of {self._admission!r}>"

    def mark_long_runs(self) -> None:
        now = time.monotonic()
        for job in self._register.at(Stage.RUNNING):
            if not job.mark and now - job.started > _LONG_RUN_S:
                job.mark = self._admission.new_mark()
                self._admission.mark_soon(job.envelope, job.mark)

    async def before_suspects(self, jobs: Sequence[Job]) -> None:
        """Stores the start marks of the suspects among the jobs before they run, so that a run that kills its replica at once counts. Waits
        first for the results of earlier suspects, which would count as attempts of them otherwise."""
        await self._settlement.marked_recorded()
        for job in jobs:
            if job.suspect and not job.mark:
                job.mark = self._admission.new_mark()
                try:
                    await self._admission.mark(job.envelope, job.mark)
                except StoreUnavailable:
                    self._admission.mark_soon(job.envelope, job.mark)  # the run starts without it, and may be long
                    raise
