"""What fails again and again is logged at once, and then once in a while, with how often."""

import logging
from types import SimpleNamespace

import pytest

from mqserve.broker.process import rate_limited_log
from mqserve.broker.process.rate_limited_log import AGAIN_AFTER_S, RateLimitedLog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(rate_limited_log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_the_same_words_are_said_once_in_a_while_and_counted(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    said = RateLimitedLog(logging.getLogger("tests"))
    for _ in range(5):
        said.say("it failed")
    clock.now += AGAIN_AFTER_S
    said.say("it failed")
    assert caplog.messages == ["it failed", "it failed (4 times more in the last minute)"]


def test_other_words_and_the_first_failure_after_a_success_are_said_at_once(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    said = RateLimitedLog(logging.getLogger("tests"))
    for words in ("one", "other", "one"):
        said.say(words)
    said.over()
    said.say("one")
    assert caplog.messages == ["one", "other", "one", "one"]
