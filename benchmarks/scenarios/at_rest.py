"""What an instance takes without requests: memory before, during and after a load, and the CPU time of an idle one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from ..bench import Bench
from ..closed_loop import closed_loop
from ..deployed import running_deployed
from ..memory import mib_by_kind
from ..scenario import Claim, Measure, Sample
from ..subjects import FORMS, Subject

CLIENTS = 64
SETTLED_S = 3.0  # after the start, and after a load
IDLE_LEAST_S = 5.0  # /proc counts in hundredths of a second


class Memory:
    name = "memory"
    title = "Memory of the processes, two backends"
    headline = "total_mib"
    baseline = "starlette"
    cases = ("at rest", "under load", "after it")
    claims: tuple[Claim, ...] = ()

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        return {subject.name: self._measure(subject, bench) for subject in bench.http_subjects("noop", stack)}

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        time.sleep(SETTLED_S)
        at_rest = Sample(mib_by_kind(subject))

        def measure(case: str) -> Sample:
            if case == "at rest":
                return at_rest
            if case == "after it":
                time.sleep(SETTLED_S)
                return Sample(mib_by_kind(subject))
            with ThreadPoolExecutor(1) as thread:
                loading = thread.submit(closed_loop, subject, "async_noop", CLIENTS, bench.seconds)
                time.sleep(bench.seconds / 2)
                sizes = mib_by_kind(subject)
                loading.result()
            return Sample(sizes)

        return measure


class Idle:
    name = "idle"
    title = "CPU time of an idle instance with 8 backends"
    headline = "total_ms_per_s"
    baseline = "embedded"
    cases = ("8 backends",)
    claims: tuple[Claim, ...] = ()

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        measures: dict[str, Measure] = {}
        for form in FORMS:
            servers = bench.servers if form == "distributed" else None
            for subject in bench.started(form, running_deployed(form, servers, backends=8, routes=8), stack):
                time.sleep(SETTLED_S)
                measures[form] = self._measure(subject, bench)
        return measures

    def _measure(self, subject: Subject, bench: Bench) -> Measure:
        def measure(case: str) -> Sample:
            began, before = time.monotonic(), subject.cpu_s()
            time.sleep(max(IDLE_LEAST_S, bench.seconds))
            after, seconds = subject.cpu_s(), time.monotonic() - began
            spent = {f"{kind}_ms_per_s": (after[kind] - before.get(kind, 0.0)) / seconds * 1000 for kind in after}
            return Sample({"total_ms_per_s": sum(spent.values()), **spent})

        return measure


MEMORY = Memory()
IDLE = Idle()
