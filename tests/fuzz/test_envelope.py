"""The envelope: whatever the broker delivers is an Envelope or BadEnvelope, and whatever is sent fits its frame."""

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import frame
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from mqserve.broker.dead_letters import Death, dead_letter_to_amqp
from mqserve.broker.envelope import NO_HEADER, Envelope, Header, RequestHead
from mqserve.broker.errors import BadEnvelope, TooLarge
from mqserve.broker.rabbitmq import unreadable
from mqserve.broker.rabbitmq.own_properties import read_ours
from mqserve.broker.values.header_seals import HeaderSeals
from tests.fuzz.material import any_text, anything, bytes_like, cases, good_text, plain

FRAME_BYTES = 128 * 1024
VALID_HEADER = msgspec.msgpack.encode(
    Header(origin="http", inbox="mqserve:ns:inbox:p", deadline=1, meta=RequestHead("POST", "/a", params=(("a", "int", "1"),)))
)
VALID = Envelope("order-17", b"", "application/json", Header(origin="handle"), "replies", "question 7", 3, 1000, True).to_amqp()

short = st.text(st.characters(codec="utf-8"), max_size=63)  # 255 bytes at most
metas = st.builds(
    RequestHead,
    path=good_text,
    query=st.binary(max_size=40),
    headers=st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=4).map(tuple),
    params=st.lists(st.tuples(good_text, good_text, good_text), max_size=3).map(tuple),
    call=good_text,
    client=st.none() | st.tuples(good_text, st.integers(0, 65535)),
)
headers = st.builds(
    Header, origin=st.sampled_from(["", "http", "handle"]), inbox=good_text, deadline=st.integers(0, 2**62), ref=good_text, meta=metas
)
envelopes = st.builds(
    Envelope,
    id=short,
    body=st.just(b""),
    content_type=st.text(st.characters(codec="utf-8"), min_size=1, max_size=63),
    header=headers,
    reply_to=short,
    correlation_id=short,
    priority=st.integers(0, 255),
    expiration_ms=st.integers(0, 2**63),
    persistent=st.booleans(),
)


@pytest.fixture(scope="module", autouse=True)
def as_on_a_connection() -> None:
    """Each connection of ours has pamqp read what it by itself cannot."""
    unreadable.install()


def delivered(properties: bytes) -> ContentHeader:
    """As a connection reads them from the broker."""
    payload = struct.pack(">HHQ", 60, 0, 5) + properties
    _, _, header = frame.unmarshal(struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce")
    assert isinstance(header, ContentHeader)
    return header


def accept(properties: bytes) -> Envelope | None:
    """The envelope, or None where it is refused; and it can be set aside, whatever it is."""
    header = delivered(properties)
    assert header.body_size == 5 and header.properties is not None
    dead = dead_letter_to_amqp("b", header.properties, Death("a sentence"))
    assert len(dead) < FRAME_BYTES and (delivered(dead).properties.headers or {})["mq-reason"] == "a sentence"
    try:
        return Envelope.from_amqp(delivered(properties).properties, b"12345")
    except BadEnvelope as refused:
        assert str(refused)
        return None


def with_header(mq: Any) -> bytes:
    return ContentHeader(0, 0, Basic.Properties(headers={"mq": mq})).marshal()[12:]


@pytest.mark.parametrize("properties", cases("properties"))
def test_properties_that_did_harm_are_refused(properties: bytes) -> None:
    assert accept(properties) is None


@pytest.mark.parametrize("properties", cases("odd-properties"))
def test_properties_that_are_only_odd_are_served(properties: bytes) -> None:
    assert accept(properties) is not None


@pytest.mark.parametrize("mq", cases("mq"))
def test_mq_headers_that_did_harm_are_refused(mq: bytes) -> None:
    assert accept(with_header(bytearray(mq))) is None


@given(bytes_like(VALID))
def test_properties_of_any_bytes_are_an_envelope_or_refused(properties: bytes) -> None:
    accept(properties)


OURS = Envelope("a" * 32, b"", "application/json", Header(origin="http", deadline=2**41), expiration_ms=60_000).to_amqp(
    "proxy", HeaderSeals([b"k" * 32], "ns").of("b")
)


@given(bytes_like(OURS) | bytes_like(OURS[:-7]))
def test_what_is_read_by_hand_is_what_pamqp_reads(properties: bytes) -> None:
    payload = struct.pack(">HHQ", 60, 0, 5) + properties
    found = read_ours(payload)
    if found is not None:
        header = ContentHeader()
        header.unmarshal(payload)
        fields = [*Basic.Properties.__slots__]
        assert (found.class_id, found.weight, found.body_size) == (header.class_id, header.weight, header.body_size)
        assert [getattr(found.properties, name) for name in fields] == [getattr(header.properties, name) for name in fields]


@given(envelopes, st.sampled_from(["", "proxy"]), st.booleans())
def test_what_a_caller_of_ours_sends_is_read_by_hand_and_as_pamqp_reads_it(envelope: Envelope, user: str, is_sealed: bool) -> None:
    sent = msgspec.structs.replace(envelope, id="a" * 32, reply_to="", correlation_id="", priority=0, expiration_ms=5)
    packed = sent.to_amqp(user, HeaderSeals([b"k" * 32], "ns").of("b") if is_sealed else None)
    found = read_ours(struct.pack(">HHQ", 60, 0, 5) + packed)
    header = ContentHeader()
    header.unmarshal(struct.pack(">HHQ", 60, 0, 5) + packed)
    assert found is not None and found.properties == header.properties


@given(bytes_like(VALID_HEADER) | plain.map(msgspec.msgpack.encode))
def test_an_mq_header_of_any_bytes_is_a_header_or_refused(mq: bytes) -> None:
    accept(with_header(bytearray(mq)))


@given(st.dictionaries(st.sampled_from(Header.__struct_fields__), plain, max_size=4))
def test_an_mq_header_with_any_value_in_any_field_is_a_header_or_refused(fields: dict[str, Any]) -> None:
    envelope = accept(with_header(bytearray(msgspec.msgpack.encode(fields))))
    assert envelope is None or envelope.header.v == 1


@given(
    st.none()
    | st.booleans()
    | st.integers(-(2**31), 2**31 - 1)
    | good_text
    | st.lists(good_text, max_size=2)
    | st.dictionaries(short, good_text, max_size=2)
)
def test_an_mq_header_of_any_amqp_type_but_bytes_is_refused(mq: Any) -> None:
    assert accept(with_header(mq)) is None


@given(envelopes)
def test_every_valid_envelope_arrives_as_it_was_sent(envelope: Envelope) -> None:
    packed = envelope.to_amqp()
    assert len(packed) + 20 < FRAME_BYTES
    assert Envelope.from_amqp(delivered(packed).properties, b"") == envelope


@given(envelopes, st.sampled_from(["id", "content_type", "reply_to", "correlation_id"]), any_text, st.integers(1, 3000))
def test_a_property_that_amqp_cannot_carry_is_refused_before_it_is_sent(envelope: Envelope, field: str, text: str, times: int) -> None:
    odd = Envelope(**{**{name: getattr(envelope, name) for name in Envelope.__struct_fields__}, field: text * times})
    try:
        delivered(odd.to_amqp()).properties.message_id  # noqa: B018
    except BadEnvelope as refused:
        assert "AMQP" in str(refused)
    else:
        assert len((text * times).encode()) <= 255


@given(any_text, st.integers(0, 200_000))
def test_a_head_that_does_not_fit_a_frame_is_refused_before_it_is_sent(text: str, size: int) -> None:
    envelope = Envelope("", b"", "text/plain", Header(origin="http", meta=RequestHead(path=text, query=b"q" * size)))
    try:
        assert len(envelope.to_amqp()) + 20 < FRAME_BYTES
    except (BadEnvelope, TooLarge) as refused:
        assert str(refused)


def test_what_pamqp_can_read_is_read_as_before() -> None:
    assert type(delivered(VALID).properties) is Basic.Properties and delivered(VALID).properties.message_id == "order-17"
    assert accept(b"\x00\x00") == Envelope("", b"12345", "application/octet-stream", NO_HEADER)


@given(anything)
def test_a_header_of_pamqps_own_making_is_an_envelope_or_refused(value: Any) -> None:
    try:
        properties = with_header(value)
    except Exception:
        return  # pamqp cannot write it
    if len(properties) < FRAME_BYTES:
        accept(properties)


def test_a_message_whose_headers_fill_a_frame_is_set_aside_without_them() -> None:
    accept(with_header("x" * 130_900))
