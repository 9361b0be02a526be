"""The seal of an `mq` header: only a holder of the key can make one, and it fits exactly one message."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from mqserve.broker.envelope import SEALED_BODY_BYTES, Envelope, Header, RequestHead, mint_id
from mqserve.broker.values.header_seals import SEAL_BYTES, HeaderSeals, Seal

OLD, NEW = b"o" * 32, b"n" * 32
SEALS = HeaderSeals([NEW], "ns")
META = RequestHead("POST", "/grüße", headers=((b"cookie", b"\xa5again\xc3"),), client=("192.0.2.1", 4711))
HEADER = Header(origin="http", inbox="mqserve:ns:inbox:p", deadline=1_700_000_000_123, meta=META)
SENT = Envelope(mint_id(), b'{"a": 1}', "application/json", HEADER)


def wire(envelope: Envelope, seals: HeaderSeals = SEALS, backend: str = "b") -> Basic.Properties:
    """The properties as pamqp reads what a sender writes."""
    header = ContentHeader()
    header.unmarshal(b"\x00\x3c" + bytes(10) + envelope.to_amqp("user", seals.of(backend)))
    assert isinstance(header.properties, Basic.Properties)
    return header.properties


def seal_of(properties: Basic.Properties, body: bytes, seals: HeaderSeals = SEALS, backend: str = "b") -> Seal:
    return Envelope.from_amqp(properties, body, seals.of(backend)).seal


def mq_of(properties: Basic.Properties) -> bytes:
    assert properties.headers is not None
    return bytes(properties.headers["mq"])  # type: ignore[arg-type]


def with_mq(properties: Basic.Properties, mq: Any) -> Basic.Properties:
    properties.headers = {**(properties.headers or {}), "mq": bytearray(mq)}
    return properties


def test_what_a_sender_writes_fits_at_the_backend_it_went_to() -> None:
    properties = wire(SENT)
    assert seal_of(properties, SENT.body) is Seal.VALID
    assert len((properties.headers or {})["mq-seal"]) == SEAL_BYTES  # type: ignore[arg-type]
    assert Envelope.from_amqp(properties, SENT.body, SEALS.of("b")) == SENT


def test_a_reader_without_a_key_finds_the_header_as_ever_and_no_seal() -> None:
    arrived = Envelope.from_amqp(wire(SENT), SENT.body)
    assert (arrived, arrived.seal) == (SENT, Seal.NONE)
    assert HeaderSeals((), "ns").of("b") is None


def test_another_backend_or_namespace_is_another_seal() -> None:
    properties = wire(SENT)
    assert seal_of(properties, SENT.body, backend="other") is Seal.BROKEN
    assert seal_of(properties, SENT.body, HeaderSeals([NEW], "other")) is Seal.BROKEN


def test_names_do_not_run_together() -> None:
    assert HeaderSeals([NEW], "ns").of("b").make(b"") != HeaderSeals([NEW], "nsb").of("").make(b"")  # type: ignore[union-attr]
    one, other = (msgspec.structs.replace(SENT, id=name, content_type=kind) for name, kind in (("ab", "c"), ("a", "bc")))
    assert wire(one).headers["mq-seal"] != wire(other).headers["mq-seal"]  # type: ignore[index]


def test_a_change_of_anything_that_is_covered_breaks_it() -> None:
    for field, value in (("message_id", mint_id()), ("content_type", "text/plain"), ("message_id", f"{SENT.id}.result")):
        properties = wire(SENT)
        setattr(properties, field, value)
        assert seal_of(properties, SENT.body) is Seal.BROKEN, field
    assert seal_of(wire(SENT), SENT.body + b" ") is Seal.BROKEN
    assert seal_of(wire(SENT), b'{"a": 2}') is Seal.BROKEN


FIELDS = {
    "origin": "handle",
    "inbox": "mqserve:ns:inbox:q",
    "ref": "mqserve:ns:body:{x}",
    "shadow": True,
    "once": True,
    "meta": RequestHead(call="m"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_header_but_two_is_covered(field: str) -> None:
    changed = msgspec.structs.replace(SENT.header, **{field: FIELDS[field]})
    assert seal_of(with_mq(wire(SENT), msgspec.msgpack.encode(changed)), SENT.body) is Seal.BROKEN


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("deadline", [0, 1, 300, 2**31, 2**32, 1_900_000_000_000, 2**62])
def test_deadline_and_again_may_change_as_they_do_when_it_is_published_again(deadline: int, again: bool) -> None:
    for first in (SENT.header, Header(origin="http"), Header(origin="http", again=True)):
        sent = msgspec.structs.replace(SENT, header=first)
        changed = msgspec.structs.replace(first, deadline=deadline, again=again)
        assert seal_of(with_mq(wire(sent), msgspec.msgpack.encode(changed)), SENT.body) is Seal.VALID
        assert seal_of(wire(msgspec.structs.replace(SENT, header=changed)), SENT.body) is Seal.VALID


def test_nothing_can_be_slipped_in_beside_those_two() -> None:
    sealed = mq_of(wire(SENT))
    for entry in (
        b"\xa6shadow\xc3",
        b"\xa4once\xc3",
        b"\xa6origin\xa6handle",
        b"\xa8deadline\x01",
        b"\xa5again\xc3",
        b"\xa5again\xc2",
        b"\xa5other\x01",
    ):
        more = bytes((sealed[0] + 1,))
        for slipped in (more + entry + sealed[1:], more + sealed[1:] + entry, more + sealed[1:-18] + entry + sealed[-18:]):
            properties = with_mq(wire(SENT), slipped)
            arrived = Envelope.from_amqp(properties, SENT.body, SEALS.of("b"))
            if arrived.seal is Seal.VALID:  # only as `again`, at its place
                assert slipped == more + sealed[1:] + b"\xa5again\xc3"
                assert arrived.header == msgspec.structs.replace(SENT.header, again=True)


def test_a_longer_body_is_covered_by_its_length() -> None:
    exact, longer = b"x" * SEALED_BODY_BYTES, b"x" * (SEALED_BODY_BYTES + 1)
    assert seal_of(wire(msgspec.structs.replace(SENT, body=exact)), b"y" + exact[1:]) is Seal.BROKEN
    properties = wire(msgspec.structs.replace(SENT, body=longer))
    assert seal_of(properties, longer + b"x") is Seal.BROKEN
    assert seal_of(properties, b"") is Seal.BROKEN
    assert seal_of(wire(msgspec.structs.replace(SENT, body=b"")), longer) is Seal.BROKEN
    assert seal_of(properties, b"y" * len(longer)) is Seal.VALID, "of such a body the seal says no more: docs/security.md"


def test_a_message_without_a_content_type_arrives_sealed() -> None:
    assert seal_of(wire(msgspec.structs.replace(SENT, content_type="")), SENT.body) is Seal.VALID


def test_a_key_is_rotated_without_a_refusal() -> None:
    before, during, after = HeaderSeals([OLD], "ns"), HeaderSeals([NEW, OLD], "ns"), HeaderSeals([NEW], "ns")
    assert seal_of(wire(SENT, before), SENT.body, during) is Seal.VALID
    assert seal_of(wire(SENT, during), SENT.body, after) is Seal.VALID
    assert seal_of(wire(SENT, before), SENT.body, after) is Seal.FOREIGN


@pytest.mark.parametrize("odd", ["text", "", b"", b"\0" * 19, b"\0" * 21, 7, True, None, 1.5, [b"\0" * 20], {"a": b"\0" * 20}])
def test_a_seal_of_any_other_form_does_not_fit(odd: Any) -> None:
    properties = wire(SENT)
    properties.headers = {**(properties.headers or {}), "mq-seal": odd}
    assert seal_of(properties, SENT.body) in (Seal.BROKEN, Seal.FOREIGN)


@given(st.binary(min_size=16, max_size=16))
def test_a_mac_that_was_guessed_does_not_fit(mac: bytes) -> None:
    properties = wire(SENT)
    assert properties.headers is not None
    properties.headers["mq-seal"] = bytearray(bytes(properties.headers["mq-seal"])[:4] + mac)  # type: ignore[arg-type]
    assert seal_of(properties, SENT.body) is Seal.BROKEN


def test_of_two_entries_with_one_name_reader_and_seal_see_the_same_one() -> None:
    mine = msgspec.msgpack.encode(Header(origin="http", meta=RequestHead(client=("127.0.0.1", 1))))
    entry = b"\x02mqx" + len(mine).to_bytes(4, "big") + mine
    packed = SENT.to_amqp("", SEALS.of("b"))
    at = packed.index(b"\x02mqx") - 4
    size = int.from_bytes(packed[at : at + 4], "big")
    table = packed[at + 4 : at + 4 + size]
    for doubled in (entry + table, table + entry):
        raw = packed[:at] + len(doubled).to_bytes(4, "big") + doubled + packed[at + 4 + size :]
        header = ContentHeader()
        header.unmarshal(b"\x00\x3c" + bytes(10) + raw)
        arrived = Envelope.from_amqp(header.properties, SENT.body, SEALS.of("b"))
        assert (arrived.seal is Seal.VALID) == (arrived.header == SENT.header)


def test_no_key_shows_in_the_state() -> None:
    assert "nnn" not in repr(SEALS) + repr(SEALS.of("b"))
