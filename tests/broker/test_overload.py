"""What a process may hold, and when it tells those it refuses to come back."""

import time

import pytest

from mqserve.broker.errors import Overloaded
from mqserve.broker.overload import MIN_RETRY_S, HeldBytes, Pace


def test_what_is_held_is_bounded() -> None:
    held = HeldBytes(100)
    held.take(60)
    held.take(40)
    with pytest.raises(Overloaded):
        held.take(1)
    held.give(60)
    held.take(60)


def test_a_single_body_always_fits() -> None:
    held = HeldBytes(100)
    held.take(1000)
    with pytest.raises(Overloaded):
        held.take(1)


def test_what_is_refused_is_not_held() -> None:
    held = HeldBytes(100)
    held.take(100)
    with pytest.raises(Overloaded):
        held.take(50)
    assert held.held == 100


def answered(pace: Pace, latency_s: float, times: int = 1) -> None:
    for _ in range(times):
        now = time.monotonic()
        pace.sent(now - latency_s)
        pace.ended(now - latency_s, now, answered=True)


def test_a_refused_request_comes_back_when_one_like_it_would_have_passed_the_queue() -> None:
    pace = Pace()
    answered(pace, 20, times=50)
    assert all(15 <= pace.retry_after_s(60) <= 25 for _ in range(100))


def test_those_refused_together_do_not_come_back_together() -> None:
    pace = Pace()
    answered(pace, 20)
    assert len({pace.retry_after_s(60) for _ in range(100)}) > 50


def test_a_backend_that_nobody_knows_anything_of_is_tried_again_soon() -> None:
    assert MIN_RETRY_S <= Pace().retry_after_s(60) <= 2


def test_where_nothing_moves_it_is_as_long_again_as_nothing_has_moved() -> None:
    pace = Pace()
    pace.sent(time.monotonic() - 30)
    assert 22 <= pace.retry_after_s(60) <= 38


def test_nobody_is_told_to_wait_longer_than_a_request_may_take() -> None:
    pace = Pace()
    answered(pace, 500)
    assert pace.retry_after_s(60) <= 75


def test_an_idle_hour_counts_for_nothing() -> None:
    pace = Pace()
    pace.sent(time.monotonic() - 3600)
    pace.ended(time.monotonic() - 3600, time.monotonic() - 3599, answered=True)
    pace.sent(time.monotonic())
    assert pace.retry_after_s(60) <= 2
