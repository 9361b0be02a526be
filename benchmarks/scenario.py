"""What a scenario is: the subjects that it compares, the cases in which it measures each, and what must hold.

A scenario is an object in a module of its own under `benchmarks/scenarios/`, and is listed in `benchmarks/scenarios/__init__.py`. The
command (`benchmarks/__main__.py`) opens its subjects, measures every subject in every case, in turn and round by round, and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from .bench import Bench


@dataclass(frozen=True)
class Sample:
    """One measurement of one subject in one case.

    `values` by name, with the unit at the end: `per_second`, `p50_ms`, `rest_mib`; tables show them in this order. `cpu_us` is CPU
    microseconds per request by kind of process (`proxy`, `rabbitmq`, `wrk`), from /proc; it is empty where there are no requests.
    """

    values: Mapping[str, float]
    cpu_us: Mapping[str, float] = field(default_factory=dict)


Measure = Callable[[str], Sample | None]
"""Measures its subject once in the named case, for about `bench.seconds`; None if the subject has no such case. Raises SubjectFailed if the
sample would mean nothing; the subject is then left out of that case, and the report says why."""


def warmed(measure: Measure, warm_up: Callable[[], object]) -> Measure:
    """The same, with a warm-up before its first sample, which may raise SubjectFailed as well."""
    warm = False

    def measure_warm(case: str) -> Sample | None:
        nonlocal warm
        if not warm:
            warm_up()
            warm = True
        return measure(case)

    return measure_warm


@dataclass(frozen=True)
class Claim:
    """A line of what must hold, in one case: the median over the rounds of a subject's value, or of its ratio to the best of others in the
    same round. The value `cpu_us` is the sum over all processes except the load generator's. A claim of which a subject is missing is
    reported as not measured."""

    case: str
    subject: str
    value: str
    against: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None


class Scenario(Protocol):
    @property
    def name(self) -> str:
        """The name on the command line, e.g. `noop-http`."""

    @property
    def title(self) -> str:
        """The heading of its table."""

    @property
    def headline(self) -> str:
        """The value whose ratios come first in the report, e.g. `per_second`."""

    @property
    def baseline(self) -> str:
        """The subject beside which ratios are said; its own is 1."""

    @property
    def cases(self) -> Sequence[str]: ...

    @property
    def claims(self) -> Sequence[Claim]: ...

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        """Starts the subjects, which end with the stack, and returns how each is measured, in the order of the report."""
