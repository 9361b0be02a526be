"""Store time, in milliseconds since 1970, as people and other programs write it."""

from __future__ import annotations

from datetime import UTC, datetime

_LAST_MS = 253_402_300_799_000  # the end of the year 9999: what publishers write may be later, and no notation goes beyond it


def utc(store_ms: int) -> datetime:
    """Returns the time, or the last one that there is before it."""
    return datetime.fromtimestamp(min(store_ms, _LAST_MS) / 1000, UTC)


def rfc3339(store_ms: int) -> str | None:
    """Returns the time with its milliseconds; None for 0."""
    return utc(store_ms).isoformat(timespec="milliseconds").replace("+00:00", "Z") if store_ms else None
