"""The jobs whose ends this process waits for: whoever records an end tells the inboxes that are registered with the job, so nothing is
asked for again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress

from ..backoff import delays
from ..errors import BadEnvelope, MQServeError, ResultGone, StoreUnavailable
from ..jobs import WAIT_TTL_S, JobRecord
from ..process.tasks import Tasks
from ..store import Store

logger = logging.getLogger(__name__)

_RENEW_EVERY_S = WAIT_TTL_S / 2
_AT_ONCE = 500  # registrations

Register = Callable[[str], Awaitable[None]]


class Registrations:
    """Renews what is registered with jobs, all by one task, which runs while there are any."""

    def __init__(self, tasks: Tasks, register: Register, registered: Callable[[], Sequence[str]]) -> None:
        self._tasks = tasks
        self._register = register
        self._registered = registered
        self._is_renewing = False
        self._now = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Registrations, {len(self._registered())} of them>"

    def begin(self) -> None:
        """Called when there is one."""
        if not self._is_renewing:
            self._is_renewing = True
            self._now.clear()
            self._tasks.start(self._renew())

    def renew_now(self) -> None:
        """The store may have lost them, or what was told since."""
        self._now.set()

    async def _renew(self) -> None:
        try:
            while self._registered():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RENEW_EVERY_S):
                        await self._now.wait()
                self._now.clear()
                ids = self._registered()
                for start in range(0, len(ids), _AT_ONCE):
                    await self._renew_some(ids[start : start + _AT_ONCE])
        finally:
            self._is_renewing = False

    async def _renew_some(self, ids: Sequence[str]) -> None:
        """A failed renewal is repeated for as long as somebody waits."""
        for pause_s in delays():
            outcomes = await asyncio.gather(*map(self._register, ids), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not isinstance(outcome, StoreUnavailable | BadEnvelope):
                    raise outcome
            still = frozenset(self._registered())
            pairs = zip(ids, outcomes, strict=True)
            ids = [future_id for future_id, outcome in pairs if isinstance(outcome, StoreUnavailable) and future_id in still]
            if not ids:
                return
            logger.warning("the ends of %d jobs that are waited for may be heard late: the store is away, and is asked again", len(ids))
            await asyncio.sleep(pause_s)


class JobWaits:
    """The jobs whose results are awaited here. `read_soon` has results read by their keys, `fail` ends a wait."""

    def __init__(
        self,
        store: Store,
        inbox: str,
        tasks: Tasks,
        read_soon: Callable[[Sequence[str]], None],
        fail: Callable[[str, MQServeError], None],
    ) -> None:
        self._store = store
        self._inbox = inbox
        self._read_soon = read_soon
        self._fail = fail
        self._ids: dict[str, None] = {}
        self._registrations = Registrations(tasks, self._register, lambda: list(self._ids))

    def __repr__(self) -> str:
        return f"<JobWaits, {len(self._ids)} awaited>"

    def __contains__(self, future_id: str) -> bool:
        return future_id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    async def register(self, future_id: str) -> None:
        """Has its end told from now on, until `drop`; one that has ended is read. Raises StoreUnavailable, and BadEnvelope for what is no
        record."""
        self._ids[future_id] = None
        self._registrations.begin()
        await self._register(future_id)

    def drop(self, future_id: str) -> None:
        """Nobody waits for it here any more."""
        self._ids.pop(future_id, None)

    def register_again(self) -> None:
        self._registrations.renew_now()

    async def _register(self, future_id: str) -> None:
        record = await self._store.jobs.wait(future_id, self._inbox)
        if future_id in self._ids and record is not None:
            self._look(future_id, record)

    def _look(self, future_id: str, record: JobRecord) -> None:
        if record.has_result:
            self._read_soon([future_id])
        elif record.state.is_final:
            self._fail(future_id, ResultGone(f"job {future_id} has {record.state}, and its result is not kept any more"))
