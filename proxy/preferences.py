"""What a client asks for beside the answer: `Prefer` (RFC 7240) makes its request a job, and other headers say how that is kept."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from ..broker.errors import BadValue
from ..broker.jobs import MAX_RESULT_TTL_S, PRIORITIES

MAX_WAIT_S = 60  # for what is not there yet: longer than that, many a server in front gives up
RESULT_TTL_HEADER = b"x-result-ttl"
PRIORITY_HEADER = b"x-priority"

_PREFERENCE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*"?([^",;]*)"?)?(?:\s*;[^,]*)?')
_SECONDS = re.compile(r"[0-9]{1,9}")

Headers = Iterable[tuple[bytes, bytes]]


class Preference(NamedTuple):
    """The request is a job. Its client waits `wait_s` for the answer itself, if it said so."""

    is_async: bool
    wait_s: int | None

    @property
    def applied_to_answer(self) -> bytes:
        """The preference that the answer itself has followed."""
        return b"wait=%d" % (self.wait_s or 0)

    @property
    def applied_to_promise(self) -> bytes:
        """The preferences that 202 has followed."""
        wait = [] if self.wait_s is None else [b"wait=%d" % self.wait_s]
        return b", ".join([b"respond-async", *wait] if self.is_async else wait)


class JobWish(NamedTuple):
    """What the headers of a job say. `begins_within_s` is infinite where it waits for ever; `result_ttl_s` is 0 for the backend's own."""

    begins_within_s: float
    result_ttl_s: int
    priority: int


def read_preference(headers: Headers) -> Preference | None:
    """Returns None for a request that is no job. Preferences that are not known or not written right are passed over, as the RFC says."""
    given: dict[str, str] = {}
    for name, value in headers:
        if name == b"prefer":
            for part in _split(value.decode("latin-1")):
                if (found := _PREFERENCE.fullmatch(part.strip())) is not None:
                    given.setdefault(found[1].lower(), (found[2] or "").strip())  # the first one counts
    is_async = "respond-async" in given
    wait = given.get("wait", "")
    if not _SECONDS.fullmatch(wait):
        return Preference(True, None) if is_async else None
    return Preference(is_async, min(MAX_WAIT_S, int(wait)))


def read_job_wish(headers: Headers, begins_within_s: float) -> JobWish:
    """Raises BadValue for what is not written right: a job that is kept otherwise than its client believes is found too late."""
    result_ttl_s, priority = 0, PRIORITIES["normal"]
    for name, value in headers:
        if name == RESULT_TTL_HEADER:
            result_ttl_s = _result_ttl(value.decode("latin-1"))
        elif name == PRIORITY_HEADER:
            priority = PRIORITIES[priority_name(value)]
    return JobWish(begins_within_s, result_ttl_s, priority)


def priority_name(value: bytes) -> str:
    """Raises BadValue."""
    name = value.decode("latin-1").lower()
    if name not in PRIORITIES:
        raise BadValue(f"X-Priority must be one of {', '.join(PRIORITIES)}")
    return name


def wait_of(query: bytes) -> float:
    """Returns for how many seconds the query `wait` lets a client wait; 0 without one. Raises BadValue."""
    found = re.search(rb"(?:^|&)wait=([^&]*)", query)
    if found is None:
        return 0.0
    try:
        wait_s = float(found[1])
    except ValueError:
        wait_s = math.nan
    if not 0 <= wait_s < math.inf:
        raise BadValue(f"wait must be a number of seconds, such as ?wait=30: at most {MAX_WAIT_S}")
    return min(wait_s, MAX_WAIT_S)


def _result_ttl(value: str) -> int:
    seconds = int(value) if _SECONDS.fullmatch(value) else 0
    if not 1 <= seconds <= MAX_RESULT_TTL_S:
        raise BadValue(f"X-Result-TTL must be a whole number of seconds from 1 to {MAX_RESULT_TTL_S} (30 days)")
    return seconds


def _split(value: str) -> list[str]:
    """Splits a list at its commas, but not at those in quotes."""
    return re.findall(r'(?:[^,"]|"[^"]*")+', value)
