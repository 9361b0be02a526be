"""What a client asks for beside the answer: `Prefer` (RFC 7240) makes its request a job, and other headers say how that is kept."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from ..broker.errors import BadValue
from ..broker.jobs import MAX_DELAY_S, MAX_RESULT_TTL_S, PRIORITIES

MAX_WAIT_S = 60  # for what is not there yet: longer than that, many a server in front gives up
RESULT_TTL_HEADER = b"x-result-ttl"
CALLBACK_HEADER = b"x-callback-url"
PRIORITY_HEADER = b"x-priority"
NOT_BEFORE_HEADER = b"x-not-before"
WAIT_PRIORITIES = {"high": 4, "normal": 0, "low": 0}
"""AMQP's priorities of requests that wait. There is none below normal: each normal request would pay for a property that says so."""

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


def read_preference(headers: Headers) -> Preference | None:
    """Returns None for a request that is no job. Preferences that are not known or not written right are passed over, as the RFC says."""
    given: dict[str, str] = {}
    for name, value in headers:
        if name == b"prefer":
            for part in _split(value.decode("latin-1")):
                token, _, word = part.partition(";")[0].partition("=")
                given.setdefault(token.strip().lower(), word.strip().strip('"'))  # the first one counts
    is_async = "respond-async" in given
    wait = given.get("wait", "")
    if not _SECONDS.fullmatch(wait):
        return Preference(True, None) if is_async else None
    return Preference(is_async, min(MAX_WAIT_S, int(wait)))


def result_ttl_of(headers: Headers) -> int:
    """Returns for how many seconds the result is to be kept; 0 for as long as the backend says. Raises BadValue."""
    if (value := _value_of(headers, RESULT_TTL_HEADER)) is None:
        return 0
    seconds = int(value) if _SECONDS.fullmatch(value) else 0
    if not 1 <= seconds <= MAX_RESULT_TTL_S:
        raise BadValue(f"X-Result-TTL must be a whole number of seconds from 1 to {MAX_RESULT_TTL_S} (30 days)")
    return seconds


def callback_of(headers: Headers) -> str:
    """Returns the URL that is to be told of the end of the job; empty for none."""
    return _value_of(headers, CALLBACK_HEADER) or ""


def not_before_of(headers: Headers, now_ms: int) -> int:
    """Returns the time, in ms since 1970, before which the job does not begin; 0 for none. Raises BadValue."""
    if (value := _value_of(headers, NOT_BEFORE_HEADER)) is None:
        return 0
    if (at := _time_of(value)) is None:
        raise BadValue("X-Not-Before must be a time with its zone, such as 2030-01-31T03:00:00Z, or an HTTP date")
    not_before_ms = math.ceil(at.timestamp() * 1000)
    if not_before_ms > now_ms + MAX_DELAY_S * 1000:
        raise BadValue("X-Not-Before is more than 30 days away, and a job waits no longer than that for its time")
    return not_before_ms if not_before_ms > now_ms else 0


def check_no_job(headers: Headers) -> None:
    """Raises BadValue if a request that is no job has a header that only jobs heed."""
    if _value_of(headers, NOT_BEFORE_HEADER) is not None:
        raise BadValue("X-Not-Before is for jobs, and this request is none: add Prefer: respond-async, or leave it out")


def _time_of(text: str) -> datetime | None:
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            at = read(text)
        except (ValueError, TypeError, OverflowError, IndexError):
            continue
        if at.tzinfo is not None:
            return at
    return None


def _value_of(headers: Headers, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in headers if name == wanted), None)


def read_priority(value: bytes) -> str:
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


def _split(value: str) -> list[str]:
    """Splits a list at its commas, but not at those in quotes."""
    return re.findall(r'(?:[^,"]|"[^"]*")+', value)
