"""What a process makes of its store's answers: away, or there and taking no writes; and for how long it believes it."""

import math
import time
from types import SimpleNamespace

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from mqserve.broker.redis.health import NOTED_FOR_S, RECONNECT_S, REFUSED_FOR_S, StoreHealth

PIPELINED = "Command # 1 (SET mqserve:n:start:{MISCONF} x) of pipeline caused error: ('NOREPLICAS Not enough good replicas to write.',)"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, strftime=time.strftime)
    monkeypatch.setattr("mqserve.broker.redis.health.time", fake)
    return clock


@pytest.fixture
def health(clock: SimpleNamespace) -> StoreHealth:
    health = StoreHealth()
    health.wrote()
    return health


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'.", status_code="OOM"), "it is full"),
        (ReadOnlyError("You can't write against a read only replica.", status_code="READONLY"), "it is a read-only copy"),
        (ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), "it cannot save to its disk"),
        (ResponseError("NOREPLICAS Not enough good replicas to write. script: 0a, on @user_script:1."), "it misses replicas of its own"),
        (ResponseError(PIPELINED), "it misses replicas of its own"),
        (NoPermissionError("this user has no permissions", status_code="NOPERM"), "it does not let this process write"),
        (ResponseError("ERR The user executing the script can't run this command"), "it does not let this process write"),
    ],
)
def test_a_write_that_is_refused_says_why_though_the_server_answers(health: StoreHealth, error: Exception, words: str) -> None:
    health.failed(error, since=1000.0, writing=True)
    assert (health.refusal, health.trouble, health.connected) == (words, words, True)
    health.answered()
    assert health.refusal == words, "a read says nothing of writes"
    health.wrote()
    assert (health.refusal, health.trouble) == ("", "")


def test_a_write_of_another_process_that_was_taken_ends_the_refusal(health: StoreHealth) -> None:
    health.failed(OutOfMemoryError("", status_code="OOM"), since=1000.0, writing=True)
    assert health.refused_since == 1000.0
    health.took_a_write()
    assert (health.trouble, health.refused_since) == ("", math.inf)


def test_refusals_are_told_from_the_first_one_on(health: StoreHealth, clock: SimpleNamespace) -> None:
    assert health.refused_since == math.inf
    for _ in range(3):
        health.failed(OutOfMemoryError("", status_code="OOM"), since=1000.0, writing=True)
        clock.now += 1
    assert health.refused_since == 1000.0
    health.wrote()
    assert health.refused_since == math.inf


def test_a_refusal_of_long_ago_is_not_believed(health: StoreHealth, clock: SimpleNamespace) -> None:
    health.failed(OutOfMemoryError("", status_code="OOM"), since=1000.0, writing=True)
    clock.now += REFUSED_FOR_S - 0.1
    assert health.trouble == "it is full"
    clock.now += 0.2
    assert health.trouble == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "it does not answer"),
        (BusyLoadingError("Redis is loading the dataset in memory", status_code="LOADING"), "it loads its data"),
        (AuthenticationError("invalid username-password pair", status_code="WRONGPASS"), "it refuses this process's login or rights"),
        (NoPermissionError("this user has no permissions", status_code="NOPERM"), "it refuses this process's login or rights"),
    ],
)
def test_a_server_that_does_not_let_us_read_is_away_after_a_while(
    health: StoreHealth, clock: SimpleNamespace, error: Exception, words: str
) -> None:
    health.failed(error, since=clock.now)
    assert (health.trouble, health.refusal) == ("", ""), "a lost connection comes back in a moment"
    clock.now += RECONNECT_S + 0.1
    assert (health.trouble, health.refusal, health.connected) == (words, "", False)
    health.answered()
    assert (health.trouble, health.connected) == ("", True)


def test_a_key_of_another_type_is_no_trouble_of_the_store(health: StoreHealth, clock: SimpleNamespace) -> None:
    for _ in range(10):
        health.failed(ResponseError("WRONGTYPE mqserve:n:beats"), since=clock.now, writing=True)
        clock.now += 1
    assert (health.trouble, health.connected) == ("", True)


def test_a_key_is_noted_once_and_for_a_while(health: StoreHealth, clock: SimpleNamespace) -> None:
    assert [health.note("mqserve:n:a"), health.note("mqserve:n:b"), health.note("mqserve:n:a")] == [True, True, False]
    assert "mqserve:n:a was of another type" in health.noted and "redis-cli DEL mqserve:n:b" in health.noted
    clock.now += NOTED_FOR_S + 1
    assert health.noted == "" and health.note("mqserve:n:a")


def test_a_store_that_never_answered_is_away() -> None:
    assert StoreHealth().connected is False and StoreHealth().written_at == -math.inf
