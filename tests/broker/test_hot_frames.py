"""The protocol beneath aiormq: what is hot, what is passed on, and what ends the connection."""

import asyncio
import logging
from typing import Any

import pytest
from pamqp import commands, frame, header
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.heartbeat import Heartbeat

from mqserve.broker.rabbitmq.hot_frames import BrokenStream, FrameReader, HotProtocol

pytestmark = pytest.mark.anyio

HOT, COLD = 1, 2


def delivery(number: int, *bodies: bytes, tag: int = 7) -> bytes:
    size = sum(map(len, bodies))
    head: list[Any] = [
        Basic.Deliver("consumer", tag, True, "exchange", "key"),
        header.ContentHeader(0, size, Basic.Properties(message_id="m")),
    ]
    return b"".join(frame.marshal(part, number) for part in (*head, *map(ContentBody, bodies)))


class Told:
    """A channel that remembers what it is told."""

    def __init__(self, *, wants_address: bool = False) -> None:
        self.heard: list[Any] = []
        self.wants_address = wants_address

    def on_address(self, exchange: str, routing_key: str) -> None:
        self.heard.append((exchange, routing_key))

    def on_delivery(self, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes) -> None:
        self.heard.append((tag, redelivered, properties.message_id, body))

    def on_return(self, returned: Basic.Return, properties: Basic.Properties) -> None:
        self.heard.append((returned.routing_key, properties.message_id))

    def on_confirm(self, tag: int, *, multiple: bool, refused: bool) -> None:
        self.heard.append((tag, multiple, refused))

    def on_writable(self) -> None:
        self.heard.append("writable")


class Reading:
    """A reader with one hot channel, and what it passed on."""

    def __init__(self) -> None:
        self.channel = Told()
        self.passed_on = b""
        self.frames = FrameReader(self._pass_on)
        self.frames.channels[HOT] = self.channel

    def _pass_on(self, data: bytes) -> None:
        self.passed_on += data


class FakeTransport(asyncio.Transport):
    """Remembers only its end."""

    def __init__(self) -> None:
        super().__init__()
        self.is_aborted = False

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True


async def test_a_delivery_arrives_whole_although_its_body_and_its_frames_are_cut() -> None:
    reading, raw = Reading(), delivery(HOT, b"first ", b"second")
    for at in range(len(raw)):
        reading.frames.feed(raw[at : at + 1])
    assert reading.channel.heard == [(7, True, "m", b"first second")]
    assert reading.passed_on == b""


async def test_a_frame_larger_than_any_that_was_agreed_on_is_read() -> None:
    reading, body = Reading(), b"x" * 1_000_000
    raw = delivery(HOT, body)
    for start in range(0, len(raw), 65536):
        reading.frames.feed(raw[start : start + 65536])
    assert reading.channel.heard == [(7, True, "m", body)]


async def test_frames_of_other_channels_and_other_methods_are_passed_on_unchanged_and_in_order() -> None:
    reading = Reading()
    get = Basic.GetOk(1, False, "exchange", "key", 0)
    others = [
        delivery(COLD, b"body"),
        frame.marshal(Basic.QosOk(), HOT),
        frame.marshal(get, HOT) + frame.marshal(header.ContentHeader(0, 1), HOT) + frame.marshal(ContentBody(b"x"), HOT),
        frame.marshal(Heartbeat(), 0),
    ]
    reading.frames.feed(b"".join(other + delivery(HOT, b"a") for other in others))
    assert reading.passed_on == b"".join(others)
    assert len(reading.channel.heard) == len(others)


async def test_a_channel_that_wants_it_is_told_first_where_a_delivery_was_published() -> None:
    reading = Reading()
    reading.channel.wants_address = True
    raw = delivery(HOT, b"body")
    odd = raw.replace(b"\x08exchange\x03key", b"\x08\xff\xfe\xfdxxxxx\x03key")
    reading.frames.feed(raw + odd)
    assert reading.channel.heard[:2] == [("exchange", "key"), (7, True, "m", b"body")]
    assert reading.channel.heard[2] == ("\N{REPLACEMENT CHARACTER}" * 3 + "xxxxx", "key")


@pytest.mark.parametrize("end", [b"\x01e", b"\x01e\x02k", b"\x05e", b""])
async def test_an_address_that_is_cut_off_ends_the_connection(end: bytes) -> None:
    reading = Reading()
    reading.channel.wants_address = True
    payload = b"\x00\x3c\x00\x3c\x01c" + bytes(9) + end
    with pytest.raises(BrokenStream):
        reading.frames.feed(b"\x01\x00\x01" + len(payload).to_bytes(4) + payload + b"\xce")


async def test_contents_of_two_channels_may_be_mixed() -> None:
    reading, other = Reading(), Told()
    reading.frames.channels[COLD] = other
    whole = [frame_of for raw in (delivery(HOT, b"a", b"b"), delivery(COLD, b"c", b"d")) for frame_of in split(raw)]
    reading.frames.feed(b"".join(whole[place] for place in (0, 4, 5, 1, 2, 6, 7, 3)))
    assert (reading.channel.heard, other.heard) == ([(7, True, "m", b"ab")], [(7, True, "m", b"cd")])


@pytest.mark.parametrize("end", [commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0), commands.Channel.CloseOk()])
async def test_a_number_is_another_channels_after_the_end_of_a_channel(end: Any) -> None:
    reading = Reading()
    begun = b"".join(split(delivery(HOT, b"never"))[:2])
    later = frame.marshal(end, HOT) + delivery(HOT, b"of another channel")
    reading.frames.feed(begun + later)
    assert reading.channel.heard == []
    assert reading.passed_on == later


async def test_an_alarm_is_known_and_passed_on() -> None:
    reading = Reading()
    blocked, unblocked = frame.marshal(commands.Connection.Blocked("low on memory"), 0), frame.marshal(commands.Connection.Unblocked(), 0)
    states = []
    for said in (blocked, unblocked):
        reading.frames.feed(said)
        states.append(reading.frames.is_blocked)
    assert states == [True, False]
    assert reading.passed_on == blocked + unblocked


@pytest.mark.parametrize(
    "broken",
    [
        b"AMQP\x00\x00\x09\x01",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame.marshal(Basic.QosOk(), HOT)[:-1] + b"\x00",
        frame.marshal(Basic.Deliver("c", 1, False, "e", "k"), HOT) + frame.marshal(Basic.Ack(1), HOT),
        frame.marshal(Basic.Deliver("c", 1, False, "e", "k"), HOT) + frame.marshal(ContentBody(b"x"), HOT),
        frame.marshal(Basic.Deliver("c", 1, False, "e", "k"), HOT) + 2 * frame.marshal(header.ContentHeader(0, 1), HOT),
        b"\x01\x00\x01\x00\x00\x00\x06\x00\x3c\x00\x3c\x01c\xce",
        b"\x01\x00\x01\x00\x00\x00\x0c\x00\x3c\x00\x50" + bytes(8) + b"\xce",
        b"\x01\x00\x01\x00\x00\x00\x04\x00\x3c\x00\x32\xce",
        b"\x01\x00\x01\x00\x00\x00\x02\x00\x3c\xce",
    ],
)
async def test_what_no_broker_may_send_ends_the_connection(broken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    reading = Reading()
    reading.frames.feed(delivery(HOT, b"a"))
    with pytest.raises(BrokenStream):
        reading.frames.feed(broken)
    assert len(reading.channel.heard) == 1
    protocol, transport = connected()
    protocol.data_received(broken)
    assert transport.is_aborted
    assert "what is no AMQP" in caplog.text


async def test_a_channel_that_fails_to_handle_a_frame_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    protocol, transport = connected()
    protocol.frames.channels[HOT].on_delivery = None  # type: ignore[method-assign,assignment]
    with caplog.at_level(logging.CRITICAL, "mqserve"):
        protocol.data_received(delivery(HOT, b"a"))
    assert transport.is_aborted


async def test_hot_frames_count_as_life_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol, _ = connected()
    now = 100.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    heartbeat = frame.marshal(Heartbeat(), 0)
    for at, beats in ((100.0, 1), (100.1, 1), (100.9, 1), (101.0, 2), (101.9, 2), (102.1, 3)):
        now = at
        protocol.data_received(delivery(HOT, b"a"))
        assert bytes(READERS[-1]._buffer) == heartbeat * beats  # type: ignore[attr-defined]


async def test_a_connection_that_logs_in_hears_nothing_but_the_broker() -> None:
    """A life sign of ours would stand between a question of the login and its answer."""
    protocol, _ = connected()
    protocol.frames.channels.clear()
    tune = frame.marshal(commands.Connection.Tune(2047, 131072, 60), 0)
    protocol.data_received(tune)
    assert bytes(READERS[-1]._buffer) == tune  # type: ignore[attr-defined]


async def test_a_lost_connection_takes_no_writes_and_forgets_its_channels() -> None:
    protocol, _ = connected()
    protocol.connection_lost(None)
    protocol.write(b"frames")
    protocol.abort()
    assert not protocol.frames.channels
    assert "not connected" in repr(protocol)


READERS: list[asyncio.StreamReader] = []


def connected() -> tuple[HotProtocol, FakeTransport]:
    READERS[:] = [asyncio.StreamReader()]  # kept: a protocol has only a weak reference to its reader
    protocol, transport = HotProtocol(READERS[0]), FakeTransport()
    protocol.connection_made(transport)
    protocol.frames.channels[HOT] = Told()
    return protocol, transport


def split(raw: bytes) -> list[bytes]:
    frames = []
    while raw:
        size = frame.unmarshal(raw)[0]
        frames.append(raw[:size])
        raw = raw[size:]
    return frames
