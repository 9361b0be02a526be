"""What a handler may say of its job, and what is made of it."""

import math
import pickle
from typing import Any

import pytest

import mqserve as serve
from mqserve.broker.jobs import EventKind
from mqserve.replicas.job_words import LOGS_A_SECOND, JobWords


def test_the_last_progress_is_told_behind_the_lines() -> None:
    words = JobWords()
    words.progress(0.1, "first")
    words.log("a line")
    words.progress(0.9, "last")
    assert [(event.kind, event.fraction, event.text) for event in words.take(5)] == [
        (EventKind.LOG, None, "a line"),
        (EventKind.PROGRESS, 0.9, "last"),
    ]
    assert not words and list(words.take(6)) == []


def test_of_a_flood_of_lines_the_first_ones_are_told() -> None:
    words = JobWords()
    for number in range(1000):
        words.log(str(number))
    assert LOGS_A_SECOND <= len(list(words.take(5))) <= 3 * LOGS_A_SECOND


@pytest.mark.parametrize("fraction", ["half", None, True, 1j])
def test_progress_is_a_number(fraction: Any) -> None:
    with pytest.raises(serve.BadType):
        serve.progress(fraction)


def test_a_number_that_is_none_is_refused_and_one_outside_is_taken_for_the_nearest() -> None:
    with pytest.raises(serve.BadValue):
        serve.progress(math.nan)
    serve.progress(1.0000001)


@pytest.mark.parametrize("text", [None, 3, b"bytes"])
def test_what_is_told_is_text(text: Any) -> None:
    with pytest.raises(serve.BadType):
        serve.log(text)
    with pytest.raises(serve.BadType):
        serve.progress(0.5, text)


@pytest.mark.parametrize("after_s", [-1, math.inf, math.nan, 10**9])
def test_a_handler_comes_back_within_a_week(after_s: float) -> None:
    with pytest.raises(serve.BadValue):
        serve.RetryLater(after_s)


def test_the_wish_to_be_called_later_pickles() -> None:
    again = pickle.loads(pickle.dumps(serve.RetryLater(2, "the disk is full")))
    assert isinstance(again, serve.RetryLater) and (again.after_s, str(again)) == (2, "the disk is full")
