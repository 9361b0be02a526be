"""The results as a table for the terminal and for Markdown: ratios first, medians with the least and the greatest round."""

from __future__ import annotations

import statistics
from collections import Counter

from .results import LOAD_GENERATORS, CaseResults, Results, ScenarioResults, Spread, cpu_us, holds, ratios, spread, standing, value_of
from .scenario import Claim


def markdown(results: Results) -> str:
    """What must hold, and then all scenarios."""
    return "\n\n".join([_claims(results), *map(_scenario, results.scenarios)]) + "\n"


def _scenario(scenario: ScenarioResults) -> str:
    left_out = [f"{name} was not measured: {why}" for name, why in scenario.left_out.items()]
    return "\n\n".join([f"### {scenario.title}", _table(scenario), *left_out])


def _table(scenario: ScenarioResults) -> str:
    """One row for each case and subject; the columns are the values that the samples have."""
    samples = [sample for case in scenario.cases for rounds in case.samples.values() for sample in rounds]
    values = list(dict.fromkeys(name for sample in samples for name in sample.values))
    has_cpu = any(sample.cpu_us for sample in samples)
    heads = ["case", "subject", f"{words(scenario.headline)}, of {scenario.baseline}", *map(words, values)]
    heads += ["CPU µs per request", "of which"] if has_cpu else []
    rows = [_row(scenario, case, subject, values, has_cpu) for case in scenario.cases for subject in case.samples if case.samples[subject]]
    lines = [heads, ["---", "---", *["--:" for _ in heads[2:]]], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(scenario: ScenarioResults, case: CaseResults, subject: str, values: list[str], has_cpu: bool) -> list[str]:
    rounds = case.samples[subject]
    against = ratios(case, subject, scenario.headline, [scenario.baseline])
    row = [case.case, subject, _told(spread(against)) if against else "–"]
    row += [_told(spread([value_of(sample, name) for sample in rounds])) if name in rounds[0].values else "–" for name in values]
    if has_cpu:
        row += [_told(spread([cpu_us(sample) for sample in rounds])), _by_process(case, subject)] if rounds[0].cpu_us else ["–", "–"]
    return row


def _by_process(case: CaseResults, subject: str) -> str:
    """The median of each kind of process, the dearest first and the load generator last; what stays below 1 µs is left out."""
    kinds: Counter[str] = Counter()
    for kind in {kind for sample in case.samples[subject] for kind in sample.cpu_us}:
        kinds[kind] = round(statistics.median(sample.cpu_us.get(kind, 0.0) for sample in case.samples[subject]))
    ordered = sorted(kinds.items(), key=lambda item: (item[0] in LOAD_GENERATORS, -item[1], item[0]))
    return ", ".join(f"{kind} {us}" for kind, us in ordered if us)


def _claims(results: Results) -> str:
    """One row for each claim of each scenario."""
    heads = "| what must hold | bound | measured | holds |\n| --- | --- | --: | --- |"
    return "\n".join([heads, *(_claim(scenario, claim) for scenario in results.scenarios for claim in scenario.claims)])


def _claim(scenario: ScenarioResults, claim: Claim) -> str:
    rivals = ", ".join(claim.against) if len(claim.against) < 2 else f"the best of {', '.join(claim.against)}"
    what = f"{scenario.title}, {claim.case}: {words(claim.value)} of {claim.subject}{f' ÷ that of {rivals}' if rivals else ''}"
    bound = f"≥ {claim.at_least:g}" if claim.at_least is not None else f"≤ {claim.at_most:g}"
    came = standing(scenario, claim)
    told, verdict = ("–", "not measured") if came is None else (_told(came), "yes" if holds(claim, came.median) else "**no**")
    return f"| {what} | {bound} | {told} | {verdict} |"


def _told(values: Spread) -> str:
    median, low, high = map(number, values)
    return median if low == high else f"{median} ({low}–{high})"


def number(value: float) -> str:
    """Three significant digits, and thousands apart."""
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


WORDS = {
    "per_second": "requests/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "cpu_us": "CPU µs per request",
    "chunks_per_second": "chunks/s",
    "first_p50_ms": "first chunk, p50 ms",
    "first_p99_ms": "first chunk, p99 ms",
    "late_p50_ms": "a chunk's age, p50 ms",
    "late_p99_ms": "a chunk's age, p99 ms",
}


def words(value: str) -> str:
    return WORDS.get(value, value.replace("_", " "))
