"""The soak finds what it is there to find: in its ledger and in the logs."""

import random
from dataclasses import replace

import msgspec
import pytest

from mqserve.broker.jobs import JobFacts, JobRecord, JobState
from mqserve.broker.results import Result
from tests.faults.soak.backends import FIRINGS_FROM
from tests.faults.soak.chaos import KINDS, plan
from tests.faults.soak.jobs import Kept, compare, enter_firings
from tests.faults.soak.leaks import in_logs
from tests.faults.soak.ledger import End, Entry, Fault, Ledger, judge, runs_of

ANSWERED = Entry(7, "get", "quick", sent=100.0, proxy="a", end=End.ANSWERED, ended=100.1, words={"w"})
RUNS = {7: ["w"]}
RESTART = Fault("restart the broker", allows=frozenset({"503", "504"}), began=90.0, mended=98.0, recovered=99.0)


def test_an_answered_request_that_ran_once_is_fine() -> None:
    assert judge([ANSWERED], [], RUNS) == []


def test_a_failure_is_fine_only_while_something_is_broken_that_allows_it() -> None:
    failed = replace(ANSWERED, end=End.FAILED, detail="503", words=set(), sent=95.0, ended=98.0)
    assert judge([failed], [RESTART], {}) == []
    assert judge([replace(failed, detail="502")], [RESTART], {})
    assert judge([replace(failed, sent=99.1, ended=99.2)], [RESTART], {})
    assert judge([failed], [], {})


def test_what_was_lost_with_the_broken_server_may_end_later() -> None:
    assert judge([replace(ANSWERED, end=End.EXPIRED, detail="504", words=set(), sent=91.0, ended=106.0)], [RESTART], {}) == []


def test_a_dead_proxy_excuses_only_its_own_requests() -> None:
    killed = Fault("kill a proxy", proxy="a", allows=frozenset({"refused"}), began=99.0, recovered=101.0)
    refused = replace(ANSWERED, end=End.FAILED, detail="refused", words=set())
    assert judge([refused], [killed], {}) == []
    assert judge([replace(refused, proxy="b")], [killed], {})


def test_a_proxy_that_drains_must_answer_what_it_had() -> None:
    ended = Fault("end a proxy", proxy="a", allows=frozenset({"reset"}), drains=True, began=100.0, recovered=103.0)
    reset = replace(ANSWERED, end=End.FAILED, detail="reset", words=set(), ended=100.5)
    assert judge([reset], [ended], {}) == []
    assert judge([replace(reset, sent=99.0)], [ended], {})


def test_a_session_ends_with_a_code_that_its_fault_allows_to_sessions() -> None:
    ended = Fault(
        "end a proxy", proxy="a", allows=frozenset({"reset"}), sessions=frozenset({"1001"}), drains=True, began=100.0, recovered=103.0
    )
    session = replace(ANSWERED, kind="talk", end=End.FAILED, detail="1001", words=set(), sent=98.0, ended=100.1)
    assert judge([session], [ended], {}) == []
    assert judge([replace(session, detail="1012")], [ended], {})
    assert judge([replace(session, detail="reset")], [ended], {})
    assert judge([replace(session, kind="get")], [ended], {})


@pytest.mark.parametrize(
    ("entry", "runs"),
    [
        (replace(ANSWERED, end=None), RUNS),
        (replace(ANSWERED, end=End.HANGING), RUNS),
        (replace(ANSWERED, end=End.LOST), RUNS),
        (replace(ANSWERED, words={"w", "v"}), {7: ["w", "v"]}),
        (replace(ANSWERED, words={"v"}), RUNS),
        (ANSWERED, {7: ["w", "v"]}),
        (ANSWERED, {}),
        (replace(ANSWERED, end=End.USER_ERROR), RUNS),
    ],
    ids=["open", "hanging", "lost", "two answers", "foreign answer", "two runs", "no run", "error of another"],
)
def test_what_must_not_happen_is_found(entry: Entry, runs: dict[int, list[str]]) -> None:
    assert judge([entry], [], runs)


def test_a_second_end_is_a_finding() -> None:
    ledger = Ledger()
    entry = ledger.send(Entry(1, "get", "quick", 1.0))
    ledger.end(entry, End.ANSWERED, 2.0)
    ledger.end(entry, End.FAILED, 3.0, "503")
    assert entry.end is End.ANSWERED and len(ledger.findings) == 1


def test_runs_are_read_by_number() -> None:
    assert runs_of(["7 100 w", "8 100 x", "7 101 v"]) == {7: ["w", "v"], 8: ["x"]}


def kept(state: JobState, number: int = 0) -> Kept:
    """A firing's job, in the store."""
    return Kept(
        JobRecord("j", JobFacts("ticking", tag="each-second"), state),
        Result(body=msgspec.json.encode({"number": number}), content_type="application/json"),
    )


def test_the_record_of_a_job_says_how_it_ended_for_its_sender() -> None:
    job = replace(ANSWERED, kind="job", key="j")
    assert compare([job], {"j": kept(JobState.SUCCEEDED)}, []) == []
    assert compare([job], {"j": kept(JobState.FAILED)}, [])
    assert compare([job], {}, [])
    assert compare([job], {}, [replace(RESTART, forgets=True, mended=101.0)]) == []


def test_each_second_has_a_firing_with_one_result() -> None:
    first = FIRINGS_FROM
    runs = {number: ["w"] for number in range(first, first + 3)}
    jobs = {f"{number}": kept(JobState.SUCCEEDED, number) for number in runs}
    ledger = Ledger()
    assert enter_firings(ledger, runs, jobs, []) == []
    assert judge(ledger.entries.values(), [], runs) == []
    assert enter_firings(Ledger(), runs, {**jobs, "again": kept(JobState.SUCCEEDED, first)}, [])
    assert enter_firings(Ledger(), runs, {}, []) and enter_firings(Ledger(), {}, {}, [])


def test_a_second_without_a_firing_is_lost() -> None:
    runs = {FIRINGS_FROM: ["w"], FIRINGS_FROM + 2: ["v"]}
    ledger = Ledger()
    enter_firings(ledger, runs, {}, [])
    (found,) = judge(ledger.entries.values(), [], runs)
    assert "lost" in found


def test_a_log_may_hold_the_handlers_tracebacks_and_no_others() -> None:
    traceback = (
        '10:00:00 [7] ERROR x: request failed\n    Traceback (most recent call last):\n      File "a.py", line 1, in f\n        g()\n'
    )
    assert in_logs([("node", traceback + "    tests.faults.soak.backends.Refused: 7 w\n10:00:01 [7] WARNING y: later\n")]) == []
    (found,) = in_logs([("node", traceback + "    KeyError: 'x'\n10:00:01 [7] WARNING y: later\n")])
    assert found.startswith("node:     Traceback") and found.endswith("KeyError: 'x'")
    assert in_logs([("node", "10:00:00 [7] ERROR asyncio: Task was destroyed but it is pending!\n")])


def test_the_same_seed_breaks_the_same_things_and_each_kind_before_any_again() -> None:
    first, again = (plan(random.Random(7), len(KINDS), 300, list(KINDS)) for _ in range(2))
    assert first == again
    assert {due.kind for due in first} == set(KINDS)
    assert [due.at_s for due in first] == sorted(due.at_s for due in first) and first[-1].at_s < 300
