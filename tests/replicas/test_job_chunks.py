"""What is told of the parts of an answer, before it is there as a whole."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mqserve.broker.jobs import KEPT_EVENTS, EventKind, JobEvent
from mqserve.replicas.asgi_responses import is_text
from mqserve.replicas.job_chunks import EVENT_BYTES, EVENTS_AT_ONCE, TOLD_BYTES, JobChunks
from mqserve.replicas.job_words import JobWords


def told(chunks: JobChunks, *, is_last: bool = True) -> list[str | bytes]:
    """The chunks, and "cut" where they are cut."""
    events = list(chunks.take(5, is_last=is_last))
    return ["cut" if event.cut else event.text or event.data for event in events]


def test_what_was_yielded_since_the_last_time_comes_joined() -> None:
    chunks = JobChunks()
    for part in (b"one ", b"two ", b"three"):
        chunks.put(part, is_text=True)
    assert list(chunks.take(5)) == [JobEvent(EventKind.CHUNK, 5, text="one two three")]
    assert not chunks and told(chunks) == []


def test_each_chunk_says_how_much_was_told_before() -> None:
    chunks = JobChunks()
    offsets = []
    for part in ("caf\u00e9", "noir", b"\x00"):
        chunks.put_value(part)
        offsets += [event.offset for event in chunks.take(5, is_last=True)]
    assert offsets == [0, 5, 9]


def test_a_character_may_come_in_two_parts() -> None:
    chunks, seen = JobChunks(), ""
    for number, byte in enumerate("caf\u00e9 \u20ac".encode()):
        chunks.put(bytes([byte]), is_text=True)
        seen += "".join(event.text for event in chunks.take(number * 1000))
    assert seen == "caf\u00e9 \u20ac"


@pytest.mark.parametrize("parts", [(b"caf\xe9 noir",), (b"caf\xc3", b"\xa9", b" noir\xc3"), (b"\xff", b"ok"), (b"one ", b"caf\xe9")])
def test_text_that_is_no_utf_8_is_told_as_the_bytes_that_it_is(parts: tuple[bytes, ...]) -> None:
    chunks, seen = JobChunks(), b""
    for number, part in enumerate((*parts, b"")):
        chunks.put(part, is_text=True)
        for event in chunks.take(number * 1000, is_last=not part):
            assert event.offset == len(seen)
            seen += event.text.encode() + event.data
    assert seen == b"".join(parts) and not chunks


def test_text_whose_last_character_is_cut_keeps_its_place_before_bytes() -> None:
    chunks = JobChunks()
    chunks.put(b"caf\xc3", is_text=True)
    chunks.put(b"\x00", is_text=False)
    assert told(chunks, is_last=False) == ["caf", b"\xc3", b"\x00"]


def test_text_and_bytes_keep_their_order() -> None:
    chunks = JobChunks()
    for value in ("text", b"\xff", bytearray(b"\x00"), "more", {"a": 1}):
        chunks.put_value(value)
    assert told(chunks) == ["text", b"\xff\x00", 'more{"a":1}\n']


def test_much_at_once_is_several_events() -> None:
    chunks = JobChunks()
    chunks.put(b"x" * (2 * EVENT_BYTES + 1), is_text=False)
    assert [len(data) for data in told(chunks)] == [EVENT_BYTES, EVENT_BYTES, 1]


@pytest.mark.parametrize("attempt", [1, 3])
def test_beyond_the_limit_it_says_once_that_the_rest_is_in_the_result(attempt: int) -> None:
    chunks = JobChunks(attempt)
    limit = TOLD_BYTES // 2 ** (attempt - 1)
    chunks.put(b"x" * limit, is_text=False)
    chunks.put(b"y", is_text=False)
    chunks.put(b"", is_text=False)
    *seen, cut = told(chunks)
    assert b"".join(bytes(data) for data in seen) == b"x" * limit and cut == "cut"  # type: ignore[arg-type]
    chunks.put(b"z", is_text=False)
    assert not chunks and told(chunks) == []


def test_text_and_bytes_by_turns_are_cut_rather_than_a_flood() -> None:
    chunks = JobChunks()
    for _ in range(1000):
        chunks.put_value("t")
        chunks.put_value(b"b")
    assert told(chunks) == ["t", b"b"] * (EVENTS_AT_ONCE // 2) + ["cut"]
    chunks.put_value("t")
    assert not chunks and told(chunks) == []


def test_nothing_follows_the_cut_also_if_the_handler_goes_on_meanwhile() -> None:
    for _ in range(20):
        chunks, is_over = JobChunks(), threading.Event()

        def write(chunks: JobChunks = chunks, is_over: threading.Event = is_over) -> None:
            while not is_over.is_set():
                chunks.put_value("t")
                chunks.put_value(b"b")

        seen: list[JobEvent] = []
        give_up_at = time.monotonic() + 20
        with ThreadPoolExecutor(1) as threads:
            writing = threads.submit(write)
            while not any(event.cut for event in seen) and time.monotonic() < give_up_at:
                seen += chunks.take(0, is_last=True)
            for _ in range(100):
                seen += chunks.take(0, is_last=True)
            is_over.set()
            writing.result(20)
        assert [event.cut for event in seen].index(True) == len(seen) - 1
        assert [event.offset for event in seen] == list(range(len(seen)))


class Array:
    def tolist(self) -> Any:
        raise AssertionError("code of the user runs")


class Bytes(bytes):
    def __bytes__(self) -> bytes:
        raise AssertionError("code of the user runs")


class Proxy:
    __class__ = str  # type: ignore[assignment]


def test_what_follows_the_cut_is_not_even_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[object] = []
    monkeypatch.setattr("mqserve.replicas.job_chunks.encode_item", encoded.append)
    chunks = JobChunks()
    chunks.put_value(object())
    chunks.put_value("later")
    assert told(chunks) == ["cut"]
    chunks.put_value("after it was told")
    assert not encoded


@pytest.mark.parametrize(
    "value",
    [
        object(), Array(), Bytes(b"b"), Proxy(), "\ud800", {"text": "\ud800"}, {"raw": b"\xff"}, ("a tuple",), [[]] * TOLD_BYTES,
        [["x" * TOLD_BYTES]], bytearray(TOLD_BYTES + 1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_that_is_no_plain_data_cuts_the_chunks(value: Any) -> None:
    chunks = JobChunks()
    chunks.put_value("first")
    chunks.put_value(value)
    chunks.put_value("last")
    assert told(chunks) == ["first", "cut"]


def test_they_are_taken_less_often_the_more_there_are() -> None:
    """So that ten minutes of text are among the latest events that are kept."""
    chunks, events = JobChunks(), 0
    for now_ms in range(0, 600_000, 50):
        chunks.put(b"x", is_text=True)
        events += len(list(chunks.take(now_ms)))
        if now_ms == 10_000:
            assert events > 90
    assert events < KEPT_EVENTS


def test_what_was_yielded_is_told_before_what_was_said_at_the_same_time() -> None:
    words = JobWords()
    words.progress(0.5, "half")
    words.log("a line")
    words.chunks = JobChunks()
    words.chunks.put(b"one", is_text=True)
    assert words
    assert [event.kind for event in words.take(5)] == [EventKind.CHUNK, EventKind.LOG, EventKind.PROGRESS]
    assert not words


@pytest.mark.parametrize(
    ("headers", "is_utf_8"),
    [
        ({"content-type": "text/plain"}, True),
        ({"content-type": "text/event-stream; charset=utf-8"}, True),
        ({"content-type": 'Application/JSON; charset="UTF-8"'}, True),
        ({"content-type": "application/problem+json", "content-encoding": "identity"}, True),
        ({"content-type": "text/csv; charset=iso-8859-1"}, False),
        ({"content-type": "text/plain", "content-encoding": "gzip"}, False),
        ({"content-type": "image/png"}, False),
        ({}, False),
    ],
)
def test_the_head_of_a_response_says_whether_its_parts_are_text(headers: dict[str, str], is_utf_8: bool) -> None:
    assert is_text(headers) is is_utf_8
