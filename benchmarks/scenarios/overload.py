"""Twice as many requests as two replicas can take, at a fixed rate: the queue is bounded, so what is accepted stays quick, and the rest is
refused at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from ..bench import Bench
from ..closed_loop import closed_loop
from ..scenario import Claim, Measure, Sample
from ..subjects import FORMS, PROGRAMS, Subject, SubjectFailed, running_mqserve

CASE = "twice the capacity"
CLIENTS = 64  # fewer than the queue takes: at capacity nothing is refused
REPLICAS, MAX_QUEUED = 2, 100  # as in programs/bounded.py
HELD = 2 * REPLICAS  # by the replicas: the request that runs, and the one behind it
WARM_UP_S = 1.0
LEAST_S = 4.0  # a queue that fills, and then time at its bound


class Overload:
    name = "overload"
    title = "Overload: a handler of 5 ms on two replicas, at most 100 waiting"
    headline = "of_capacity"
    baseline = "embedded"
    cases = (CASE,)
    claims = tuple(
        claim
        for form in FORMS
        for claim in (
            Claim(CASE, form, "of_capacity", at_least=0.9),
            Claim(CASE, form, "p99_of_bound", at_most=1.0),
            Claim(CASE, form, "p99_refused_ms", at_most=50),
        )
    )

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        measures: dict[str, Measure] = {}
        for form in FORMS:
            servers = bench.servers if form == "distributed" else None
            for subject in bench.started(form, running_mqserve(form, servers, program=PROGRAMS / "bounded.py", ready=["bounded"]), stack):
                measures[form] = self._measure(subject, bench)
        return measures

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        closed_loop(subject, "bounded", CLIENTS, WARM_UP_S)

        def measure(case: str) -> Sample:
            capacity = closed_loop(subject, "bounded", CLIENTS, bench.seconds).values["per_second"]
            return overloaded(subject, capacity, max(LEAST_S, bench.seconds))

        return measure


def overloaded(subject: Subject, capacity: float, seconds: float) -> Sample:
    """Sends twice the capacity from a process of its own. Raises SubjectFailed if an answer is neither 200 nor 429."""
    command = [sys.executable, str(PROGRAMS / "open_loop.py"), f"{subject.url}/bounded", str(2 * capacity), str(seconds)]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise SubjectFailed(told.stderr.strip())
    report = json.loads(told.stdout)
    latencies: dict[str, list[float]] = report["latencies_s"]
    if set(latencies) != {"200", "429"}:
        raise SubjectFailed(f"at twice the capacity: { ({status: len(times) for status, times in latencies.items()}) }")
    accepted, refused = latencies["200"], latencies["429"]
    per_second = len(accepted) / report["ended_s"]  # what waits at the end counts, and so does the time that it takes
    bound_ms = (MAX_QUEUED + HELD) / per_second * 1000  # a full queue, at the rate at which it was emptied: `of_capacity` judges that rate
    return Sample(
        {
            "of_capacity": per_second / capacity,
            "per_second": per_second,
            "refused_per_second": len(refused) / seconds,
            "p50_ms": percentile_ms(accepted, 50),
            "p99_ms": percentile_ms(accepted, 99),
            "p99_of_bound": percentile_ms(accepted, 99) / bound_ms,
            "p50_refused_ms": percentile_ms(refused, 50),
            "p99_refused_ms": percentile_ms(refused, 99),
            "p99_sent_late_ms": percentile_ms(report["sent_late_s"], 99),
        }
    )


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000


OVERLOAD = Overload()
