"""A million requests: memory stays as it is after the first hundred thousand. It takes minutes, so it runs only when it is asked for.

Results are kept for ten minutes: in the distributed form by Redis, in the embedded form by the process itself, which grows by that much.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ..bench import Bench
from ..closed_loop import closed_loop
from ..memory import mib_by_kind
from ..scenario import Claim, Measure, Sample
from ..subjects import FORMS, Subject, running_mqserve

CASE = "a million requests"
CLIENTS = 64
REQUESTS, FIRST = 1_000_000, 100_000
PART_S = 5.0


class Million:
    name = "million"
    title = "Memory over a million requests, 64 clients"
    headline = "growth"
    baseline = "embedded"
    cases = (CASE,)
    claims = tuple(Claim(CASE, form, "growth", at_most=1.05) for form in FORMS)

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        measures: dict[str, Measure] = {}
        for form in FORMS:
            servers = bench.servers if form == "distributed" else None
            for subject in bench.started(form, running_mqserve(form, servers), stack):
                measures[form] = self._measure(subject)
        return measures

    def _measure(self, subject: Subject) -> Measure:
        def measure(case: str) -> Sample:
            _send(subject, FIRST)
            first = mib_by_kind(subject)["total_mib"]
            per_second = _send(subject, REQUESTS - FIRST)
            last = mib_by_kind(subject)
            return Sample({"growth": last["total_mib"] / first, "per_second": per_second, "first_mib": first, **last})

        return measure


def _send(subject: Subject, count: int) -> float:
    """Sends at least so many requests, and returns how many were answered in a second."""
    sent, seconds = 0.0, 0.0
    while sent < count:
        sample = closed_loop(subject, "async_noop", CLIENTS, PART_S)
        sent += sample.values["per_second"] * PART_S
        seconds += PART_S
    return sent / seconds


MILLION = Million()
