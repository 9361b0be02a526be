"""What clients ask for beside the answer: any header is read or refused with a sentence, and quickly."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqserve.broker.errors import BadValue
from mqserve.proxy.idempotency import MAX_KEY_LENGTH, read_key
from mqserve.proxy.preferences import MAX_WAIT_S, not_before_of, read_preference, read_priority, result_ttl_of, wait_of

words = st.sampled_from([b"respond-async", b"wait", b"=", b'"', b",", b";", b" ", b"10", b"\xff", b"wait=5"])
times = st.text("0123456789-:TZ+. ,GMTWedMar", max_size=40).map(str.encode)
lines = st.lists(words | st.binary(max_size=5), max_size=12).map(b"".join)


@given(st.lists(lines, max_size=3))
def test_a_preference_is_read_or_passed_over(values: list[bytes]) -> None:
    found = read_preference([(b"prefer", value) for value in values])
    assert found is None or found.is_async or found.wait_s is not None
    assert found is None or found.wait_s is None or 0 <= found.wait_s <= MAX_WAIT_S


@given(lines | times)
def test_other_headers_are_read_or_refused(value: bytes) -> None:
    for read in (
        lambda: result_ttl_of([(b"x-result-ttl", value)]),
        lambda: not_before_of([(b"x-not-before", value)], 0),
        lambda: read_priority(value),
        lambda: wait_of(b"wait=" + value),
    ):
        try:
            read()
        except BadValue:
            continue
    try:
        assert 1 <= len(read_key([(b"idempotency-key", value)])) <= MAX_KEY_LENGTH
    except BadValue:
        pass


@pytest.mark.parametrize("value", [b"wait=" + b" " * 60_000 + b'"x"', b'"' * 60_001, b"," * 60_000, b"a;" * 30_000, b" = " * 20_000])
def test_a_long_preference_takes_no_longer_than_its_length(value: bytes) -> None:
    began = time.process_time()
    read_preference([(b"prefer", value)])
    assert time.process_time() - began < 0.5
