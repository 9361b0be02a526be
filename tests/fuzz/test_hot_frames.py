"""The protocol beneath aiormq reads what aiormq and pamqp read, however the bytes are cut.

Each of the two tests cuts an example in 25 ways, so `make fuzz` reads a million inputs.
"""

import asyncio
import random
import struct
from typing import Any

import pytest
from aiormq.connection import FrameReceiver
from aiormq.exceptions import AMQPError
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands, frame, header
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.heartbeat import Heartbeat

from mqserve.broker.envelope import Envelope, Header, UnreadableProperties
from mqserve.broker.rabbitmq import unreadable
from mqserve.broker.rabbitmq.hot_frames import BrokenStream, FrameReader
from tests.fuzz.material import bytes_like, mutated

CUTS = 25
HOT = (1, 2)
OURS = Envelope("a" * 32, b"", "application/json", Header(origin="http", deadline=2**41), expiration_ms=60_000).to_amqp("proxy")
ENDS = (commands.Channel.Close, commands.Channel.CloseOk)

numbers = st.sampled_from([0, 1, 2, 3])
tags = st.integers(0, 2**63 - 1)
names = st.sampled_from(["", "b", "a.long.name" * 10])
contents = st.tuples(bytes_like(OURS) | st.just(OURS), st.lists(st.binary(min_size=1, max_size=40), max_size=4))
heads = st.one_of(
    st.builds(Basic.Deliver, names, tags, st.booleans(), names, names),
    st.builds(Basic.Return, st.just(312), st.just("NO_ROUTE"), names, names),
    st.builds(Basic.GetOk, tags, st.booleans(), names, names, st.just(0)),
)
confirms = st.builds(Basic.Ack, tags, st.booleans()) | st.builds(Basic.Nack, tags, st.booleans(), st.booleans())
others = st.sampled_from(
    [
        Basic.QosOk(),
        Basic.ConsumeOk("c"),
        Basic.CancelOk("c"),
        Basic.Cancel("c"),
        commands.Confirm.SelectOk(),
        commands.Connection.Blocked("low on memory"),
        commands.Channel.Close(404, "NOT_FOUND", 0, 0),
        commands.Channel.CloseOk(),
        Heartbeat(),
    ]
)


def framed(part: Any, number: int) -> bytes:
    return frame.marshal(part, 0 if isinstance(part, Heartbeat) else number)


def content(head: Any, properties_and_bodies: tuple[bytes, list[bytes]], number: int) -> list[bytes]:
    properties, bodies = properties_and_bodies
    payload = struct.pack(">HHQ", 60, 0, sum(map(len, bodies))) + properties
    head_frame = struct.pack(">BHI", 2, number, len(payload)) + payload + b"\xce"
    return [framed(head, number), head_frame, *(framed(ContentBody(body), number) for body in bodies)]


def said_on(number: int) -> st.SearchStrategy[list[bytes]]:
    """What a broker says on one channel."""
    messages = st.builds(content, heads, contents, st.just(number))
    methods = st.builds(lambda part: [framed(part, number)], confirms | others)
    return st.lists(messages | methods, max_size=6).map(lambda groups: [one for group in groups for one in group])


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """What a broker says on four channels, mixed frame by frame."""
    lanes = [draw(said_on(number)) for number in range(4)]
    mix = draw(st.randoms(use_true_random=False))
    stream = b""
    while any(lanes):
        stream += mix.choice([lane for lane in lanes if lane]).pop(0)
    return stream


class Reading:
    """What the hot channels were told, and what is aiormq's."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.passed_on = b""
        self.is_broken = False

    def pass_on(self, data: bytes) -> None:
        self.passed_on += data

    def confirm(self, number: int, tag: int, multiple: bool, refused: bool) -> None:
        self.told.append((number, tag, multiple, refused))

    def deliver(self, number: int, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes) -> None:
        self.told.append((number, tag, redelivered, values_of(properties), body))

    def give_back(self, number: int, returned: Basic.Return, properties: Basic.Properties) -> None:
        self.told.append((number, returned.exchange, returned.routing_key, values_of(properties)))


def values_of(properties: Basic.Properties) -> Any:
    return properties.why if isinstance(properties, UnreadableProperties) else [getattr(properties, n) for n in Basic.Properties.__slots__]


class Channel:
    """One hot channel of a reading."""

    wants_address = False

    def __init__(self, reading: Reading, number: int) -> None:
        self._reading = reading
        self._number = number

    def on_address(self, exchange: str, routing_key: str) -> None:
        raise AssertionError

    def on_delivery(self, tag: int, redelivered: bool, properties: Basic.Properties, body: bytes) -> None:
        self._reading.deliver(self._number, tag, redelivered, properties, body)

    def on_return(self, returned: Basic.Return, properties: Basic.Properties) -> None:
        self._reading.give_back(self._number, returned, properties)

    def on_confirm(self, tag: int, *, multiple: bool, refused: bool) -> None:
        self._reading.confirm(self._number, tag, multiple, refused)

    def on_writable(self) -> None:
        raise AssertionError


def read_by_us(pieces: list[bytes]) -> Reading:
    reading = Reading()
    frames = FrameReader(reading.pass_on)
    for number in HOT:
        frames.channels[number] = Channel(reading, number)
    try:
        for piece in pieces:
            frames.feed(piece)
    except BrokenStream:
        reading.is_broken = True
    return reading


def cuts_of(stream: bytes, seed: int) -> list[list[bytes]]:
    chance = random.Random(seed)
    cut: list[list[bytes]] = []
    for _ in range(CUTS):
        places = sorted(chance.sample(range(len(stream) + 1), min(len(stream) + 1, chance.choice([1, 3, 10, 1000]))))
        cut.append([piece for piece in (stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)) if piece])
    return cut


async def read_by_aiormq(stream: bytes) -> Reading:
    """The frames as aiormq's connection takes them from a stream reader, and the contents as its channels put them together."""
    reading, under_way, hot = Reading(), dict[int, list[Any]](), set(HOT)
    reader = asyncio.StreamReader()
    reader.feed_data(stream)
    reader.feed_eof()
    at = 0
    try:
        async for size, number, part in FrameReceiver(reader):
            raw, at = stream[at : at + size], at + size
            if isinstance(part, ENDS):
                hot.discard(number)
                under_way.pop(number, None)
            if number not in hot or not _is_hot(part, under_way.get(number)):
                reading.pass_on(raw)
            elif isinstance(part, Basic.Ack | Basic.Nack):
                reading.confirm(number, part.delivery_tag or 0, part.multiple, isinstance(part, Basic.Nack))
            else:
                _gather(reading, under_way, number, part)
    except (AMQPError, ValueError):  # ValueError: a frame out of order, as aiormq's channels say
        reading.is_broken = True
    return reading


def _is_hot(part: Any, begun: list[Any] | None) -> bool:
    if isinstance(part, header.ContentHeader | ContentBody):
        return begun is not None
    if begun is not None and not isinstance(part, Heartbeat):
        raise ValueError("a method in the middle of a content")
    return isinstance(part, Basic.Deliver | Basic.Return | Basic.Ack | Basic.Nack)


def _gather(reading: Reading, under_way: dict[int, list[Any]], number: int, part: Any) -> None:
    begun = under_way.setdefault(number, [])
    if len(begun) == 0 or isinstance(part, header.ContentHeader if len(begun) == 1 else ContentBody):
        begun.append(part)
    else:
        raise ValueError("a frame out of order")
    if len(begun) < 2 or sum(len(body.value) for body in begun[2:]) < begun[1].body_size:
        return
    method, head, *bodies = under_way.pop(number)
    if isinstance(method, Basic.Return):
        return reading.give_back(number, method, head.properties)
    reading.deliver(number, method.delivery_tag, method.redelivered, head.properties, b"".join(body.value for body in bodies))


@pytest.fixture(scope="module", autouse=True)
def as_on_a_connection() -> None:
    unreadable.install()


@given(streams(), st.integers())
def test_what_a_broker_says_is_read_as_aiormq_reads_it_however_it_is_cut(stream: bytes, seed: int) -> None:
    expected = asyncio.run(read_by_aiormq(stream))
    assert not expected.is_broken
    for pieces in cuts_of(stream, seed):
        read = read_by_us(pieces)
        assert (read.told, read.passed_on, read.is_broken) == (expected.told, expected.passed_on, False)


@given(streams().flatmap(mutated) | st.binary(max_size=100), st.integers())
@example(b"\x02\x00\x03\x00\x00\x00\x04\x00<\x00\x0b\xce", 0)  # a header that is too short for its fixed part
def test_bytes_that_are_no_amqp_end_the_connection_or_are_aiormqs_wherever_they_are_cut(stream: bytes, seed: int) -> None:
    """aiormq is stricter about strings that we do not read, and ends where we go on: never the other way with another result."""
    whole = read_by_us([stream])
    expected = asyncio.run(read_by_aiormq(stream))
    together = min(len(whole.told), len(expected.told))
    assert whole.told[:together] == expected.told[:together]
    assert expected.is_broken or whole.told == expected.told
    for pieces in cuts_of(stream, seed):
        read = read_by_us(pieces)
        assert (read.told, read.is_broken) == (whole.told, whole.is_broken)
