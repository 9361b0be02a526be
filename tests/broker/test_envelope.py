"""The request's AMQP form, written by us and read by pamqp, and the other way round."""

import msgspec
import pytest
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from mqserve.broker.envelope import Envelope, Header, RequestHead, mint_id
from mqserve.broker.errors import BadEnvelope, TooLarge

FULL = Envelope(
    id="an id",
    body=b"",
    content_type="application/json",
    header=Header(
        origin="http",
        inbox="mqserve:ns:inbox:p",
        deadline=1_700_000_000_123,
        ref="mqserve:ns:body:{id}",
        again=True,
        meta=RequestHead(
            method="POST",
            path="/grüße",
            query=b"a=%20",
            headers=((b"x-a", b"1"), (b"x-a", b"\xff")),
            params=(("number", "float", "3.14"), ("user", "int", "-9007199254740993")),
            route="/{user:int}/{number:float}",
            endpoint="e",
            call="predict",
            http_version="2",
            scheme="https",
            client=("::1", 4711),
            server=("host", None),
        ),
    ),
    reply_to="their.queue",
    correlation_id="c",
    priority=3,
    expiration_ms=60_000,
    persistent=True,
)


@pytest.mark.parametrize("envelope", [FULL, Envelope("", b"", "text/plain")], ids=["full", "bare"])
def test_pamqp_reads_what_we_write_and_we_read_it_back(envelope: Envelope) -> None:
    assert Envelope.from_amqp(read_by_pamqp(envelope), b"") == envelope


def test_pamqp_reads_every_property_as_meant() -> None:
    properties = read_by_pamqp(FULL)
    assert properties.content_type == "application/json"
    assert properties.message_id == "an id"
    assert properties.reply_to == "their.queue"
    assert properties.correlation_id == "c"
    assert properties.priority == 3
    assert properties.expiration == "60000"
    assert properties.delivery_mode == 2
    assert list(properties.headers or {}) == ["mq"]


def test_a_float_in_the_path_travels_as_its_text() -> None:
    arrived = Envelope.from_amqp(read_by_pamqp(FULL), b"")
    assert arrived.header.meta.params[0] == ("number", "float", "3.14")


def test_a_deadline_arrives_to_the_millisecond() -> None:
    deadline = 2**53 + 1
    assert Envelope.from_amqp(read_by_pamqp(Envelope("", b"", "", Header(deadline=deadline))), b"").header.deadline == deadline


def test_a_reply_carries_its_status_and_no_header_of_ours() -> None:
    assert read_by_pamqp(Envelope("", b"", "text/plain", status=504)).headers == {"mq-status": 504}


def test_a_stranger_may_leave_out_everything_but_the_body() -> None:
    assert Envelope.from_amqp(Basic.Properties(), b"body") == Envelope("", b"body", "application/octet-stream")


def test_unknown_fields_of_the_header_are_ignored() -> None:
    assert parsed({"inbox": "i", "colour": "red", "meta": {"path": "/", "size": 3}}).header == Header(inbox="i", meta=RequestHead(path="/"))


def test_an_unknown_version_is_refused_and_named() -> None:
    with pytest.raises(BadEnvelope, match="version 2"):
        parsed({"v": 2})


@pytest.mark.parametrize("header", ["text", 7, b"\xc1", b"", msgspec.msgpack.encode({"deadline": "soon"}), msgspec.msgpack.encode([1])])
def test_a_header_that_does_not_parse_is_refused_with_a_way_out(header: str | int | bytes) -> None:
    with pytest.raises(BadEnvelope, match="leave it out"):
        Envelope.from_amqp(Basic.Properties(headers={"mq": header}), b"")


@pytest.mark.parametrize("expiration", ["", "soon", "-1", "1.5"])
def test_an_expiration_that_is_no_number_counts_as_none(expiration: str) -> None:
    assert Envelope.from_amqp(Basic.Properties(expiration=expiration), b"").expiration_ms == 0


def test_a_head_over_the_limit_is_refused_and_one_at_the_limit_fits_a_frame() -> None:
    assert len(Envelope("", b"", "", head_of(64 * 1024)).to_amqp()) < 128 * 1024
    with pytest.raises(TooLarge) as refusal:
        Envelope("", b"", "", head_of(200_000)).to_amqp()
    assert refusal.value.status == 431


def test_a_property_longer_than_amqp_allows_is_refused() -> None:
    with pytest.raises(BadEnvelope, match="255"):
        Envelope("ü" * 128, b"", "").to_amqp()


def test_the_senders_user_travels_as_amqps_own_property() -> None:
    envelope = Envelope("i", b"", "text/plain", reply_to="r", correlation_id="c", priority=1, expiration_ms=5)
    header = ContentHeader()
    header.unmarshal(b"\x00\x3c" + bytes(10) + envelope.to_amqp("the proxy"))
    assert isinstance(header.properties, Basic.Properties)
    read = Envelope.from_amqp(header.properties, b"")
    assert (read, read.user_id) == (envelope, "the proxy")


def test_minted_ids_are_128_bits_and_never_the_same() -> None:
    ids = {mint_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(bytes.fromhex(minted)) for minted in ids} == {16}


def test_a_minted_id_names_its_future_and_a_callers_own_key_is_scoped_to_the_backend() -> None:
    minted = Envelope(mint_id(), b"", "", Header(origin="handle"))
    assert minted.future_id("b") == minted.id
    assert Envelope("order-17", b"", "").future_id("b") == "b/order-17"
    assert Envelope(mint_id(), b"", "").future_id("b").startswith("b/")
    assert Envelope("", b"", "").future_id("b") == ""


def read_by_pamqp(envelope: Envelope) -> Basic.Properties:
    """As pamqp's own decoder sees the bytes behind a content header's class, weight and size."""
    header = ContentHeader()
    header.unmarshal(b"\x00\x3c" + bytes(10) + envelope.to_amqp())
    assert isinstance(header.properties, Basic.Properties)
    return header.properties


def parsed(header: dict[str, object]) -> Envelope:
    return Envelope.from_amqp(Basic.Properties(headers={"mq": msgspec.msgpack.encode(header)}), b"")


def head_of(size: int) -> Header:
    return Header(meta=RequestHead(headers=((b"h", b"x" * size),)))
