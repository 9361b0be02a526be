"""The options of `handle.options` that say how a job waits, runs and is kept: checked once, then turned into store time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple, Protocol

from ..broker.errors import BadType, BadValue
from ..broker.jobs import MAX_DELAY_S, MAX_EXPIRES_S, MAX_RESULT_TTL_S, PRIORITIES

MAX_TAG_LENGTH = 200
MAX_KEY_LENGTH = 255
_DAY_S = 24 * 3600
# Behind its delay: how long a job may wait in its queue and among the dead letters until a pickle in it is opened.
_OPENABLE_S = 30 * _DAY_S

Priority = Literal["high", "normal", "low"]


class JobOptions(Protocol):
    """The options of a handle that are about jobs."""

    @property
    def delay_s(self) -> float: ...

    @property
    def eta(self) -> datetime | None: ...

    @property
    def expires_s(self) -> float | None: ...

    @property
    def priority(self) -> Priority: ...

    @property
    def result_ttl_s(self) -> float | None: ...

    @property
    def tag(self) -> str: ...

    @property
    def idempotency_key(self) -> str: ...

    @property
    def callback_url(self) -> str: ...


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Those of a request that is a job because its endpoint is a pipeline."""

    delay_s: float = 0
    eta: datetime | None = None
    expires_s: float | None = None
    priority: Priority = "high"  # its caller waits
    result_ttl_s: float | None = None
    tag: str = ""
    idempotency_key: str = ""
    callback_url: str = ""


class Timing(NamedTuple):
    """When a job may begin, in store time: not before, and not after; 0 for no limit. `openable_ms` is how long its seal has to hold."""

    not_before_ms: int
    expires_ms: int
    openable_ms: int


def check_job_options(options: JobOptions) -> None:
    """Raises BadType and BadValue, with the way out."""
    if not _is_seconds(options.delay_s, at_least=0, at_most=MAX_DELAY_S):
        raise BadValue(f"delay_s must be a number of seconds from 0 to {MAX_DELAY_S} (30 days), not {options.delay_s!r}")
    if options.eta is not None:
        _check_eta(options)
    if options.expires_s is not None and not (_is_seconds(options.expires_s, at_most=MAX_EXPIRES_S) and options.expires_s > 0):
        raise BadValue(
            f"expires_s is the number of seconds within which the job may begin, above 0 and at most {MAX_EXPIRES_S} (365 days), "
            f"not {options.expires_s!r}"
        )
    if not isinstance(options.priority, str) or options.priority not in PRIORITIES:
        raise BadValue(f"priority must be one of {', '.join(map(repr, PRIORITIES))}, not {options.priority!r}")
    if options.result_ttl_s is not None and not _is_seconds(options.result_ttl_s, at_least=1, at_most=MAX_RESULT_TTL_S):
        raise BadValue(f"result_ttl_s must be a number of seconds from 1 to {MAX_RESULT_TTL_S} (30 days), not {options.result_ttl_s!r}")
    if not isinstance(options.tag, str):
        raise BadType(f"a tag is a text, by which jobs are found together, not {options.tag!r}")
    if len(options.tag) > MAX_TAG_LENGTH or not options.tag.isprintable():
        raise BadValue(f"a tag has at most {MAX_TAG_LENGTH} printable characters, and {options.tag[:40]!r} is none")
    if not isinstance(options.callback_url, str):
        raise BadType(f"a callback_url is a text, such as 'https://hooks.example.com/jobs', not {options.callback_url!r}")
    key = options.idempotency_key
    if not isinstance(key, str):
        raise BadType(f"an idempotency_key is a text of the caller's choice, a new one for each job, not {key!r}")
    try:
        size = len(key.encode())
    except UnicodeEncodeError as error:
        raise BadValue(f"an idempotency_key is compared as UTF-8, and {key[:40]!r} has none ({error.reason})") from error
    if size > MAX_KEY_LENGTH:
        raise BadValue(f"an idempotency_key has at most {MAX_KEY_LENGTH} bytes, and this one begins with {key[:40]!r}")


def _check_eta(options: JobOptions) -> None:
    eta = options.eta
    if not isinstance(eta, datetime):
        raise BadType(f"eta is the time before which the job does not begin, a datetime, not {eta!r}")
    if eta.tzinfo is None:
        raise BadValue(f"eta {eta} has no time zone, so it is another time on another machine: write datetime.now(UTC) + …")
    if options.delay_s:
        raise BadValue("eta and delay_s both say when the job may begin: give one of them, and delay_s=0 for none")


def timing_of(options: JobOptions, now_ms: int) -> Timing:
    """Raises BadValue for an eta that is too far away, and for a job that expires before it may begin."""
    delay_s = options.delay_s
    if options.eta is not None:
        delay_s = max(0.0, (options.eta - datetime.now(UTC)).total_seconds())
        if delay_s > MAX_DELAY_S:
            raise BadValue(f"eta {options.eta} is more than 30 days away, and a job waits no longer than that for its time")
    if options.expires_s is not None and options.expires_s <= delay_s:
        raise BadValue(f"the job would expire in {options.expires_s:g} s, and may not begin before {delay_s:g} s: raise expires_s")
    expires_ms = 0 if options.expires_s is None else now_ms + math.ceil(options.expires_s * 1000)
    return Timing(now_ms + math.ceil(delay_s * 1000) if delay_s else 0, expires_ms, math.ceil((delay_s + _OPENABLE_S) * 1000))


def _is_seconds(value: object, *, at_most: float, at_least: float = 0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and at_least <= value <= at_most
