"""What stands in the store of jobs: records, events and kept messages. Each is what was written, or it is refused."""

import string
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqserve.broker.calls.kept_messages import KeptMessage
from mqserve.broker.envelope import Envelope, Header, JobHead, RequestHead
from mqserve.broker.errors import BadEnvelope, BadSignature
from mqserve.broker.jobs import Attempt, EventKind, JobEvent, JobFacts, JobRecord, JobState, record_of, score_of
from mqserve.broker.values.signing import Signer
from tests.fuzz.material import bytes_like, good_text, plain

whole = st.integers(0, 2**62)
facts = st.builds(JobFacts, good_text, good_text, whole, whole, whole, st.integers(0, 9), good_text, good_text)
attempts = st.builds(Attempt, st.integers(0, 200), good_text, whole, whole, good_text, whole)
events = st.builds(
    JobEvent, st.sampled_from(EventKind), whole, good_text, st.none() | st.floats(0, 1), good_text, st.binary(), whole, st.booleans()
)
SIGNER, NO_SIGNER = Signer([b"k" * 32], "ns", clock=lambda: 1_000_000.0), Signer([], "ns")
HEADER = Header(origin="http", meta=RequestHead(endpoint="e"), job=JobHead(created_ms=5))
KEPT = KeptMessage.of(Envelope("id", b"body", "text/plain", HEADER, priority=3))
VALID = {
    b"facts": JobFacts("b", created_ms=5).to_bytes(),
    b"run:1": Attempt(replica="r", started_ms=5).to_bytes(),
    b"end:1": Attempt(1, ended_ms=6, error="no", again_ms=7).to_bytes(),
    b"progress": JobEvent(EventKind.PROGRESS, 6, fraction=0.5).to_bytes(),
    b"state": b"failed",
    b"status": b"500",
    b"ended": b"7",
    b"runs": b"1",
    b"token": b"\xff",
}
names = st.sampled_from(sorted(VALID)) | st.binary(max_size=8).map(lambda tail: b"run:" + tail) | st.binary(max_size=8)
values = st.sampled_from(sorted(VALID.values())).flatmap(bytes_like) | plain.map(msgspec.msgpack.encode) | st.binary(max_size=20)


def read(fields: dict[bytes, bytes]) -> JobRecord | None:
    try:
        return record_of("f", fields, has_result=False)
    except BadEnvelope as refused:
        assert "does not parse" in str(refused)
        return None


def test_the_record_that_the_others_are_like_is_read() -> None:
    record = read(VALID)
    assert record is not None and record.state is JobState.FAILED and record.attempts == (Attempt(1, "r", 5, 6, "no", 7),)


@given(st.dictionaries(names, values, max_size=8))
def test_a_record_of_any_fields_is_a_record_or_refused(fields: dict[bytes, bytes]) -> None:
    for some in (fields, VALID | fields):
        record = read(some)
        assert record is None or isinstance(record.state, JobState)


@given(facts, st.lists(st.tuples(attempts, st.none() | attempts), max_size=4), st.none() | events, st.none() | st.sampled_from(JobState))
def test_a_record_is_read_as_it_was_written(
    known: JobFacts, runs: list[tuple[Attempt, Attempt | None]], progress: JobEvent | None, state: JobState | None
) -> None:
    fields: dict[bytes, Any] = {b"facts": known.to_bytes()}
    for number, (run, end) in enumerate(runs, 1):
        fields[b"run:%d" % number] = run.to_bytes()
        if end is not None:
            fields[b"end:%d" % number] = end.to_bytes()
    if progress is not None:
        fields[b"progress"] = progress.to_bytes()
    if state is not None:
        fields[b"state"] = state.encode()
    record = read(fields)
    assert record is not None and (record.facts, record.progress) == (known, progress)
    assert [(attempt.number, attempt.replica, attempt.started_ms) for attempt in record.attempts] == [
        (number, run.replica, run.started_ms) for number, (run, _) in enumerate(runs, 1)
    ]
    assert state is None or record.state is state


@given(bytes_like(JobEvent(EventKind.LOG, 5, text="a line").to_bytes()) | plain.map(msgspec.msgpack.encode))
def test_an_event_of_any_bytes_is_an_event_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(JobEvent.from_bytes(raw).kind, EventKind)
    except BadEnvelope as refused:
        assert "an event of a job" in str(refused)


@given(events)
def test_an_event_is_read_as_it_was_written(event: JobEvent) -> None:
    assert JobEvent.from_bytes(event.to_bytes()) == event


@given(bytes_like(KEPT.sealed(SIGNER, "b", "f"), KEPT.sealed(NO_SIGNER, "b", "f")) | plain.map(msgspec.msgpack.encode), st.booleans())
def test_a_kept_message_of_any_bytes_is_the_one_that_was_kept_or_refused(raw: bytes, has_key: bool) -> None:
    try:
        message = KeptMessage.opened(raw, SIGNER if has_key else NO_SIGNER, "b", "f")
    except BadEnvelope as refused:
        assert str(refused)
    else:
        assert message == KEPT or not has_key


@pytest.mark.parametrize(("backend", "id", "namespace"), [("other", "f", "ns"), ("b", "other", "ns"), ("b", "f", "other")])
def test_a_kept_message_is_that_of_its_job_alone(backend: str, id: str, namespace: str) -> None:
    sealed = KEPT.sealed(SIGNER, "b", "f")
    with pytest.raises(BadSignature):
        KeptMessage.opened(sealed, Signer([b"k" * 32], namespace, clock=lambda: 1_000_000.0), backend, id)


@given(facts)
def test_a_place_is_a_number_that_redis_holds_exactly(known: JobFacts) -> None:
    at = min(max(known.created_ms, known.not_before_ms), 10**13 - 1)
    score = score_of(msgspec.structs.replace(known, created_ms=at, not_before_ms=0))
    assert int(float(score)) == score and set(str(score)) <= set(string.digits)
