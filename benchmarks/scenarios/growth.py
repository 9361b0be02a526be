"""What a request costs as an instance grows: many backends beside one, and 1,000 routes beside 10, under requests to all routes in turn.

All instances of a scenario run at once; what a larger one costs at rest is part of its requests' cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Load:
    """How many clients there are, and the sizes that are compared under them. `name` is said behind the form in the name of the case."""

    name: str
    clients: Callable[[Size], int]
    sizes: tuple[Size, ...]


class Growth:
    """Instances of several sizes, each against the first."""

    headline = "cpu_us"

    def __init__(self, name: str, title: str, loads: Sequence[Load]) -> None:
        self.name = name
        self.title = title
        self.baseline = loads[0].sizes[0].name
        self._cases = {f"{form}, {load.name}": (form, load) for load in loads for form in FORMS}
        self.cases = tuple(self._cases)
        self.claims = tuple(
            Claim(case, load.sizes[-1].name, "cpu_us", against=(self.baseline,), at_most=1.1) for case, (_, load) in self._cases.items()
        )

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        sizes = dict.fromkeys(size for _, load in self._cases.values() for size in load.sizes)
        return {size.name: self._measure(size, stack, bench) for size in sizes}

    def _measure(self, size: Size, stack: ExitStack, bench: Bench) -> Measure:
        subjects: dict[str, Subject] = {}
        for form in FORMS:
            servers = bench.servers if form == "distributed" else None
            for subject in bench.started(f"{size.name}, {form}", running_deployed(size.name, servers, size.backends, size.routes), stack):
                closed_loop(subject, "", CLIENTS, WARM_UP_S, paths=size.routes)
                subjects[form] = subject

        def measure(case: str) -> Sample | None:
            form, load = self._cases[case]
            if size not in load.sizes:
                return None
            return closed_loop(subjects[form], "", load.clients(size), bench.seconds, paths=size.routes)

        return measure


ONE_BACKEND, BACKENDS_16, BACKENDS_64 = Size("1 backend", 1, 64), Size("16 backends", 16, 64), Size("64 backends", 64, 64)
BACKENDS = Growth(
    "backends",
    "Many backends at once",
    (
        Load("64 clients", lambda size: CLIENTS, (ONE_BACKEND, BACKENDS_64)),  # 64 backends have one request under way in each
        Load("16 clients per backend", lambda size: 16 * size.backends, (ONE_BACKEND, BACKENDS_16)),
    ),
)
ROUTES = Growth(
    "routes",
    "Many routes",
    (Load("64 clients", lambda size: CLIENTS, (Size("10 routes", 1, 10), Size("100 routes", 1, 100), Size("1,000 routes", 1, 1000))),),
)
