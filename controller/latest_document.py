"""The desired document, also where the leader has not heard of its latest change: creating an endpoint waits for proxies, and not for
controllers."""

from __future__ import annotations

import asyncio
import math
import time

from ..broker.errors import BadEnvelope
from ..broker.store import Store
from ..broker.store_keys import StoreKeys
from .state.documents import Desired
from .state.reading import read_desired


class LatestDocument:
    """The document that this controller follows and, for endpoints that are not in it, the one in the store."""

    def __init__(self, store: Store, keys: StoreKeys) -> None:
        self._store = store
        self._key = keys.desired
        self.followed = Desired()
        self._read = self.followed  # as it stood in the store at `_read_at`
        self._raw: bytes | None = None
        self._read_at = -math.inf  # monotonic
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<LatestDocument of {len(self.followed.endpoints)} endpoints>"

    def follow(self, desired: Desired) -> None:
        """Learns the document as the controller has read it last."""
        self.followed = desired

    async def with_endpoint(self, name: str) -> Desired:
        """Returns the document that has the endpoint; the latest one if none has it. Raises StoreUnavailable."""
        if name in self.followed.endpoints:
            return self.followed
        await self._look_again()
        return self._read

    async def _look_again(self) -> None:
        """Reads the document from the store, once for all who ask while it is read: anybody may publish to endpoints that are not there."""
        asked_at = time.monotonic()
        async with self._reading:
            if self._read_at >= asked_at:
                return
            began_at = time.monotonic()
            raw = await self._store.get(self._key)
            if raw is None or raw != self._raw:
                try:
                    self._read, self._raw = self.followed if raw is None else read_desired(raw), raw
                except BadEnvelope:  # a broken document: the last good one counts, as everywhere
                    self._read, self._raw = self.followed, None
            self._read_at = began_at
