"""When schedules fire."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest

import mqserve as serve
from mqserve.controller.cron import LATE_MS, Cron, due, next_time, next_times
from mqserve.controller.state.documents import Schedule

BERLIN = ZoneInfo("Europe/Berlin")
HOUR_MS = 3600_000
MIDNIGHT = int(datetime(2026, 5, 1, tzinfo=UTC).timestamp() * 1000)


def berlin(text: str) -> int:
    """Store time in ms."""
    return int(datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp() * 1000)


def local(at: int | None) -> str:
    assert at is not None
    return datetime.fromtimestamp(at / 1000, BERLIN).strftime("%d %H:%M")


def test_a_schedule_goes_by_its_time_zone() -> None:
    assert Cron("0 3 * * *", "Europe/Berlin").next_after(berlin("2026-07-01")) == berlin("2026-07-01 03:00")
    assert Cron("0 3 * * *", "UTC").next_after(berlin("2026-07-01")) == berlin("2026-07-01 05:00")


def test_six_fields_begin_with_seconds() -> None:
    cron = Cron("*/20 * * * * *", "UTC")
    assert [cron.next_after(MIDNIGHT), cron.next_after(MIDNIGHT + 20_000)] == [MIDNIGHT + 20_000, MIDNIGHT + 40_000]


def test_what_is_due_in_the_hour_that_is_left_out_comes_right_behind_it() -> None:
    cron = Cron("30 2 * * *", "Europe/Berlin")
    assert local(cron.next_after(berlin("2026-03-29"))) == "29 03:00"
    assert local(cron.next_after(berlin("2026-03-29 03:00"))) == "30 02:30"


def test_what_is_due_in_the_hour_that_comes_twice_fires_once() -> None:
    cron, start = Cron("30 2 * * *", "Europe/Berlin"), berlin("2026-10-25")
    first = cron.next_after(start)
    assert first is not None and first == berlin("2026-10-25 02:30")
    for at in range(first, first + 20 * HOUR_MS, HOUR_MS // 4):
        assert local(cron.next_after(at)) == "26 02:30", "also from within the second one"


@pytest.mark.parametrize("expression", ["0 3 * * *", "0,30 2 * * *", "*/15 * * * *", "15 */2 * * *", "0 30 2 * * *", "5 2 * * 0"])
@pytest.mark.parametrize("start", [datetime(2026, 3, 27, tzinfo=BERLIN), datetime(2026, 10, 23, tzinfo=BERLIN)])
def test_back_and_forth_are_the_same_times(expression: str, start: datetime) -> None:
    cron, end = Cron(expression, "Europe/Berlin"), int((start + timedelta(days=4)).timestamp() * 1000)
    times: list[int] = []
    at = cron.next_after(int(start.timestamp() * 1000))
    while at is not None and at <= end:
        times.append(at)
        at = cron.next_after(at)
    assert times == sorted(set(times))
    for before, after in pairwise(times):
        assert cron.last_until(after - 1) == before
        assert cron.last_until(after) == after
        assert cron.next_after(after - 1) == after


@pytest.mark.parametrize(
    ("word", "expression"),
    [("@hourly", "0 * * * *"), ("@daily", "0 0 * * *"), (" @Weekly ", "0 0 * * 0"), ("@monthly", "0 0 1 * *"), ("@yearly", "0 0 1 1 *")],
)
def test_the_words_of_crontabs_are_read(word: str, expression: str) -> None:
    starts = [berlin("2026-03-28"), berlin("2026-10-24"), berlin("2026-12-31")]
    word_times = [Cron(word, "Europe/Berlin").next_after(start) for start in starts]
    assert word_times == [Cron(expression, "Europe/Berlin").next_after(start) for start in starts]


@pytest.mark.parametrize("expression", ["", "x", "* * * *", "61 * * * *", "@reboot", "* * * * * * *", "9" * 5000 + " * * * *"])
def test_what_is_no_cron_expression_is_refused(expression: str) -> None:
    with pytest.raises(serve.BadValue, match="is no cron expression"):
        Cron(expression, "UTC")


def test_what_never_fires_is_refused() -> None:
    with pytest.raises(serve.BadValue, match="30 2"):
        Cron("0 0 30 2 *", "UTC")
    with pytest.raises(serve.BadValue, match="never fires"):
        Cron("* * */20 * 1L", "UTC")


@pytest.mark.parametrize("zone", ["Europe/Nowhere", "", "../etc/passwd", "/etc/localtime", "Europe"])
def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(serve.BadValue, match="time zone"):
        Cron("* * * * *", zone)


# What is due.

SECOND = Cron("* * * * * *", "UTC")
HOURLY = Cron("0 * * * *", "UTC")


def test_each_time_that_is_a_little_late_is_due() -> None:
    assert due(SECOND, MIDNIGHT, MIDNIGHT + 3999, once=False) == [MIDNIGHT + 1000, MIDNIGHT + 2000, MIDNIGHT + 3000]
    assert due(SECOND, MIDNIGHT, MIDNIGHT + 999, once=False) == []


@pytest.mark.parametrize("once", [True, False])
def test_no_more_is_due_than_came_in_the_last_minute(once: bool) -> None:
    now = MIDNIGHT + 24 * HOUR_MS
    assert due(SECOND, MIDNIGHT, now, once=once) == [now - LATE_MS + second * 1000 for second in range(1, 61)]


def test_what_was_missed_is_skipped_or_made_up_for_once() -> None:
    now = MIDNIGHT + 5 * HOUR_MS + HOUR_MS // 2
    assert due(HOURLY, MIDNIGHT, now, once=False) == []
    assert due(HOURLY, MIDNIGHT, now, once=True) == [MIDNIGHT + 5 * HOUR_MS]
    assert due(HOURLY, MIDNIGHT + 5 * HOUR_MS, now, once=True) == [], "and only once"


def test_a_firing_that_is_late_stands_for_those_missed_before() -> None:
    assert due(HOURLY, MIDNIGHT, MIDNIGHT + 5 * HOUR_MS + 1000, once=True) == [MIDNIGHT + 5 * HOUR_MS]


def test_a_paused_schedule_has_no_next_time() -> None:
    schedule = Schedule("s", "e", "0 * * * *", "UTC", b"", "token")
    assert next_time(schedule, MIDNIGHT) == MIDNIGHT + HOUR_MS
    paused = Schedule("s", "e", "0 * * * *", "UTC", b"", "token", paused=True)
    assert next_time(paused, MIDNIGHT) is None
    assert list(next_times(paused, MIDNIGHT)) == []


def test_the_next_times_follow_each_other() -> None:
    schedule = Schedule("s", "e", "0 * * * *", "UTC", b"", "token")
    assert list(islice(next_times(schedule, MIDNIGHT), 3)) == [MIDNIGHT + hour * HOUR_MS for hour in (1, 2, 3)]
