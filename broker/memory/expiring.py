"""A dict whose entries expire."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

_SWEEP_EVERY_S = 30.0

T = TypeVar("T")


class Expiring(Generic[T]):
    """Expired entries are gone for every reader at once, and from memory with the next sweep, which a later write makes."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[T, float]] = {}  # value, monotonic expiry
        self._next_sweep = 0.0

    def __repr__(self) -> str:
        return f"<Expiring, {len(self._entries)} entries>"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        """The keys of what has not expired, oldest first."""
        now = time.monotonic()
        return iter([key for key, (_, expiry) in self._entries.items() if expiry > now])

    def get(self, key: str) -> T | None:
        entry = self._entries.get(key)
        return entry[0] if entry is not None and entry[1] > time.monotonic() else None

    def left_ms(self, key: str) -> int:
        """Returns for how much longer the entry stands, rounded up; 0 if there is none, and also if it never expires."""
        _, expiry = self._entries.get(key, (None, 0.0))
        return max(0, math.ceil((expiry - time.monotonic()) * 1000)) if expiry != math.inf else 0

    def put(self, key: str, value: T, ttl_ms: float | None, *, only_new: bool = False) -> bool:
        """Writes the entry, for ever if `ttl_ms` is None. With `only_new` it does nothing, and returns False, where there is one."""
        now = time.monotonic()
        if only_new and key in self._entries and self._entries[key][1] > now:
            return False
        self._entries[key] = (value, now + ttl_ms / 1000 if ttl_ms is not None else math.inf)
        if now > self._next_sweep:
            self._next_sweep = now + _SWEEP_EVERY_S
            self._entries = {name: entry for name, entry in self._entries.items() if entry[1] > now}
        return True

    def expire(self, key: str, ttl_ms: float | None) -> None:
        """Sets the TTL of an entry, if there is one."""
        if (value := self.get(key)) is not None:
            self.put(key, value, ttl_ms)

    def extend(self, key: str, ttl_ms: float) -> bool:
        """Extends a shorter TTL; returns whether there is such an entry."""
        if self.get(key) is None:
            return False
        value, expiry = self._entries[key]
        self._entries[key] = (value, max(expiry, time.monotonic() + ttl_ms / 1000))
        return True

    def pop(self, key: str) -> None:
        self._entries.pop(key, None)

    def clear(self) -> None:
        self._entries.clear()
