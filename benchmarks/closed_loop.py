"""A subject under closed-loop load: requests per second, latency, and CPU per request."""

from __future__ import annotations

from .cpu import spent_us
from .load import load
from .scenario import Sample
from .subjects import Subject, SubjectFailed

THAW_LOAD_S = 1.0


def closed_loop(subject: Subject, path: str, clients: int, seconds: float, body: str = "", paths: int = 0) -> Sample:
    """Measures one load run. Raises SubjectFailed if a request was not answered with 200, since its cost would mean nothing."""
    with subject.taking_its_turn():
        if subject.freezes:  # what it does again and again is overdue, and done first
            load(f"{subject.url}/{path}", clients, THAW_LOAD_S, body, paths)
        before = subject.cpu_s()
        report = load(f"{subject.url}/{path}", clients, seconds, body, paths)
        after = subject.cpu_s()
    if report.failed or not report.requests:
        raise SubjectFailed(f"{report.failed} of {report.requests} requests to /{path} were not answered with 200")
    values = {"per_second": report.per_second, "p50_ms": report.p50_ms, "p99_ms": report.p99_ms}
    return Sample(values, spent_us(before, after, report.requests) | {"wrk": report.cpu_s / report.requests * 1e6})
