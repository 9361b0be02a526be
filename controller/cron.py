"""When schedules fire: cron expressions in a time zone, as functions of store time in ms.

Five fields, and words such as `@daily`, are read as Debian's cron reads them, also where clocks change: what is due in an hour that is left
out comes right behind it, and what is due in an hour that comes twice, once. Six fields begin with seconds, and go by the clock alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from ..broker.errors import BadType, BadValue
from .state.documents import Schedule

LATE_MS = 60_000  # what is later than this was missed: longer than a change of leaders takes
WORDS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


class Cron:
    """One cron expression in one time zone. Raises BadValue for one that cannot be read, or that never fires."""

    def __init__(self, expression: str, timezone: str) -> None:
        self._expression = WORDS.get(expression.strip().lower(), expression)
        self._zone = _zone_of(timezone)
        try:
            self._times(0)
        except (CronSimError, ValueError) as error:
            wrong = str(error).lower() if isinstance(error, CronSimError) else "a number is too long"
            raise BadValue(
                f"{expression[:100]!r} is no cron expression ({wrong}): it says minute, hour, day of month, month and day of week, and "
                f"before them perhaps the second, as in '0 3 * * *', or is one of {', '.join(WORDS)}"
            ) from error
        if self.next_after(0) is None:
            raise BadValue(f"{expression!r} never fires: no day is like that")

    def __repr__(self) -> str:
        return f"<Cron {self._expression} {self._zone}>"

    def next_after(self, ms: int) -> int | None:
        """Returns the first time behind that moment; None if there is none within fifty years."""
        return next((at for at in map(_ms, self._times(ms)) if at > ms), None)  # an hour that comes twice may lead back

    def last_until(self, ms: int) -> int | None:
        """Returns the last time before that moment, or that moment itself."""
        return next((at for at in map(_ms, self._times(ms + 1, reverse=True)) if at <= ms), None)

    def _times(self, ms: int, *, reverse: bool = False) -> CronSim:
        return CronSim(self._expression, datetime.fromtimestamp(ms / 1000, self._zone), reverse=reverse)


def cron_of(expression: str, timezone: str) -> Cron:
    """Returns the expression, read once. Raises BadType and BadValue."""
    if not isinstance(expression, str):
        raise BadType(f"cron is a text such as '0 3 * * *' (every day at three), not {expression!r}")
    if not isinstance(timezone, str):
        raise BadType(f"timezone is the name of a time zone such as 'Europe/Berlin', not {timezone!r}")
    return _read(expression, timezone)


def due(cron: Cron, after_ms: int, now_ms: int, *, once: bool) -> list[int]:
    """Returns the times to fire for at `now_ms`, in order, of those behind `after_ms`: each that came within the last minute. If there is
    none, and with `once`, the last one that was missed."""
    late_ms = now_ms - LATE_MS
    found: list[int] = []
    at = cron.next_after(max(after_ms, late_ms))
    while at is not None and at <= now_ms:
        found.append(at)
        at = cron.next_after(at)
    if not found and once and late_ms > after_ms:
        missed = cron.last_until(late_ms)
        found = [missed] if missed is not None and missed > after_ms else []
    return found


def next_time(schedule: Schedule, now_ms: int) -> int | None:
    """Returns when a schedule fires next; None for one that is paused, or that this machine cannot read."""
    return next(next_times(schedule, now_ms), None)


def next_times(schedule: Schedule, now_ms: int) -> Iterator[int]:
    """Yields when a schedule fires; nothing for one that is paused, or that this machine cannot read."""
    if schedule.paused:
        return
    with suppress(BadValue):
        cron, at = cron_of(schedule.cron, schedule.timezone), now_ms
        while (upcoming := cron.next_after(at)) is not None:
            yield (at := upcoming)


_read = lru_cache(maxsize=256)(Cron)  # most expressions come again, and an odd one takes a millisecond


def _ms(at: datetime) -> int:
    return int(at.timestamp()) * 1000


def _zone_of(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError) as error:
        raise BadValue(
            f"there is no time zone {name!r} here: give a name such as 'Europe/Berlin'; where the system has no zones, install tzdata"
        ) from error
