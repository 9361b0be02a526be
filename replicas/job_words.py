"""What a handler says about its job: `serve.progress` and `serve.log` to those who follow it, and `RetryLater` to have it tried again.

Any thread may tell progress and lines. The replica's I/O loop collects them ten times a second, so nothing is handed over for each call.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from ..broker.errors import BadType, BadValue
from ..broker.failures import writable
from ..broker.jobs import EventKind, JobEvent
from ..controller.state.retries import MAX_BACKOFF_S
from .context import running_jobs
from .job_chunks import JobChunks

TAKEN_EVERY_S = 0.1
MAX_TEXT = 2_000  # characters
LOGS_A_SECOND = 10


class RetryLater(Exception):
    """Raised by a handler to have its job tried again after so many seconds. It counts as an attempt (`Retry.attempts`, 5 where the backend
    says nothing). A request that somebody waits for is answered 503 with a `Retry-After`."""

    def __init__(self, after_s: float, message: str = "") -> None:
        if isinstance(after_s, bool) or not isinstance(after_s, int | float):
            raise BadType(f"RetryLater() needs a number of seconds, and got a {type(after_s).__name__}")
        if not 0 <= after_s <= MAX_BACKOFF_S:
            raise BadValue(f"RetryLater() needs 0 to {MAX_BACKOFF_S} seconds, and got {after_s}")
        super().__init__(message or f"try again in {after_s:g} s")
        self.after_s = float(after_s)

    def __reduce__(self) -> tuple[type[RetryLater], tuple[float, str]]:
        return type(self), (self.after_s, str(self))


class JobWords:
    """The words of one run that have not been collected: the last progress, the lines of the log, and what it yields. A handler that logs
    more than LOGS_A_SECOND lines loses the others."""

    __slots__ = ("_count", "_lines", "_progress", "_since", "chunks")

    def __init__(self) -> None:
        self._progress: tuple[float, str] | None = None
        self._lines: deque[str] = deque()
        self._since = 0.0  # monotonic: when the second began in which `_count` lines were logged
        self._count = 0
        self.chunks: JobChunks | None = None  # None until an answer comes in parts; most do not

    def __repr__(self) -> str:
        progress = "" if self._progress is None else ", progress"
        return f"<JobWords, {len(self._lines)} lines{progress}{'' if self.chunks is None else f', {self.chunks}'}>"

    def __bool__(self) -> bool:
        return self._progress is not None or bool(self._lines) or bool(self.chunks)

    def progress(self, fraction: float, text: str) -> None:
        self._progress = (fraction, text)

    def log(self, text: str) -> None:
        now = time.monotonic()
        if now - self._since >= 1.0:
            self._since, self._count = now, 0
        if self._count < LOGS_A_SECOND:
            self._count += 1
            self._lines.append(text)

    def take(self, now_ms: int, *, is_last: bool = False) -> Iterator[JobEvent]:
        """Yields what was said since the last call; all of it if this `is_last`. Only the I/O loop calls this."""
        if self.chunks is not None:
            yield from self.chunks.take(now_ms, is_last=is_last)
        while self._lines:
            yield JobEvent(EventKind.LOG, now_ms, text=self._lines.popleft())
        progress, self._progress = self._progress, None
        if progress is not None:
            yield JobEvent(EventKind.PROGRESS, now_ms, fraction=progress[0], text=progress[1])


@runtime_checkable
class _Heard(Protocol):
    """A running request of which somebody may hear: a job."""

    @property
    def words(self) -> JobWords: ...


def progress(fraction: float, text: str = "") -> None:
    """Tells those who follow the running job how much of it is done, from 0 to 1, and in which step it is. Of calls that follow each other
    fast only the last one is told. Does nothing in a request that somebody waits for, since nobody would hear it.

    Raises BadType for something else than a number and a text, and BadValue for a number that is none.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise BadType(f"progress() needs a number from 0 to 1, and got a {type(fraction).__name__}")
    if math.isnan(fraction):
        raise BadValue("progress() needs a number from 0 to 1, and got nan")
    text = _checked(text, "progress")
    for job in running_jobs.get():
        if isinstance(job, _Heard):
            job.words.progress(min(1.0, max(0.0, float(fraction))), text)


def log(text: str) -> None:
    """Tells those who follow the running job a line: at most 10 a second, the others are dropped. Does nothing in a request that somebody
    waits for. Raises BadType for what is no text."""
    text = _checked(text, "log")
    for job in running_jobs.get():
        if isinstance(job, _Heard):
            job.words.log(text)


def _checked(text: object, function: str) -> str:
    if not isinstance(text, str):
        raise BadType(f"{function}() needs a str to tell, and got a {type(text).__name__}")
    return writable(text, MAX_TEXT)
