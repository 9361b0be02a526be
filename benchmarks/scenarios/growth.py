"""What a request costs as an instance grows: 64 backends beside one, and 1,000 routes beside 10, under requests to all routes in turn.

All instances of a scenario run at once; what a larger one costs at rest is part of its requests' cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from ..bench import Bench
from ..closed_loop import closed_loop
from ..deployed import running_deployed
from ..scenario import Claim, Measure, Sample
from ..subjects import FORMS, Subject

CLIENTS = 64
WARM_UP_S = 2.0


@dataclass(frozen=True)
class Size:
    """How large an instance is; `name` is the subject's."""

    name: str
    backends: int
    routes: int


class Growth:
    """Instances of several sizes, each against the first."""

    headline = "cpu_us"
    cases = FORMS

    def __init__(self, name: str, title: str, sizes: tuple[Size, ...]) -> None:
        self.name = name
        self.title = title
        self.baseline = sizes[0].name
        self.claims = tuple(Claim(form, sizes[-1].name, "cpu_us", against=(self.baseline,), at_most=1.1) for form in FORMS)
        self._sizes = sizes

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        return {size.name: self._measure(size, stack, bench) for size in self._sizes}

    def _measure(self, size: Size, stack: ExitStack, bench: Bench) -> Measure:
        subjects: dict[str, Subject] = {}
        for form in FORMS:
            servers = bench.servers if form == "distributed" else None
            for subject in bench.started(f"{size.name}, {form}", running_deployed(size.name, servers, size.backends, size.routes), stack):
                closed_loop(subject, "", CLIENTS, WARM_UP_S, paths=size.routes)
                subjects[form] = subject

        def measure(case: str) -> Sample | None:
            return closed_loop(subjects[case], "", CLIENTS, bench.seconds, paths=size.routes)

        return measure


BACKENDS = Growth("backends", "64 backends at once, 64 clients", (Size("1 backend", 1, 64), Size("64 backends", 64, 64)))
ROUTES = Growth("routes", "Many routes, 64 clients", (Size("10 routes", 1, 10), Size("100 routes", 1, 100), Size("1,000 routes", 1, 1000)))
