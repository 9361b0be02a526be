"""Measures mqserve beside its peers: every subject of a scenario in turn, in every case, round by round.

    make bench                                                     (everything: about 30 minutes on 2 cores)
    make bench ARGS="--only noop-http --rounds 1 --seconds 1"      (or: python -m benchmarks --only …)

Prints medians with the least and the greatest round, ratios first, and CPU microseconds per request by process, and writes all samples to
benchmarks/results/latest.json, or to the file that --to names. RabbitMQ and Redis are private ones, unless MQSERVE_BROKER_URL and
MQSERVE_STORE_URL name others. Everything shares this machine's cores, so quote the ratios, not the figures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from . import machine, results
from .bench import Bench, say
from .load import check_wrk
from .peers import PEERS, installed
from .results import CaseResults, Results, ScenarioResults
from .scenario import Measure, Scenario
from .scenarios import BY_NAME_ONLY, SCENARIOS
from .subjects import SubjectFailed
from .table import markdown


def main() -> None:
    arguments = _parse()
    check_wrk()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started ends then, too
    with ExitStack() as stack:
        bench = Bench(stack, seconds=arguments.seconds, peers=arguments.peers)
        run = Results(
            machine.revision(), arguments.rounds, arguments.seconds, machine.machine(), machine.versions(bench.servers, arguments.peers)
        )
        for scenario in chosen(arguments.only):
            run.scenarios.append(measured(scenario, bench, arguments.rounds))
            results.write(run, arguments.to)  # after each, so that a run that is ended keeps what it has
    say("done")
    print("\n" + markdown(run))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[each.name for each in SCENARIOS + BY_NAME_ONLY], default=[], help="these scenarios")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=installed(), help="beside these peers; else all that are installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each sample")
    parser.add_argument("--to", type=Path, help="the file for the results")
    arguments = parser.parse_args()
    if arguments.to is None:
        is_whole = not arguments.only and set(arguments.peers) == set(PEERS)
        arguments.to = results.LATEST if is_whole else results.PART
    return arguments


def chosen(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names, or all that do not need to be named."""
    return [each for each in SCENARIOS + BY_NAME_ONLY if each.name in names or (not names and each in SCENARIOS)]


def measured(scenario: Scenario, bench: Bench, rounds: int) -> ScenarioResults:
    """Measures each subject in each case, in turn; every second round goes backwards, so that a drift of the machine meets all alike."""
    cases = [CaseResults(case, {}) for case in scenario.cases]
    bench.left_out = {}
    with ExitStack() as stack:
        try:
            measures = dict(scenario.open(stack, bench))
        except SubjectFailed as failed:
            measures, bench.left_out[scenario.name] = {}, str(failed)
        for case in cases:
            case.samples = {subject: [] for subject in measures}
        for number in range(rounds):
            for case in cases:
                say(f"{scenario.name}, round {number + 1} of {rounds}: {case.case}")
                _measure_in_turn(case, measures, bench.left_out, backwards=number % 2 == 1)
    for case in cases:
        case.samples = {subject: samples for subject, samples in case.samples.items() if len(samples) == rounds}
    return ScenarioResults(
        scenario.name, scenario.title, scenario.headline, scenario.baseline, list(scenario.claims), cases, dict(bench.left_out)
    )


def _measure_in_turn(case: CaseResults, measures: dict[str, Measure], left_out: dict[str, str], *, backwards: bool) -> None:
    for subject in reversed(list(measures)) if backwards else list(measures):
        name = f"{subject}, {case.case}"
        if name in left_out:
            continue
        try:
            sample = measures[subject](case.case)
        except SubjectFailed as failed:
            left_out[name] = str(failed)
        else:
            if sample is not None:
                case.samples[subject].append(sample)


if __name__ == "__main__":
    main()
