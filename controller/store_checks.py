"""What the leader asks the store about itself: whether it keeps what it took, and whether it has room for more."""

from __future__ import annotations

import logging
import math
import time

from ..broker.store import Store

logger = logging.getLogger(__name__)

SETTINGS_EVERY_S = 60.0
MEMORY_EVERY_S = 5.0


class StoreChecks:
    """The latest answers; empty texts if all is well."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._settings_at = self._memory_at = -math.inf  # monotonic
        self._misconfiguration = ""
        self.is_full = ""  # why no new jobs are taken, in words fit for strangers

    def __repr__(self) -> str:
        return f"<StoreChecks {self.problems or 'all well'}>"

    @property
    def problems(self) -> dict[str, str]:
        found = {}
        if self._misconfiguration:
            found["the store"] = self._misconfiguration
        if self.is_full:
            found["the store's memory"] = f"{self.is_full}: raise Redis's maxmemory, or keep results for a shorter time"
        return found

    async def ask(self) -> None:
        """Asks what is due to be asked again."""
        now = time.monotonic()
        if now - self._memory_at >= MEMORY_EVERY_S:
            self._memory_at = now
            self.is_full = await self._store.fullness(was_full=bool(self.is_full))
        if now - self._settings_at >= SETTINGS_EVERY_S:
            self._settings_at, before, self._misconfiguration = now, self._misconfiguration, await self._store.misconfiguration()
            if self._misconfiguration and self._misconfiguration != before:
                logger.warning("%s", self._misconfiguration)
