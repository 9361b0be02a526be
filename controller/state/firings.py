"""What is kept of the last firing of each schedule: one JSON document, which only the leading controller writes."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from .documents import Count
from .reading import decode_document


class Firing(msgspec.Struct, frozen=True):
    """The latest time for which the broker has confirmed a job, and that job."""

    at: Count
    job: str


def read_firings(raw: bytes | None) -> dict[str, Firing]:
    """Returns the firings by schedule. Raises BadEnvelope for bytes that are no such document."""
    return {} if raw is None else decode_document(raw, dict[str, Firing], "list of firings")


def firings_to_bytes(firings: Mapping[str, Firing]) -> bytes:
    return msgspec.json.encode(firings)


def problem_of(schedule: str) -> str:
    """Returns what the trouble of a schedule is called among the problems of the observed state."""
    return f"schedule {schedule}"
