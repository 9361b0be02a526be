"""Store time as it is written for people and other programs."""

import pytest

from mqserve.broker.times import rfc3339


@pytest.mark.parametrize(
    ("store_ms", "written"),
    [
        (0, None),
        (1, "1970-01-01T00:00:00.001Z"),
        (1_795_949_606_802, "2026-11-29T10:53:26.802Z"),
        (253_402_300_799_000, "9999-12-31T23:59:59.000Z"),
        (2**62, "9999-12-31T23:59:59.000Z"),
    ],
)
def test_a_time_is_written_with_its_milliseconds_and_never_behind_the_last_year(store_ms: int, written: str | None) -> None:
    assert rfc3339(store_ms) == written
