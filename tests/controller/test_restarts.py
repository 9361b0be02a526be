"""When a dead replica may be replaced."""

from mqserve.controller.restarts import AT_ONCE_LIMIT, AT_ONCE_WINDOW_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, Restarts


def test_each_early_death_doubles_the_pause_up_to_a_limit() -> None:
    restarts = Restarts()
    pauses = []
    for _ in range(12):
        restarts.died_early(now=100.0, reason="no model")
        pauses.append(restarts.not_before - 100.0)
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert restarts.reason == "no model"


def test_a_replica_that_gets_ready_ends_the_pauses() -> None:
    restarts = Restarts()
    restarts.died_early(now=100.0, reason="no model")
    restarts.got_ready()
    assert restarts.reason == ""
    restarts.died_early(now=200.0, reason="no model")
    assert restarts.not_before == 200.0 + FIRST_PAUSE_S


def test_a_ready_replica_that_dies_is_replaced_at_once() -> None:
    restarts = Restarts()
    restarts.died_ready(now=100.0)
    assert restarts.not_before <= 100.0


def test_too_many_deaths_of_ready_replicas_are_slowed_down_with_a_reason() -> None:
    restarts = Restarts()
    for _ in range(AT_ONCE_LIMIT + 1):
        restarts.died_ready(now=100.0)
    assert restarts.not_before > 100.0 and "ready replicas died" in restarts.reason


def test_deaths_long_ago_slow_nothing_down() -> None:
    restarts = Restarts()
    for _ in range(AT_ONCE_LIMIT):
        restarts.died_ready(now=100.0)
    restarts.died_ready(now=101.0 + AT_ONCE_WINDOW_S)
    assert restarts.not_before == 0.0


def test_a_backend_that_never_gets_ready_is_tried_for_ever() -> None:
    restarts = Restarts()
    for _ in range(2000):
        restarts.died_early(now=0.0, reason="no")
    assert restarts.not_before == LONGEST_PAUSE_S


def test_early_deaths_of_one_who_lived_since_are_forgotten() -> None:
    restarts = Restarts()
    for _ in range(5):
        restarts.died(now=100.0, reason="no store", lived_s=1)
    assert restarts.not_before == 100.0 + 16 * FIRST_PAUSE_S
    restarts.died(now=10_000.0, reason="killed", lived_s=9_000)
    assert restarts.not_before < 10_000.0, "at once"
    restarts.died(now=20_000.0, reason="no store", lived_s=1)
    assert restarts.not_before == 20_000.0 + FIRST_PAUSE_S
