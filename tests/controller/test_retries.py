"""Whether a job that has failed is tried again, and when: plain values."""

from typing import Any

import pytest
from pydantic import ValidationError

from mqserve.broker.errors import BadValue
from mqserve.controller.changes import parse_config
from mqserve.controller.state.config import BackendConfig
from mqserve.controller.state.retries import Retry, is_exhausted, next_pause_s

FILE_MISSING = ("FileNotFoundError", "OSError", "Exception", "BaseException", "object")


class Own(Exception): ...


def test_exceptions_are_named_by_class_or_by_name_and_travel_as_names() -> None:
    retry = Retry(on=(OSError, "httpx.ConnectError", "builtins.KeyError", Own))
    assert retry.on == ("OSError", "httpx.ConnectError", "KeyError", f"{__name__}.Own")
    config = BackendConfig(retry=retry)
    assert BackendConfig.model_validate(config.model_dump(exclude_unset=True)).retry == retry


@pytest.mark.parametrize(("on", "why"), [((int,), "int is none"), ((3,), "3 is neither"), ("OSError", "on: input should be a valid tuple")])
def test_what_names_no_exceptions_is_refused_in_one_sentence(on: Any, why: str) -> None:
    with pytest.raises(BadValue, match=why) as caught:
        Retry(on=on)
    assert str(caught.value).startswith("bad serve.Retry: on") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        (3, r"retry: give serve\.Retry\(…\), or a dict of its settings, not 3"),
        ({"on": [3]}, r"retry: bad serve\.Retry: on\.0: .* 3 is neither"),
        ({"tries": 3}, "there is no setting 'tries'; there are attempts, on"),
        ({"attempts": 0}, r"retry: bad serve\.Retry: attempts: .*, not 0"),
    ],
    ids=str,
)
def test_a_config_with_a_bad_retry_names_the_setting(setting: Any, why: str) -> None:
    with pytest.raises(BadValue, match=why):
        parse_config({"retry": setting})


def test_at_most_once_is_never_tried_again() -> None:
    with pytest.raises(ValidationError, match="retry"):
        BackendConfig(retry=Retry(), delivery="at_most_once")


@pytest.mark.parametrize(("on", "pause_s"), [("Exception", 1.0), ("OSError", 1.0), ("FileNotFoundError", 1.0), ("ValueError", None)])
def test_the_class_of_the_error_or_one_of_its_bases_is_named(on: str, pause_s: float | None) -> None:
    assert next_pause_s(Retry(on=(on,), jitter=False), FILE_MISSING, None, tries=0) == pause_s


def test_pauses_grow_up_to_the_longest_one() -> None:
    retry = Retry(attempts=10_000, backoff_s=2, factor=3, max_backoff_s=50, jitter=False)
    assert [retry.pause_s(tries) for tries in (0, 1, 2, 3, 5000)] == [2, 6, 18, 50, 50]


def test_jitter_makes_them_shorter_by_up_to_a_half() -> None:
    retry = Retry(backoff_s=8)
    assert retry.pause_s(0, lambda: 0.0) == 8 and retry.pause_s(0, lambda: 0.5) == 6
    assert 4 < retry.pause_s(0, lambda: 0.999) < 4.1


def test_there_are_so_many_attempts_in_all() -> None:
    retry = Retry(attempts=2, jitter=False)
    assert next_pause_s(retry, FILE_MISSING, None, tries=0) == 1.0
    assert next_pause_s(retry, FILE_MISSING, None, tries=1) is None
    assert (is_exhausted(retry, FILE_MISSING, None, 0), is_exhausted(retry, FILE_MISSING, None, 1)) == (False, True)


def test_without_the_setting_only_a_handler_that_asks_is_called_again() -> None:
    assert next_pause_s(None, FILE_MISSING, None, tries=0) is None
    assert next_pause_s(None, ("mqserve.RetryLater",), 7.5, tries=3) == 7.5
    assert next_pause_s(None, ("mqserve.RetryLater",), 7.5, tries=4) is None
    assert not is_exhausted(None, FILE_MISSING, None, 100)


def test_a_setting_without_a_name_is_refused() -> None:
    with pytest.raises(BadValue, match="retry: its settings have names, such as 'attempts', and 0 is none"):
        parse_config({"retry": {0: None}})
