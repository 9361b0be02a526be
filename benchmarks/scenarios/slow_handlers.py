"""A handler that takes 20 ms: on more and more replicas, and with a whole batch in each call. `of_ideal` is the share of what its calls
alone would allow."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ..bench import Bench
from ..closed_loop import closed_loop
from ..scenario import Claim, Measure, Sample
from ..subjects import FORMS, PROGRAMS, Subject, running_mqserve

CALL_S = 0.02
CLIENTS = 64
WARM_UP_S = 1.0


class SlowHandlers:
    """Paths of `programs/sleeping.py`; `at_once` says how many requests each case has in its handlers at a time, at most."""

    headline = "per_second"
    baseline = "embedded"
    claims: tuple[Claim, ...] = ()

    def __init__(self, name: str, title: str, path: str, at_once: dict[str, int]) -> None:
        self.name = name
        self.title = title
        self.cases = tuple(at_once)
        self._path = path
        self._at_once = at_once

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        measures: dict[str, Measure] = {}
        ready = [f"{self._path}{count}" for count in self._at_once.values()]
        for form in FORMS:
            servers = bench.servers if form == "distributed" else None
            for subject in bench.started(form, running_mqserve(form, servers, program=PROGRAMS / "sleeping.py", ready=ready), stack):
                measures[form] = self._measure(subject, bench)
        return measures

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        for count in self._at_once.values():
            closed_loop(subject, f"{self._path}{count}", CLIENTS, WARM_UP_S)

        def measure(case: str) -> Sample:
            count = self._at_once[case]
            sample = closed_loop(subject, f"{self._path}{count}", CLIENTS, bench.seconds)
            of_ideal = sample.values["per_second"] * CALL_S / count
            return Sample({**sample.values, "of_ideal": of_ideal}, sample.cpu_us)

        return measure


REPLICAS = SlowHandlers(
    "replicas",
    "A handler of 20 ms on 1 to 8 replicas, 64 clients",
    "replicas",
    {"1 replica": 1, "2 replicas": 2, "4 replicas": 4, "8 replicas": 8},
)
BATCHING = SlowHandlers("batching", "Batches in a call of 20 ms, 64 clients", "batches", {"one by one": 1, "batches of 16": 16})
