"""Requests that a foreign program publishes by AMQP, persistent and confirmed, until each answer is on the program's own queue.

The confirm says that RabbitMQ has written the request to its disk; the answer, that the replica has run it and stored the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack

from ..bench import Bench
from ..cpu import spent_us
from ..scenario import Claim, Measure, Sample
from ..subjects import PROGRAMS, Subject, SubjectFailed, running_mqserve
from .overload import percentile_ms

IN_FLIGHT = {"1 under way": 1, "64 under way": 64}
WARM_UP_S = 1.0


class Amqp:
    name = "amqp"
    title = "Persistent, confirmed requests by AMQP"
    headline = "per_second"
    baseline = "distributed"
    cases = tuple(IN_FLIGHT)
    claims: tuple[Claim, ...] = ()

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        measures: dict[str, Measure] = {}
        for subject in bench.started("distributed", running_mqserve("distributed", bench.servers), stack):
            measures[subject.name] = self._measure(subject, bench)
        return measures

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        publish(subject, 16, WARM_UP_S)

        def measure(case: str) -> Sample:
            return publish(subject, IN_FLIGHT[case], bench.seconds)

        return measure


def publish(subject: Subject, in_flight: int, seconds: float) -> Sample:
    """Measures one run of the publisher. Raises SubjectFailed if a request was not confirmed, or not answered with 200."""
    exchange = f"{subject.env['MQSERVE_NAMESPACE']}.requests"
    command = [sys.executable, str(PROGRAMS / "publisher.py"), exchange, "async_noop", str(in_flight), str(seconds)]
    before = subject.cpu_s()
    told = subprocess.run(command, env={**os.environ, **subject.env}, capture_output=True, text=True)
    after = subject.cpu_s()
    if told.returncode:
        raise SubjectFailed(told.stderr.strip()[-2000:])
    report = json.loads(told.stdout)
    confirmed, answered = report["confirmed_s"], report["answered_s"]
    return Sample(
        {
            "per_second": len(answered) / seconds,
            "p50_confirmed_ms": percentile_ms(confirmed, 50),
            "p50_ms": percentile_ms(answered, 50),
            "p99_ms": percentile_ms(answered, 99),
        },
        spent_us(before, after, len(answered)),
    )


AMQP = Amqp()
