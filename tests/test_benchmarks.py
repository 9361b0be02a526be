"""`make bench`: what it makes of its samples, and docs/performance.md, held to the results."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import page, results
from benchmarks.__main__ import measured
from benchmarks.bench import Bench
from benchmarks.peers import FOLDER, PEERS
from benchmarks.picture import svg
from benchmarks.results import CaseResults, Machine, Results, ScenarioResults, holds, ratios, spread, standing
from benchmarks.scenario import Claim, Measure, Sample
from benchmarks.scenarios import SCENARIOS
from benchmarks.subjects import SubjectFailed
from benchmarks.table import markdown


class Counted:
    """A scenario of three subjects that only counts."""

    name = title = "counted"
    headline = "per_second"
    baseline = "plain"
    cases = ("1 client", "2 clients")
    claims = (Claim("1 client", "plain", "per_second", at_least=1),)

    def __init__(self, fails: str = "") -> None:
        self.turns: list[str] = []
        self._fails = fails

    def open(self, stack: ExitStack, bench: Bench) -> Mapping[str, Measure]:
        return {name: self._measure(name) for name in ("plain", "fast", "rare")}

    def _measure(self, name: str) -> Measure:
        def measure(case: str) -> Sample | None:
            if name == "rare" and case == "2 clients":
                return None
            self.turns.append(f"{name}, {case}")
            if name == self._fails:
                raise SubjectFailed("it is gone")
            return Sample({"per_second": float(len(self.turns))})

        return measure


def run(scenario: Any, rounds: int) -> ScenarioResults:
    with ExitStack() as stack:
        return measured(scenario, Bench(stack, seconds=0.0), rounds)


def test_subjects_take_turns_and_every_second_round_goes_backwards() -> None:
    scenario = Counted()
    run(scenario, rounds=2)
    there, back = ["plain, 1 client", "fast, 1 client", "rare, 1 client"], ["plain, 2 clients", "fast, 2 clients"]
    assert scenario.turns == there + back + there[::-1] + back[::-1]


def test_a_case_that_a_subject_does_not_have_is_not_in_its_results() -> None:
    assert [list(case.samples) for case in run(Counted(), rounds=1).cases] == [["plain", "fast", "rare"], ["plain", "fast"]]


def test_a_subject_that_fails_in_a_case_is_left_out_of_it_and_the_report_says_why() -> None:
    scenario = Counted(fails="fast")
    told = run(scenario, rounds=3)
    assert [turn for turn in scenario.turns if turn.startswith("fast")] == ["fast, 1 client", "fast, 2 clients"]
    assert [list(case.samples) for case in told.cases] == [["plain", "rare"], ["plain"]]
    assert told.left_out == {"fast, 1 client": "it is gone", "fast, 2 clients": "it is gone"}


def test_a_ratio_is_taken_round_by_round_against_the_best_of_the_others() -> None:
    case = CaseResults("1", {name: [Sample({"per_second": rate, "p50_ms": rate}) for rate in rates] for name, rates in RATES.items()})
    assert ratios(case, "ours", "per_second", ["one", "two"]) == [5.0, 3.0, 2.0]
    assert ratios(case, "ours", "p50_ms", ["one", "two"]) == [10.0, 6.0, 4.0]
    assert ratios(case, "ours", "per_second", ["absent"]) == []
    assert ratios(case, "ours", "per_second", ["one", "absent"]) == [], "the absent one may be the best"


RATES = {"ours": [20.0, 18.0, 12.0], "one": [4.0, 3.0, 6.0], "two": [2.0, 6.0, 3.0]}


def sample_results() -> Results:
    """Two subjects, two rounds, and a claim that holds, one that does not, and one that nobody measured."""
    case = "async, 64 clients"
    claims = [
        Claim(case, "distributed", "per_second", against=("starlette",), at_least=0.4),
        Claim(case, "distributed", "cpu_us", at_most=100),
        Claim(case, "distributed", "p50_ms", against=("ray",), at_most=1.3),
    ]
    bare = Sample({"per_second": 10_000.0, "p50_ms": 5.0}, {"server": 50.0, "wrk": 10.0})
    ours = [Sample({"per_second": rate, "p50_ms": 9.0}, {"proxy": 60.0, "redis": 70.0, "wrk": 9.0}) for rate in (5e3, 6e3)]
    cases = [CaseResults(case, {"starlette": [bare, bare], "distributed": ours})]
    scenario = ScenarioResults("noop-http", "No-op <over> HTTP", "per_second", "starlette", claims, cases, {"ray": "it did not start"})
    return Results("abc", 2, 1.0, Machine("Debian", "6.1", "a CPU", 2, 8.0), {"python": "3.11"}, [scenario])


def test_a_claim_is_held_to_the_median_of_the_rounds() -> None:
    scenario = sample_results().scenarios[0]
    came = [standing(scenario, claim) for claim in scenario.claims]
    assert came == [spread([0.5, 0.6]), spread([130.0, 130.0]), None]
    assert [holds(claim, told.median) for claim, told in zip(scenario.claims, came, strict=True) if told] == [True, False]


def test_the_table_has_ratios_first_and_cpu_by_process_without_counting_the_load() -> None:
    text = markdown(sample_results())
    assert "| case | subject | requests/s, of starlette | requests/s | p50 ms | CPU µs per request | of which |" in text
    assert "| async, 64 clients | distributed | 0.55 (0.5–0.6) | 5,500 (5,000–6,000) | 9 | 130 | redis 70, proxy 60, wrk 9 |" in text
    assert "ray was not measured: it did not start" in text
    assert re.findall(r"\| (yes|\*\*no\*\*|not measured) \|$", text, re.MULTILINE) == ["yes", "**no**", "not measured"]


def test_the_picture_is_well_formed_and_has_a_bar_for_each_subject() -> None:
    picture = ElementTree.fromstring(svg(sample_results()))
    bars = picture.findall("{http://www.w3.org/2000/svg}rect")
    assert [bar.get("class") for bar in bars] == ["peer", "ours"]
    assert all(0 < float(bar.get("width", "")) < 720 for bar in bars)
    assert "prefers-color-scheme: dark" in svg(sample_results())


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write(sample_results(), path)
    assert results.read(path) == sample_results()


def test_the_page_says_what_the_results_say() -> None:
    told = results.read()
    assert page.PAGE.read_text() == page.with_block(page.PAGE.read_text(), page.block(told)), "python -m benchmarks.page writes it"
    assert page.PICTURE.read_text() == svg(told), "python -m benchmarks.page draws it"


def test_the_results_are_of_a_whole_run_of_what_is_committed() -> None:
    told = results.read()
    assert [scenario.name for scenario in told.scenarios] == [scenario.name for scenario in SCENARIOS]
    assert told.rounds >= 5 and not told.revision.endswith("+")


def test_the_results_name_no_folder_of_the_machine() -> None:
    assert not re.search(r"/(home|root|work|tmp|Users)/", results.LATEST.read_text())


def test_no_two_scenarios_have_one_name_and_claims_name_cases_that_there_are() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    assert {claim.case for scenario in SCENARIOS for claim in scenario.claims if claim.case not in scenario.cases} == set()


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_pinned_and_has_its_program(name: str) -> None:
    peer = PEERS[name]
    lines = (FOLDER / peer.folder / "requirements.txt").read_text().splitlines()
    assert lines and all(re.fullmatch(r"[\w.\[\]-]+==\S+", line) for line in lines)
    assert set(peer.requirements()) == set(peer.packages)
    assert (FOLDER / peer.folder / "server.py").exists()
