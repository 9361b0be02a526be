"""The results of a run: every round's samples and what the machine was, as JSON; medians, spreads and ratios are computed from these."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from .scenario import Claim, Sample

LATEST = Path(__file__).parent / "results" / "latest.json"  # of a whole run, which docs/performance.md shows
PART = LATEST.with_name("part.json")  # of a run of some scenarios or peers
LOAD_GENERATORS = ("wrk", "load")  # kinds of processes whose CPU is shown, and not counted


class Machine(msgspec.Struct, frozen=True):
    system: str
    kernel: str
    cpu: str
    cores: int
    memory_gib: float


class CaseResults(msgspec.Struct):
    """The samples of each subject, one a round, in the order of the report."""

    case: str
    samples: dict[str, list[Sample]] = {}


class ScenarioResults(msgspec.Struct):
    name: str
    title: str
    headline: str
    baseline: str
    claims: list[Claim]
    cases: list[CaseResults]
    left_out: dict[str, str] = {}  # subjects, or a subject in one case, that could not be measured, and why


class Results(msgspec.Struct):
    revision: str
    rounds: int
    seconds: float
    machine: Machine
    versions: dict[str, str]
    scenarios: list[ScenarioResults] = []


class Spread(NamedTuple):
    """A median with the least and the greatest of the rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def cpu_us(sample: Sample) -> float:
    """CPU microseconds per request of all processes but the load generator's."""
    return sum(us for kind, us in sample.cpu_us.items() if kind not in LOAD_GENERATORS)


def value_of(sample: Sample, name: str) -> float:
    return cpu_us(sample) if name == "cpu_us" else sample.values[name]


def ratios(case: CaseResults, subject: str, value: str, against: Sequence[str]) -> list[float]:
    """The subject's value divided by the best of the others', round by round. The best is the greatest if the value is a rate, else the
    least. Empty unless all of them were measured: the best may be the one that is missing."""
    best = max if value.endswith("per_second") else min
    mine, others = case.samples.get(subject, []), [case.samples.get(name, []) for name in against]
    return [
        value_of(rival[0], value) / best(value_of(each, value) for each in rival[1:])
        for rival in zip(mine, *others, strict=False)
        if others
    ]


def standing(results: ScenarioResults, claim: Claim) -> Spread | None:
    """What a claim's ratio or value came to; None if a subject of it was not measured."""
    case = next((each for each in results.cases if each.case == claim.case), None)
    if case is None or not case.samples.get(claim.subject):
        return None
    if claim.against:
        values = ratios(case, claim.subject, claim.value, claim.against)
    else:
        values = [value_of(sample, claim.value) for sample in case.samples[claim.subject]]
    return spread(values) if values else None


def holds(claim: Claim, median: float) -> bool:
    return (claim.at_least is None or median >= claim.at_least) and (claim.at_most is None or median <= claim.at_most)


def read(path: Path = LATEST) -> Results:
    return msgspec.json.decode(path.read_bytes(), type=Results)


def write(results: Results, path: Path = LATEST) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rounded(results)), indent=1) + b"\n")


def rounded(results: Results) -> Results:
    """The same with four significant digits: more would be noise."""
    for scenario in results.scenarios:
        for case in scenario.cases:
            for name, samples in case.samples.items():
                case.samples[name] = [Sample(_rounded(each.values), _rounded(each.cpu_us)) for each in samples]
    return results


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}
