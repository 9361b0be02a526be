"""Changes of the schedules in the desired document, and what is kept of their firings."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..broker.errors import BadType, BadValue
from .changes import Change, find_endpoint
from .cron import cron_of
from .state.documents import CatchUp, Desired, Schedule

Now = Callable[[], int]
"""Store time in ms, asked when a change is made: a block may commit it much later."""


def check_schedule(cron: str, timezone: str, catch_up: CatchUp) -> None:
    """Raises BadType and BadValue, with the way out."""
    cron_of(cron, timezone)
    if catch_up not in ("skip", "once"):
        raise BadValue(f"catch_up is 'skip' or 'once', not {catch_up!r}")


def set_schedule(declared: Schedule, now: Now, *, checks_endpoint: bool = True) -> Change:
    """Creates a schedule, or replaces the one of its name: with the same times it goes on where that was, and stays paused if that was."""

    def change(desired: Desired) -> Desired:
        if checks_endpoint:
            _check_endpoint(desired, declared.endpoint)
        old = desired.schedules.get(declared.name)
        if old is not None and (old.cron, old.timezone) == (declared.cron, declared.timezone):
            new = msgspec.structs.replace(declared, token=old.token, since_ms=old.since_ms, paused=old.paused)
        else:
            new = msgspec.structs.replace(declared, since_ms=now(), paused=old is not None and old.paused)
        return _with(desired, new)

    return change


def pause_schedule(name: str) -> Change:
    def change(desired: Desired) -> Desired:
        return _with(desired, msgspec.structs.replace(find_schedule(desired, name), paused=True))

    return change


def resume_schedule(name: str, now: Now) -> Change:
    """What came meanwhile is not made up for."""

    def change(desired: Desired) -> Desired:
        old = find_schedule(desired, name)
        return _with(desired, msgspec.structs.replace(old, paused=False, since_ms=now()) if old.paused else old)

    return change


def delete_schedule(name: str) -> Change:
    """Does nothing for an unknown name, as the other deletions."""
    if not isinstance(name, str):
        raise BadType(f"delete_schedule takes the name of a schedule, not {name!r}")

    def change(desired: Desired) -> Desired:
        return msgspec.structs.replace(desired, schedules={key: kept for key, kept in desired.schedules.items() if key != name})

    return change


def find_schedule(desired: Desired, name: str) -> Schedule:
    if not isinstance(name, str) or name not in desired.schedules:
        known = ", ".join(sorted(desired.schedules))
        raise BadValue(
            f"there is no schedule {name!r} (known: {known}): name one of these, or see `mqserve schedules list`"
            if known
            else f"there is no schedule {name!r}, and no other one: serve.schedule creates them"
        )
    return desired.schedules[name]


def _check_endpoint(desired: Desired, name: str) -> None:
    """Raises BadValue for an endpoint that is not there, or that takes no jobs of handles."""
    for backend in find_endpoint(desired, name).traffic:
        if desired.backends[backend].kind.is_app:
            raise BadValue(
                f"endpoint {name!r} sends to the ASGI app {backend!r}, which answers HTTP requests, and a schedule sends none: schedule an "
                "endpoint of a function or a class"
            )


def _with(desired: Desired, schedule: Schedule) -> Desired:
    return msgspec.structs.replace(desired, schedules={**desired.schedules, schedule.name: schedule})
