"""What is kept of the firings of each schedule: one JSON document, which only the leading controller writes. It outlives an instance of
`mqserve run`, so that the next one knows what was missed in between."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from .documents import Count, Schedule
from .reading import decode_document


class Firing(msgspec.Struct, frozen=True, omit_defaults=True):
    """The latest time for which the broker has confirmed a job, and that job; 0 and empty before the first one."""

    at: Count = 0
    job: str = ""
    until: Count = 0  # its times until then have their jobs, or were missed
    times: str = ""  # expression and zone; empty while it is paused
    token: str = ""  # of the schedule of which this is noted: from it follow the ids of its jobs


def read_firings(raw: bytes | None) -> dict[str, Firing]:
    """Returns the firings by schedule. Raises BadEnvelope for bytes that are no such document."""
    return {} if raw is None else decode_document(raw, dict[str, Firing], "list of firings")


def firings_to_bytes(firings: Mapping[str, Firing]) -> bytes:
    return msgspec.json.encode(firings)


def times_of(schedule: Schedule) -> str:
    return "" if schedule.paused else f"{schedule.cron} {schedule.timezone}"


def problem_of(schedule: str) -> str:
    """Returns what the trouble of a schedule is called among the problems of the observed state."""
    return f"schedule {schedule}"
