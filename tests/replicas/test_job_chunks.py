"""What is told of the parts of an answer, before it is there as a whole."""

from typing import Any

import pytest

from mqserve.broker.jobs import EventKind, JobEvent
from mqserve.replicas.job_chunks import EVENT_BYTES, TOLD_BYTES, JobChunks
from mqserve.replicas.job_words import JobWords


def told(chunks: JobChunks) -> list[tuple[str | bytes, bool]]:
    return [(event.text or event.data, event.cut) for event in chunks.take(5)]


def test_what_was_yielded_since_the_last_look_comes_joined() -> None:
    chunks = JobChunks()
    for part in (b"one ", b"two ", b"three"):
        chunks.put(part, is_text=True)
    assert list(chunks.take(5)) == [JobEvent(EventKind.CHUNK, 5, text="one two three")]
    assert not chunks and told(chunks) == []


def test_a_character_may_come_in_two_parts() -> None:
    chunks, seen = JobChunks(), ""
    for byte in "café €".encode():
        chunks.put(bytes([byte]), is_text=True)
        seen += "".join(str(text) for text, _ in told(chunks))
    assert seen == "café €"


def test_text_and_bytes_keep_their_order() -> None:
    chunks = JobChunks()
    for value in ("text", b"\xff", bytearray(b"\x00"), "more", {"a": 1}):
        chunks.put_value(value)
    assert told(chunks) == [("text", False), (b"\xff\x00", False), ('more{"a":1}\n', False)]


def test_much_at_once_is_several_events() -> None:
    chunks = JobChunks()
    chunks.put(b"x" * (2 * EVENT_BYTES + 1), is_text=False)
    assert [len(data) for data, _ in told(chunks)] == [EVENT_BYTES, EVENT_BYTES, 1]


def test_beyond_the_limit_it_says_once_that_the_rest_is_in_the_result() -> None:
    chunks = JobChunks()
    chunks.put(b"x" * TOLD_BYTES, is_text=False)
    chunks.put(b"y", is_text=False)
    chunks.put(b"z", is_text=False)
    seen = told(chunks)
    assert b"".join(bytes(data) for data, _ in seen if data) == b"x" * TOLD_BYTES  # type: ignore[arg-type]
    assert [cut for _, cut in seen][-2:] == [False, True]
    chunks.put(b"z", is_text=False)
    assert not chunks and told(chunks) == []


@pytest.mark.parametrize("value", [object(), "\ud800", {"text": "\ud800"}, lambda: None])
def test_a_value_without_json_ends_the_telling(value: Any) -> None:
    chunks = JobChunks()
    chunks.put_value("first")
    chunks.put_value(value)
    chunks.put_value("last")
    assert told(chunks) == [("first", False), (b"", True)]


def test_chunks_come_before_what_is_said_of_them() -> None:
    words = JobWords()
    words.progress(0.5, "half")
    words.log("a line")
    words.chunks.put(b"one", is_text=True)
    assert words
    assert [event.kind for event in words.take(5)] == [EventKind.CHUNK, EventKind.LOG, EventKind.PROGRESS]
    assert not words
