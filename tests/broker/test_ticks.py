"""The ticks of a process: what waits from one to the next waits about a period."""

import pytest

from mqserve.broker.process import ticks


@pytest.mark.parametrize(
    ("at_s", "waits_s"),
    [
        (20.0, 1.0),
        (20.3, 0.7),
        (20.9, 0.1),
        (20.999, 1.001),  # its timer fired a little early
        (20.95, 1.05),
    ],
)
def test_a_wait_ends_at_a_tick_and_is_no_short_one(monkeypatch: pytest.MonkeyPatch, at_s: float, waits_s: float) -> None:
    monkeypatch.setattr(ticks, "_PHASE_MS", 3_000)
    monkeypatch.setattr("mqserve.broker.process.ticks.time.monotonic", lambda: at_s + 0.000_1)
    assert ticks.next_tick_s(1.0) == pytest.approx(waits_s)


def test_all_periods_meet_at_their_common_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticks, "_PHASE_MS", 0)
    monkeypatch.setattr("mqserve.broker.process.ticks.time.monotonic", lambda: 21.000_1)
    assert [ticks.next_tick_s(period_s) for period_s in (1.0, 2.0, 5.0)] == [1.0, 1.0, 4.0]
