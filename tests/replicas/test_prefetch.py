"""How many deliveries a replica holds: what can run, and a little more where calls are short."""

import pytest

from mqserve.replicas.prefetch import LOOKAHEAD_S, SLOW_CALL_S, must_give_back, prefetch, slots


@pytest.mark.parametrize(
    ("limit", "is_async", "sync_threads", "batch_size", "wanted"),
    [
        (100, True, 1, 0, 100),  # async calls all run at once
        (100, False, 1, 0, 1),  # a plain call runs alone
        (100, False, 4, 0, 4),  # but for the threads there are
        (2, False, 4, 0, 2),  # and never more than the limit
        (100, False, 1, 8, 16),  # a batch gathers while another runs
        (100, False, 2, 8, 32),  # for each thread
        (10, False, 2, 8, 10),
        (100, True, 1, 8, 16),
    ],
)
def test_slots_are_what_can_run_or_gather_at_once(limit: int, is_async: bool, sync_threads: int, batch_size: int, wanted: int) -> None:
    assert slots(limit, is_async=is_async, sync_threads=sync_threads, batch_size=batch_size) == wanted


def test_as_long_as_no_run_was_measured_nothing_waits_behind_another() -> None:
    assert prefetch(1, 100, 0.0) == 1


def test_calls_longer_than_the_look_ahead_have_nothing_waiting_behind_them() -> None:
    assert prefetch(1, 100, LOOKAHEAD_S * 1.01) == 1


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("run_s", [0.000_01, 0.000_1, 0.000_3, 0.001, 0.002])
def test_what_is_held_beyond_the_slots_is_a_power_of_two_that_runs_in_the_look_ahead(slots: int, run_s: float) -> None:
    ahead = prefetch(slots, 10_000, run_s) - slots
    assert ahead > 0 and ahead & (ahead - 1) == 0
    assert ahead * run_s / slots <= LOOKAHEAD_S < 2 * (ahead + slots) * run_s / slots


def test_a_noisy_measurement_does_not_change_it_at_each_call() -> None:
    """Each change costs a consumer."""
    assert len({prefetch(1, 10_000, 0.000_1 * noise) for noise in (0.8, 0.9, 1.0, 1.1, 1.2)}) == 1


def test_the_limit_is_never_passed() -> None:
    assert prefetch(1, 5, 0.000_01) == 5
    assert prefetch(5, 5, 0.000_01) == 5


def test_who_may_not_look_ahead_holds_what_can_run() -> None:
    assert prefetch(1, 100, 0.000_1, may_look_ahead=False) == 1


@pytest.mark.parametrize(
    ("waiting", "least", "prefetch", "blocked_s", "goes_back"),
    [
        (0, 1, 64, 1.0, False),  # nothing waits
        (1, 1, 64, SLOW_CALL_S * 0.9, False),  # the call is quick so far
        (1, 1, 64, SLOW_CALL_S * 1.1, True),  # one waits behind a slow call
        (1, 1, 1, 0.0, False),  # one has just come
        (2, 1, 1, 0.0, True),  # calls have become longer than the look-ahead
        (2, 1, 2, 0.0, False),
        (4, 4, 4, 0.0, False),
        (3, 4, 4, 0.0, False),  # one slot and four queues: a new consumer would fetch them again
        (5, 4, 4, 0.0, True),
    ],
)
def test_what_waits_goes_back_when_a_call_is_slow(waiting: int, least: int, prefetch: int, blocked_s: float, goes_back: bool) -> None:
    assert must_give_back(waiting, least, prefetch, blocked_s) is goes_back
